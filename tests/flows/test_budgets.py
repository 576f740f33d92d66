"""Budgets of memory and latency, from the recipe's text through training to slices of any size."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from latency import random_table
from trainee import ALONE, AXES, CONFIG, metrics_of, train_job, write_tokens
from typer.testing import CliRunner

from elastic_core.budget import Budget, Serving
from elastic_core.cost import LatencyCost, LatencyTable, MemoryCost, budget_cost, subnet_params
from elastic_core.files import checkpoint, reorder
from elastic_core.model import ElasticNemotronH
from elastic_core.planning.profile import read_table, write_table
from elastic_core.recipe import Router
from elastic_core.schema import build
from elastic_core.subnet import full_subnet, is_nested
from elastic_core.training.curriculum import generator
from elastic_core.training.job import run_job
from flows.cli import app
from tasks.rank import reorder_teacher
from tasks.running.digests import artifact

TABLE = random_table(CONFIG, AXES.bind(CONFIG), Serving(context=64, dtype="float32"), monotonic=True)
SERVED = "ctx=64,dtype=float32,prefill=8"  # so that weights, caches and activations all weigh


def budgets() -> tuple[Budget, ...]:
    """The full model, three quarters of its memory, and half of its time."""
    full = full_subnet(CONFIG)
    memory = build(Budget, {"name": "m", "memory": f"1MiB@{SERVED}"})
    latency = build(Budget, {"name": "s", "latency": "1ms@ctx=64,dtype=float32"})
    most = budget_cost(CONFIG, memory).of(full), budget_cost(CONFIG, latency, TABLE).of(full)
    return (
        Budget(name="l"),
        build(Budget, {"name": "m", "memory": f"{3 * most[0] // 4}B@{SERVED}"}),
        build(Budget, {"name": "s", "latency": f"{most[1] / 2000}us@ctx=64,dtype=float32"}),
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The elastic checkpoint that training starts from, as the pipeline makes it."""
    directory = tmp_path_factory.mktemp("start")
    model = ElasticNemotronH(CONFIG)
    model.initialise(generator("model"))
    checkpoint.write_weights(directory / "teacher", CONFIG, model.state_dict())
    (directory / "ranking").mkdir()
    reorder.write_order(directory / "ranking", reorder.random_order(CONFIG, generator("order")))
    made = reorder_teacher.fn(
        teacher=artifact(directory / "teacher"),
        ranking=artifact(directory / "ranking"),
        axes=AXES,
        budgets=budgets(),
        settings=Router(hidden_size=8),
        lineage={},
        latency_table=TABLE,
        seed=0,
        workspace=str(directory),
    )
    return Path(made.path)


@pytest.fixture(scope="module")
def trained(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a job that has trained them."""
    work = tmp_path_factory.mktemp("work")
    tokens = write_tokens(work / "tokens.safetensors")
    run_job(train_job(start, tokens, work), ALONE)
    return work


def test_budgets_of_every_kind_take_part_in_training_and_are_held(trained: Path) -> None:
    family = checkpoint.read_family(trained / "family")
    assert tuple(b.budget for b in family.budgets) == budgets()
    assert family.latency_table == TABLE
    assert family.budgets[0].subnet == full_subnet(CONFIG)
    for inner, outer in zip(family.budgets[1:], family.budgets, strict=False):
        assert is_nested(inner.subnet, outer.subnet)
        assert budget_cost(CONFIG, inner.budget, TABLE).of(inner.subnet) <= inner.budget.target
    losses: dict[str, list[float]] = {name: [] for name in ("l", "m", "s")}
    for step in metrics_of(trained).values():
        for name, measured in step["budgets"].items():
            losses[name].append(measured["router_loss"])
    assert all(losses.values()), "each budget has its part of the batches"
    assert set(losses["l"]) == {0}
    assert all(0 < loss < 2 for name in ("m", "s") for loss in losses[name])


def elastic(*arguments: str | Path) -> str:
    """What the command prints, when it ends well."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_slice_for_any_memory_fits_in_it(trained: Path, tmp_path: Path) -> None:
    family = checkpoint.read_family(trained / "family")
    memory = budgets()[1]
    assert memory.memory is not None
    counted = budget_cost(CONFIG, memory)
    large, small = (counted.of(budget.subnet) for budget in family.budgets[1:])
    for index, target in enumerate((large, (large + small) // 2, small)):
        out = tmp_path / str(index)
        said = elastic("slice", trained / "family", "--memory", f"{target}B@{SERVED}", "-o", out)
        model = checkpoint.open_checkpoint(out).config
        takes = MemoryCost(model=model, serving=memory.memory.serving, prefill=8).of(full_subnet(model))
        assert takes <= target
        assert f"{subnet_params(model, full_subnet(model)):,} parameters, " in said
        assert f"{counted.text(takes)} of " in said


def test_a_slice_for_any_latency_keeps_to_it_by_the_familys_table_or_another(trained: Path, tmp_path: Path) -> None:
    family = checkpoint.read_family(trained / "family")
    counted = budget_cost(CONFIG, budgets()[2], TABLE)
    target = (counted.of(family.budgets[0].subnet) + counted.of(family.budgets[2].subnet)) // 2
    said = elastic("slice", trained / "family", "--latency", f"{target / 1000}us", "-o", tmp_path / "own")
    assert re.search(r"parameters, \d layers, 0\.\d+ ms of 0\.\d+ ms$", said.strip())
    assert latency_of(tmp_path / "own", TABLE) <= target
    slower = replace(
        TABLE,
        fixed={hidden: 3 * time for hidden, time in TABLE.fixed.items()},
        layers=tuple(replace(layer, nanoseconds=3 * layer.nanoseconds) for layer in TABLE.layers),
    )
    write_table(tmp_path / "slower.json", slower)
    other = ("--profile", tmp_path / "slower.json", "-o", tmp_path / "other")
    elastic("slice", trained / "family", "--latency", f"{3 * target / 1000}us", *other)
    assert latency_of(tmp_path / "other", slower) <= 3 * target


def latency_of(directory: Path, table: LatencyTable) -> int:
    model = checkpoint.open_checkpoint(directory).config
    counted = LatencyCost(model=model, fixed_times=table.fixed, times=table.times)
    return counted.of(full_subnet(model))


def test_a_profile_of_a_family_is_a_table_of_its_choices(start: Path, tmp_path: Path) -> None:
    said = elastic("profile", start, "-o", tmp_path / "table.json", "--context", "16", "--dtype", "float32")
    table = read_table(tmp_path / "table.json")
    table.check(CONFIG, AXES.bind(CONFIG))
    assert table.serving == Serving(context=16, dtype="float32")
    for part in ("Mamba-2", "attention", "FFN", "embedding, head", "decoding step", "ctx=16"):
        assert part in said
