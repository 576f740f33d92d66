"""The steps around the stages take no more than planned: layer runs, measurements, disk."""

import dataclasses
from itertools import accumulate
from typing import Any

import pytest
import torch
from nano import NANO_12B

from elastic_core.budget import Budget
from elastic_core.depth import RemovalTerms, rank_layers
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.model import ElasticNemotronH, Layer
from elastic_core.planning.flops import forward_flops
from elastic_core.planning.machine import Accelerator, Locality
from elastic_core.planning.plan import RecipePlan, plan_recipe
from elastic_core.planning.steps import TEXT_BYTES, Around, data_tokens
from elastic_core.recipe import DataConfig, DataSource, Importance, Optimizer, Recipe, RouterSchedule, Stage, Teacher
from elastic_core.router import ElasticModel
from elastic_core.search import prior, search
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training.tokens import TokenBatch

H100 = Accelerator(memory=80 * 10**9, flops_per_second=989e12, mfu=0.4, dollars_per_hour=2.5)
TINY = ModelConfig(
    hybrid_override_pattern="M-M*-M-",
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    vocab_size=64,
    chunk_size=8,
)
AXES = Axes(hidden=(16, 8), ffn=(32, 16), mamba_heads=(4, 2), depth=(7, 5, 4))


def stage(name: str, **changes: Any) -> Stage:
    settings: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "steps": 3, "budgets": {"l": 1.0, "s": 1.0}}
    return Stage(name=name, optimizer=Optimizer(learning_rate=1e-3), **settings | changes)


def recipe(*stages: Stage, sources: tuple[DataSource, ...] = (DataSource(path="text"),), **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "family": "tiny",
        "teacher": Teacher(path="here", model=TINY),
        "data": DataConfig(sources=sources),
        "axes": AXES,
        "budgets": (Budget(name="l"), Budget(name="s", params=4000)),
        "stages": stages or (stage("one"), stage("two", router=RouterSchedule(mode="frozen"))),
        "importance": Importance(samples=6, sequence_length=16, depth_samples=4, batch_size=2),
    }
    return Recipe(**settings | changes)


def plan(planned: Recipe, **locality: bool) -> RecipePlan:
    return plan_recipe(planned, TINY, H100, [1], locality=Locality(**locality))


def around(planned: Recipe) -> Around:
    elastic = ElasticModel(TINY, planned.axes.bind(TINY), tuple(range(TINY.num_layers)))
    return Around(planned, elastic, {"l": full_subnet(TINY)})


