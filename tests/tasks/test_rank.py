"""Laws of the reordered teacher, and of the shapes chosen for its budgets, as results of steps."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_core import depth
from elastic_core.budget import Budget
from elastic_core.files import checkpoint, reorder, shapes
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Importance, Router, Shapes
from elastic_core.resolve import resolve_budgets
from elastic_core.subnet import full_subnet, is_nested
from elastic_core.training import job
from elastic_core.training.curriculum import generator
from tasks.corpus.record import TRAIN_FILE
from tasks.rank import choose_shapes, rank_importance, reorder_teacher, rotate_teacher
from tasks.records import Artifact
from tasks.running.digests import artifact

CONFIG = ModelConfig(
    hybrid_override_pattern="M*-",
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=2,
    mamba_head_dim=8,
    ssm_state_size=4,
    n_groups=1,
    vocab_size=64,
    chunk_size=16,
)
LINEAGE = {"teacher_sha256": "1" * 64}


@pytest.fixture
def teacher(tmp_path: Path) -> Artifact:
    model = ElasticNemotronH(CONFIG)
    model.initialise(generator(0))
    checkpoint.write_weights(tmp_path / "teacher", CONFIG, model.state_dict(), torch.float32)
    return artifact(tmp_path / "teacher")


@pytest.fixture
def ranking(tmp_path: Path) -> Artifact:
    (tmp_path / "ranking").mkdir()
    reorder.write_order(tmp_path / "ranking", reorder.random_order(CONFIG, generator(1)))
    return artifact(tmp_path / "ranking")


def test_another_commit_reorders_to_the_same_bytes_so_that_no_stage_is_trained_anew(
    teacher: Artifact, ranking: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for commit in ("1" * 12, "2" * 12):
        monkeypatch.setattr("tasks.running.code.project_version", lambda commit=commit: f"0.1.0+g{commit}")
        made.append(
            reorder_teacher.fn(
                teacher=teacher,
                ranking=ranking,
                axes=Axes(hidden=(16, 8)),
                budgets=(Budget(name="l"), Budget(name="s", params=3000)),
                settings=Router(hidden_size=8),
                lineage=LINEAGE,
                latency_table=None,
                seed=0,
                workspace=str(tmp_path / "workspace"),
            )
        )
    assert made[0].path != made[1].path and made[0].digest == made[1].digest
    assert checkpoint.read_family(Path(made[0].path)).lineage == LINEAGE


AXES = Axes(hidden=(16, 12, 8), ffn=(32, 16))
SHAPES = Shapes(samples=4, sequence_length=8, batch_size=2)


@pytest.fixture
def corpus(tmp_path: Path) -> Artifact:
    tokens = torch.randint(64, (400,), generator=generator(2), dtype=torch.int32)
    (tmp_path / "corpus").mkdir()
    save_file({"tokens": tokens}, tmp_path / "corpus" / TRAIN_FILE)
    return artifact(tmp_path / "corpus")


def test_the_rotated_teacher_is_another_file_of_the_same_function_and_the_same_bytes_each_time(
    teacher, corpus, tmp_path
):
    settings = Importance(samples=4, sequence_length=32, batch_size=2, depth_samples=4)
    first, second = (
        rotate_teacher.fn(
            teacher=teacher,
            corpus=corpus,
            settings=settings,
            dtype="float32",
            seed=0,
            workspace=str(tmp_path / "workspace"),
        )
        for _ in range(2)
    )
    assert first.digest == second.digest != teacher.digest
    tokens = torch.arange(2 * 20).view(2, 20) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = (
            model.logits(model(tokens, full_subnet(CONFIG)))
            for model in (
                job.load_model(Path(made.path), torch.device("cpu"), torch.float32) for made in (teacher, first)
            )
        )
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()  # weights are rounded to float32 once more


@pytest.fixture
def reordered(teacher: Artifact, ranking: Artifact, tmp_path: Path) -> Artifact:
    return reorder_teacher.fn(
        teacher=teacher,
        ranking=ranking,
        axes=AXES,
        budgets=(Budget(name="l"), Budget(name="m", params=3900), Budget(name="s", params=3000)),
        settings=Router(hidden_size=8),
        lineage=LINEAGE,
        latency_table=None,
        seed=0,
        workspace=str(tmp_path / "workspace"),
    )


def choose(reordered: Artifact, family: Artifact, corpus: Artifact, tmp_path: Path) -> Path:
    made = choose_shapes.fn(
        reordered=reordered,
        family=family,
        corpus=corpus,
        settings=SHAPES,
        dtype="float32",
        seed=0,
        workspace=str(tmp_path / "workspace"),
    )
    return Path(made.path)


def test_the_chosen_shapes_are_the_best_that_were_measured_and_the_router_says_so(reordered, corpus, tmp_path):
    shaped = choose(reordered, reordered, corpus, tmp_path)
    family, measured = checkpoint.read_family(shaped), shapes.read_shapes(shaped)
    routed = job.load_router(shaped, checkpoint.read_config(shaped), family)
    assert measured is not None and measured.tokens == SHAPES.samples * SHAPES.sequence_length
    full, m, s = family.budgets
    assert full.subnet == full_subnet(CONFIG)
    assert is_nested(s.subnet, m.subnet) and m.params <= 3900 and s.params <= 3000
    assert m.subnet in [candidate.subnet for candidate in measured.budgets["m"]]
    assert s.subnet in [candidate.subnet for candidate in measured.budgets["s"]]
    assert resolve_budgets(routed, [budget.budget for budget in family.budgets])[0] == full.subnet
    assert (shaped / "model.safetensors").samefile(Path(reordered.path) / "model.safetensors")


def test_the_router_of_a_family_that_trained_stays_as_it_is_and_its_shapes_are_measured_anew(
    reordered, corpus, tmp_path
):
    trained = tmp_path / "trained"
    shutil.copytree(reordered.path, trained)
    weights = load_file(trained / checkpoint.ROUTER_FILE)
    save_file({name: weight + 0.1 for name, weight in weights.items()}, trained / checkpoint.ROUTER_FILE)
    shaped = choose(reordered, artifact(trained), corpus, tmp_path)
    before, after = (load_file(directory / checkpoint.ROUTER_FILE) for directory in (trained, shaped))
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    at_first = checkpoint.read_family(choose(reordered, reordered, corpus, tmp_path))
    found = checkpoint.read_family(shaped)
    assert [b.subnet for b in found.budgets] == [b.subnet for b in at_first.budgets], "nothing larger loses less"


def test_the_same_family_is_shaped_to_the_same_bytes(reordered, corpus, tmp_path):
    first, second = (artifact(choose(reordered, reordered, corpus, tmp_path)) for _ in range(2))
    assert first.path != second.path and first.digest == second.digest


DEEP = Axes(hidden=(16, 8), depth=(3, 2, 1))


def rank(teacher: Artifact, corpus: Artifact, axes: Axes, tmp_path: Path) -> Artifact:
    return rank_importance.fn(
        teacher=teacher,
        corpus=corpus,
        axes=axes,
        settings=Importance(samples=6, sequence_length=8, batch_size=1, depth_samples=5),
        dtype="float32",
        seed=0,
        workspace=str(tmp_path / "workspace"),
    )


def test_two_processes_rank_as_one_to_the_byte(teacher, corpus, tmp_path, monkeypatch):
    alone = rank(teacher, corpus, DEEP, tmp_path)
    monkeypatch.setattr("tasks.rank.devices", lambda: 2)
    assert rank(teacher, corpus, DEEP, tmp_path).digest == alone.digest


def test_a_ranking_that_was_interrupted_repeats_no_round(teacher, corpus, tmp_path, monkeypatch):
    expected, rounds = rank(teacher, corpus, DEEP, tmp_path), list[int]()
    measure, deaths = depth.RemovalTerms.on, iter([True])

    def dies_in_the_second_round(self, groups, candidates, remaining):
        rounds.append(len(remaining))
        if len(remaining) == 2 and next(deaths, False):
            raise KeyboardInterrupt
        return measure(self, groups, candidates, remaining)

    monkeypatch.setattr(depth.RemovalTerms, "on", dies_in_the_second_round)
    with pytest.raises(KeyboardInterrupt):
        rank(teacher, corpus, DEEP, tmp_path)
    first = rounds.count(3)
    monkeypatch.setattr("tasks.rank.importance.width_scores", None)
    assert rank(teacher, corpus, DEEP, tmp_path).digest == expected.digest
    assert rounds.count(3) == first
    assert [path for path in (tmp_path / "workspace").iterdir() if path.name.startswith("ranking")] == []


def test_no_layer_is_left_out_where_depth_is_not_elastic(teacher, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(depth, "RemovalTerms", None)
    made = rank(teacher, corpus, AXES, tmp_path)
    assert reorder.read_order(Path(made.path), CONFIG).layers == (0, 1, 2)
