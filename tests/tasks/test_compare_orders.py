"""The comparison of orders as a step: what it reads of the held-out data, and what it says."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import MICRO

from elastic_core.budget import Budget
from elastic_core.files.reorder import identity_order, write_order
from elastic_core.files.shards import write_tensors
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.recipe import Evaluation, Importance, Recipe, Router
from elastic_core.schema import build
from flows import elastify
from tasks import rank
from tasks.records import OrderComparison
from tasks.reporting.summary import order_warnings
from tasks.running.digests import artifact
from tasks.teacher import write_fresh_model

MODEL = ModelConfig(
    hybrid_override_pattern="M-M*-",
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    vocab_size=512,
    chunk_size=16,
)
AXES = Axes(ffn=(64, 48, 32), mamba_heads=(4, 2))
LENGTH, ROWS = 8, 40


@pytest.fixture
def compared(tmp_path: Path) -> Any:
    """Runs the step on an untrained model in no order at all, on the tokens 0, 1, 2, ..."""
    for name in ("tokenizer", "ranking", "corpus"):
        (tmp_path / name).mkdir()
    write_fresh_model(tmp_path / "teacher", MODEL, tmp_path / "tokenizer", seed=0)
    write_order(tmp_path / "ranking", identity_order(MODEL))
    write_tensors(
        tmp_path / "corpus" / "heldout.safetensors", {"tokens": torch.arange(ROWS * LENGTH + 1, dtype=torch.int32)}
    )
    reordered = rank.reorder_teacher.fn(
        teacher=artifact(tmp_path / "teacher"),
        ranking=artifact(tmp_path / "ranking"),
        axes=AXES,
        budgets=(Budget(name="l"),),
        settings=Router(hidden_size=8),
        lineage={},
        latency_table=None,
        seed=0,
        workspace=str(tmp_path),
    )

    def run(comparison_tokens: int) -> OrderComparison:
        return rank.compare_orders.fn(
            reordered=reordered,
            corpus=artifact(tmp_path / "corpus"),
            axes=AXES,
            settings=Importance(comparison_tokens=comparison_tokens, random_orders=3),
            evaluation=Evaluation(sequence_length=LENGTH, batch_size=3),
            dtype="float32",
            seed=0,
        )

    return run


def test_the_comparison_reads_rows_from_all_over_the_held_out_data(
    compared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources lie one after the other: the first rows would be of the first source alone."""
    read: list[list[int]] = []
    measured = rank.heldout_loss

    def spy(student: Any, subnet: Any, batches: Any, teacher: Any) -> Any:
        read.append([int(row[0]) // LENGTH for batch in batches for row in batch.inputs_BT])
        return measured(student, subnet, batches, teacher)

    monkeypatch.setattr(rank, "heldout_loss", spy)
    record = compared(comparison_tokens=10 * LENGTH)
    assert record.heldout_tokens == 10 * LENGTH
    assert read == [[0, 4, 8, 12, 16, 20, 24, 28, 32, 36]] * 12  # three cuts, by importance and in 3 random orders


def test_a_cut_by_kl_is_never_below_zero_and_doubtful_ones_are_logged(
    compared: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="tasks.rank"):
        record = compared(comparison_tokens=4 * LENGTH)
    assert [(cut.axis, cut.size) for cut in record.cuts] == [("ffn", 48), ("ffn", 32), ("mamba_heads", 2)]
    assert all(lost > 0 for cut in record.cuts for lost in (cut.by_importance, *cut.at_random))
    assert caplog.messages == order_warnings(record)


def test_a_recipe_that_gives_it_no_tokens_has_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    monkeypatch.setattr(elastify, "run", lambda step, **_: steps.append(step))
    for tokens in (64, 0):
        recipe = build(Recipe, {**MICRO, "importance": {**MICRO["importance"], "comparison_tokens": tokens}})
        orders = elastify.compared(recipe, artifact(tmp_path), artifact(tmp_path))
    assert steps == [rank.compare_orders], "with 64 tokens alone"
    assert orders == OrderComparison(heldout_tokens=0, cuts=())
