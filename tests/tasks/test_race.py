"""Laws of a lap: it begins with the shapes and weights that were asked for, trains only those, and keeps no weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from trainee import train_here

from elastic_core.budget import Budget
from elastic_core.files import reorder
from elastic_core.files.checkpoint import load_weights, read_family, write_weights
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Distillation, Evaluation, Optimizer, Router, RouterSchedule, Stage
from elastic_core.training.curriculum import generator
from tasks.corpus.record import HELDOUT_FILE, TRAIN_FILE
from tasks.race import Start, run_lap, write_start
from tasks.rank import reorder_teacher
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
STAGE = Stage(
    name="stage1",
    sequence_length=16,
    batch_size=2,
    steps=3,
    budgets={"s": 1.0},
    optimizer=Optimizer(learning_rate=1e-2, warmup_steps=1),
    router=RouterSchedule(mode="frozen"),
)


@pytest.fixture
def teacher(tmp_path: Path) -> Artifact:
    model = ElasticNemotronH(CONFIG)
    model.initialise(generator(0))
    write_weights(tmp_path / "teacher", CONFIG, model.state_dict(), torch.float32)
    return artifact(tmp_path / "teacher")


@pytest.fixture
def family(teacher: Artifact, tmp_path: Path) -> Artifact:
    (tmp_path / "ranking").mkdir()
    order = replace(reorder.random_order(CONFIG, generator(1)), energy=torch.linspace(2.0, 0.1, CONFIG.hidden_size))
    reorder.write_order(tmp_path / "ranking", order)
    return reorder_teacher.fn(
        teacher=teacher,
        ranking=artifact(tmp_path / "ranking"),
        axes=Axes(hidden=(16, 8), ffn=(32, 16)),
        budgets=(Budget(name="l"), Budget(name="m", params=4000), Budget(name="s", params=3000)),
        settings=Router(hidden_size=8),
        lineage={},
        latency_table=None,
        seed=0,
        workspace=str(tmp_path / "workspace"),
    )


@pytest.mark.parametrize("start", ["cut", "fresh"])
def test_a_lap_begins_with_its_own_budgets_at_the_shapes_asked_for(
    family: Artifact, tmp_path: Path, start: Start
) -> None:
    source = Path(family.path)
    chosen = read_family(source)
    other = replace(chosen.budget("s").subnet, ffn=(16,), hidden=8)
    assert other != chosen.budget("m").subnet
    write_start(source, tmp_path / "given", [replace(STAGE, budgets={"m": 1.0})], {"m": other}, start, 0)
    write_start(source, tmp_path / "chosen", [STAGE], {}, start, 0)
    assert [(b.name, b.subnet) for b in read_family(tmp_path / "given").budgets] == [("m", other)]
    assert read_family(tmp_path / "chosen").budgets == (chosen.budget("s"),)
    teacher, weights = load_weights(source), load_weights(tmp_path / "chosen")
    same = [torch.equal(weights[name], teacher[name]) for name in weights if weights[name].ndim == 2]
    assert all(same) if start == "cut" else not any(same)
    energy = reorder.read_order(tmp_path / "chosen", CONFIG).energy
    assert (energy is None) == (start == "fresh"), "the gain of the teacher's norms is nothing to fresh weights"
    assert read_family(source).format_version == 2


@pytest.mark.parametrize("second", ["s", "m"])
def test_a_lap_trains_measures_and_keeps_only_the_numbers(
    teacher: Artifact, family: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str
) -> None:
    """Its second stage may train what its first does not."""
    monkeypatch.setenv("ELASTIC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tasks.race.run_training", train_here)
    monkeypatch.setattr("tasks.race.work_directory", lambda workspace, name: Path(workspace) / name)
    (tmp_path / "corpus").mkdir()
    for name in (TRAIN_FILE, HELDOUT_FILE):
        tokens = torch.randint(64, (400,), generator=generator(name), dtype=torch.int32)
        save_file({"tokens": tokens}, tmp_path / "corpus" / name)
    lap = run_lap.fn(
        family=family,
        teacher=teacher,
        corpus=artifact(tmp_path / "corpus"),
        stages=(STAGE, replace(STAGE, name="stage2", budgets={second: 1.0})),
        subnets={},
        start="cut",
        distillation=Distillation(),
        evaluation=Evaluation(heldout_tokens=128, sequence_length=16, batch_size=4),
        dtype="float32",
        seed=0,
        workspace=str(tmp_path / "laps"),
        weights=(None, None),
    )
    assert lap.tokens == 2 * 3 * 2 * 16
    assert lap.kl.keys() == lap.loss.keys() == {"s", second}
    assert all(0 < lap.kl[name] < lap.loss[name] < 10 for name in lap.kl)
    assert not list((tmp_path / "laps").iterdir())