def test_ranking_runs_no_more_layers_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, run_layer = [], Layer.forward

    def counted(layer: Layer, *inputs: Any) -> torch.Tensor:
        ran.append(layer)
        return run_layer(layer, *inputs)

    monkeypatch.setattr(Layer, "forward", counted)
    model = ElasticNemotronH(TINY)
    model.initialise(torch.Generator().manual_seed(0))
    tokens_BT = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(inputs_BT=tokens_BT, targets_BT=tokens_BT, packing=None, learned=32)
    rank_layers(TINY, 4, RemovalTerms(model, [batch, batch]).on, 2)
    settings, forward = recipe().importance, forward_flops(TINY, full_subnet(TINY), 16)
    of_layers = around(recipe()).ranking().flops - settings.samples * forward.total
    planned = of_layers / (settings.depth_samples * ((forward.total - forward.head) // TINY.num_layers))
    assert len(ran) / 2 <= planned  # two batches of two sequences are the four samples


def test_a_search_measures_no_more_than_planned() -> None:
    planned = recipe()
    elastic = around(planned).elastic
    asked: set[Subnet] = set()

    def loss(subnet: Subnet) -> float:
        asked.add(subnet)
        return float(sum(subnet.ffn) + subnet.hidden)

    scores = prior(elastic, loss)
    search(elastic, planned.budgets, loss, [[scores], [scores]], measurements=20)
    settings = dataclasses.replace(planned.shapes, measurements=20, samples=1, sequence_length=16)
    step = around(dataclasses.replace(planned, shapes=settings)).shapes("shapes")
    forward = forward_flops(TINY, full_subnet(TINY), 16)
    assert len(asked) <= step.flops / (forward.total + forward.head)


def test_steps_come_in_the_order_of_the_pipeline() -> None:
    names = [step.name for step in plan(recipe()).steps]
    before = ["teacher", "data", "rotation", "ranking", "reorder", "shapes", "orders"]
    assert names == [*before, "one", "shapes after one", "two", "slices", "evaluation", "publish"]


def test_a_comparison_of_orders_that_is_turned_off_is_not_planned() -> None:
    off = dataclasses.replace(recipe().importance, comparison_tokens=0)
    names = [[step.name for step in plan(recipe(**changes)).steps] for changes in ({}, {"importance": off})]
    assert set(names[0]) - set(names[1]) == {"orders"}


def test_the_most_disk_is_that_of_the_fullest_step() -> None:
    planned = plan(recipe())
    left = list(accumulate(step.disk for step in planned.steps))
    full = [end + step.scratch for end, step in zip(left, planned.steps, strict=True)]
    assert planned.disk == (left[-1], max(full))
    assert planned.disk[1] > planned.disk[0]


def test_a_teacher_that_lies_here_is_not_copied() -> None:
    elsewhere, here = plan(recipe()), plan(recipe(), has_teacher=True)
    teacher, copied = here.steps[0], elsewhere.steps[0]
    assert (teacher.disk, teacher.moved) == (0, 0) and copied.disk == copied.moved > 0
    assert elsewhere.disk[0] - here.disk[0] == copied.disk


@pytest.mark.parametrize("storage", ["materialised", "nested"])
def test_a_store_that_lies_here_keeps_what_is_published(storage: str) -> None:
    elsewhere, here = plan(recipe(storage=storage)), plan(recipe(storage=storage), has_store=True)
    assert here.disk[0] - elsewhere.disk[0] == here.steps[-1].disk == here.steps[-1].moved > 0
    assert here.disk[1] >= here.disk[0] + here.steps[-1].scratch


def test_files_of_s3_lie_here_while_they_are_read() -> None:
    sources = (DataSource(path="s3://b/a", max_tokens=100), DataSource(path="text", max_tokens=23))
    found = {step.name: step for step in plan(recipe(sources=sources)).steps}
    assert found["data"].scratch == 100 * TEXT_BYTES
    open_ended = recipe(sources=(DataSource(path="s3://b/a"), DataSource(path="text", max_tokens=23)))
    (data,) = (step for step in plan(open_ended).steps if step.name == "data")
    assert data.scratch == data_tokens(open_ended) * TEXT_BYTES
    (data,) = (step for step in plan(recipe()).steps if step.name == "data")
    assert data.scratch == 0


def test_nested_storage_publishes_the_largest_size_once() -> None:
    whole, nested = (plan(recipe(storage=storage)).steps[-1] for storage in ("materialised", "nested"))
    weights = {step.name: step.disk for step in plan(recipe()).steps}
    assert nested.moved == weights["reorder"]
    assert whole.moved == weights["reorder"] + weights["slices"]


def test_data_is_what_its_sources_are_limited_to_or_what_a_stage_reads() -> None:
    limited = tuple(DataSource(path="text", max_tokens=tokens) for tokens in (100, 23))
    assert data_tokens(recipe(sources=limited)) == 123
    longest = stage("long", steps=1000)
    open_ended = recipe(longest, sources=(*limited, DataSource(path="more")))
    assert data_tokens(open_ended) * (1 - open_ended.data.heldout_fraction) == pytest.approx(longest.tokens, abs=1)
    large = DataSource(path="text", max_tokens=10 * longest.tokens)
    assert data_tokens(recipe(longest, sources=(large, DataSource(path="more")))) == 10 * longest.tokens


def test_a_recipe_without_stages_of_its_own_size_costs_what_its_steps_cost() -> None:
    planned = plan(recipe())
    assert sum(map(planned.gpu_hours, planned.around)) < sum(map(planned.gpu_hours, planned.steps))
    of_stages = {planned_stage.stage.name: planned_stage.flops.total for planned_stage in planned.stages}
    assert {step.name: step.flops for step in planned.steps if step.name in of_stages} == of_stages


def test_the_papers_family_is_ranked_and_measured_for_a_sliver_of_its_training() -> None:
    planned = plan_recipe(
        dataclasses.replace(
            recipe(),
            teacher=Teacher(path="here", model=NANO_12B),
            axes=Axes(hidden=(5120, 4480), depth=(62, 54)),
            budgets=(Budget(name="l"), Budget(name="s", params=10_000_000_000)),
            stages=(stage("one", batch_size=1536, sequence_length=8192, steps=5166),),
            importance=Importance(),
        ),
        NANO_12B,
        H100,
        [64],
    )
    (of_stage,) = (step for step in planned.steps if step.name == "one")
    assert 0 < sum(map(planned.gpu_hours, planned.around)) < 0.01 * planned.gpu_hours(of_stage)
