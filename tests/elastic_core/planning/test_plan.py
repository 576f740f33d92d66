"""Laws of the plan: its examples keep to their budgets, its sums are those of the steps, what it advises fits."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
from latency import random_table
from nano import NANO_12B

from elastic_core.budget import Budget, LatencyTarget
from elastic_core.cost import budget_cost, subnet_params
from elastic_core.files.checkpoint import tensor_shapes
from elastic_core.geometry import Axes
from elastic_core.planning.flops import backward_flops, forward_flops, recomputed_flops
from elastic_core.planning.machine import USABLE_SHARE, Accelerator
from elastic_core.planning.memory import MicroStep
from elastic_core.planning.plan import BudgetPlan, RecipePlan, plan_recipe
from elastic_core.planning.stages import MeshPlan
from elastic_core.planning.traffic import micro_step_traffic
from elastic_core.recipe import DataConfig, DataSource, Distillation, Pretraining, Recipe, Stage, Teacher
from elastic_core.resolve import USED_SHARE
from elastic_core.schema import build
from elastic_core.subnet import full_subnet, is_nested
from elastic_core.training.curriculum import place_budgets

H100 = Accelerator(memory=80 * 10**9, flops_per_second=989e12, mfu=0.4, dollars_per_hour=2.5)
AXES = Axes(
    hidden=(5120, 4480, 4096, 3840, 3584),
    ffn=(20480, 17920, 15680, 12288, 10240),
    mamba_heads=(128, 112, 96),
    attention_heads=(40, 32),
    depth=(62, 60, 58, 56, 54),
)
SHARES = {"12b": 0.5, "9b": 0.3, "6b": 0.2}
STAGE: dict[str, Any] = {
    "name": "long",
    "sequence_length": 49152,
    "batch_size": 120,
    "steps": 7,
    "shares": "fixed",
    "optimizer": {"learning_rate": 1e-4},
}
ONE_SEQUENCE: dict[str, Any] = {
    "masked": False,
    "sequences": 1,
    "sequence_length": 49152,
    "recompute": True,
    "distillation": Distillation(),
    "dtype": "bfloat16",
}
TASKS = {
    "frozen": Distillation(),
    "trainable": Distillation(teacher="trainable", ce_weight=0.5),
    "none": Distillation(kl_weight=0.0, ce_weight=1.0),
}
BUDGETS = (Budget(name="12b"), Budget(name="9b", params=8_900_000_000), Budget(name="6b", params=6_200_000_000))


def recipe(
    *, budgets: tuple[Budget, ...] = BUDGETS, axes: Axes = AXES, shares: dict[str, float] = SHARES, **stage: Any
) -> Recipe:
    return Recipe(
        family="nano",
        teacher=Teacher(path="here", model=NANO_12B),
        data=DataConfig(sources=(DataSource(path="text"),)),
        axes=axes,
        budgets=budgets,
        stages=(build(Stage, STAGE | {"budgets": shares} | stage),),
    )


def plan(*gpus: int, accelerator: Accelerator = H100, **changes: Any) -> RecipePlan:
    return plan_recipe(recipe(**changes), NANO_12B, accelerator, gpus or (8,))


def only_mesh(planned: RecipePlan) -> MeshPlan:
    ((mesh,),) = [stage.meshes for stage in planned.stages]
    return mesh


# Budgets


def test_the_full_budget_is_the_teacher_to_the_last_parameter() -> None:
    assert plan().teacher_params == plan().budgets[0].params == 12_310_001_152


@pytest.mark.parametrize(
    "budgets",
    [
        BUDGETS,
        (*BUDGETS[:2], build(Budget, {"name": "6b", "memory": "14GiB@ctx=32768"})),
        (BUDGETS[0], build(Budget, {"name": "9b", "memory": "20GiB@ctx=131072"}), BUDGETS[2]),
        tuple(
            Budget(name=name, params=size) for name, size in zip(SHARES, (11_111_111_111, 10**10, 5**14), strict=True)
        ),
    ],
    ids=["params", "one memory", "another memory", "odd"],
)
def test_examples_use_their_budgets_and_nest(budgets: tuple[Budget, ...]) -> None:
    planned = plan(budgets=budgets).budgets
    for budget in planned:
        counted = budget_cost(NANO_12B, budget.budget)
        assert budget.feasible
        assert budget.cost == counted.of(budget.subnet)
        assert budget.target is None or USED_SHARE * budget.target <= budget.cost <= budget.target
        assert budget.params == subnet_params(NANO_12B, budget.subnet) == budget.bytes / 2
    assert all(is_nested(small.subnet, large.subnet) for large, small in pairwise(planned))


@pytest.mark.parametrize("monotonic", [True, False], ids=["more work takes longer", "noise"])
def test_a_latency_budget_is_planned_by_the_table(monotonic: bool) -> None:
    table = random_table(NANO_12B, AXES.bind(NANO_12B), monotonic=monotonic)

    def latency_plan(nanoseconds: int) -> BudgetPlan:
        quick = Budget(name="6b", latency=LatencyTarget(seconds=nanoseconds / 1e9))
        changed = dataclasses.replace(recipe(), budgets=(*BUDGETS[:2], quick), latency_table="table.json")
        return plan_recipe(changed, NANO_12B, H100, [8], table).budgets[-1]

    counted = budget_cost(NANO_12B, Budget(name="6b", latency=LatencyTarget(seconds=1.0)), table)
    target = 9 * min(counted.of(full_subnet(NANO_12B)), counted.of(plan().budgets[1].subnet)) // 10
    below, never = latency_plan(target), latency_plan(1)
    assert below.feasible
    assert USED_SHARE * target <= below.cost <= target
    assert not never.feasible
    assert never.choices == {}


def test_a_budget_that_cannot_be_met_names_the_largest_choices_that_would_do() -> None:
    target = 4_500_000_000
    budgets = (*BUDGETS[:2], Budget(name="6b", params=target))
    impossible = plan(budgets=budgets).budgets[-1]
    assert not impossible.feasible
    assert impossible.cost - target == plan().least_params - target > 0
    assert set(impossible.choices) == {"hidden", "ffn", "mamba_heads"}  # fewer query heads would save too little

    def feasible(axis: str, choice: int) -> bool:
        wider = dataclasses.replace(AXES, **{axis: (*AXES.choices(axis), choice)})
        return plan(budgets=budgets, axes=wider).budgets[-1].feasible

    for axis, choice in impossible.choices.items():
        step = NANO_12B.n_groups if axis == "mamba_heads" else 64
        assert feasible(axis, choice)
        assert choice + step == AXES.choices(axis)[-1] or not feasible(axis, choice + step)


# Work


@pytest.mark.parametrize("mode", ["soft", "frozen"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("teacher", ["frozen", "trainable", "none"])
def test_flops_are_the_sum_over_every_micro_step(mode: str, recompute: bool, teacher: str) -> None:
    changed = dataclasses.replace(recipe(recompute=recompute, router={"mode": mode}), distillation=TASKS[teacher])
    planned = plan_recipe(changed, NANO_12B, H100, [1])
    subnets = {budget.budget.name: budget.subnet for budget in planned.budgets}
    stage, full, length = changed.stages[0], full_subnet(NANO_12B), 49152
    student = taught = again = 0
    for step in range(stage.steps):
        for name in place_budgets(stage, stage.budgets, 0, step, stage.batch_size):
            subnet = subnets[name]
            student += (forward_flops(NANO_12B, subnet, length) + backward_flops(NANO_12B, subnet, length)).total
            if teacher == "frozen" or (teacher == "trainable" and subnet != full):
                taught += forward_flops(NANO_12B, full, length).total
            if recompute:
                masked = mode == "soft" and subnet != full
                again += recomputed_flops(NANO_12B, subnet, length, masked=masked).total
    found = planned.stages[0].flops
    # The shares of the budgets, 0.5, 0.3 and 0.2, are not exact in binary.
    assert (found.student, found.teacher, found.recomputed) == pytest.approx((student, taught, again), rel=1e-12)


def test_a_router_that_learns_may_cost_as_much_as_the_full_model_and_a_frozen_one_costs_what_it_does() -> None:
    soft, frozen = (plan(router={"mode": mode}).stages[0] for mode in ("soft", "frozen"))
    assert frozen.flops == frozen.flops_at_most
    assert soft.flops_at_most.student > soft.flops.student == frozen.flops.student
    full = forward_flops(NANO_12B, full_subnet(NANO_12B), 49152) + backward_flops(
        NANO_12B, full_subnet(NANO_12B), 49152
    )
    assert soft.flops_at_most.student == soft.sequences * full.total


def test_time_and_money_follow_from_flops_and_utilisation() -> None:
    planned = plan(1, 8)
    one, eight = planned.stages[0].meshes
    assert one.gpu_hours == eight.gpu_hours == one.hours == 8 * eight.hours
    assert one.gpu_hours * 3600 * 0.4 * 989e12 == pytest.approx(planned.stages[0].flops.total)
    assert one.dollars == 2.5 * one.gpu_hours
    halved = plan(accelerator=dataclasses.replace(H100, mfu=0.2))
    assert only_mesh(halved).gpu_hours == pytest.approx(2 * one.gpu_hours)


# Memory


def test_the_12b_fits_in_stage_2_with_recomputation_on_many_gpus_and_not_on_few() -> None:
    assert plan(1, 8, 64, batch_size=512, recompute=True).fitting == (64,)
    assert plan(1, 8, 64, batch_size=512).fitting == ()


def test_a_mesh_fits_where_its_memory_is_there_and_its_batch_divides() -> None:
    mesh = only_mesh(plan(8, sequence_length=8192, recompute=True))
    for memory, fits in ((mesh.memory.total, True), (mesh.memory.total - 1, False)):
        gpu = dataclasses.replace(H100, memory=math.ceil(memory / USABLE_SHARE))
        assert gpu.usable == memory
        assert only_mesh(plan(8, accelerator=gpu, sequence_length=8192, recompute=True)).fits == fits
    undivided = only_mesh(plan(7, sequence_length=8192, recompute=True))
    assert undivided.micro_steps is None
    assert not undivided.fits


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize(
    "stage",
    [
        {"sequence_length": 8192},
        {"sequence_length": 8192, "micro_batch_size": 8, "recompute": True},
        {"sequence_length": 49152},
        {"sequence_length": 49152, "batch_size": 512, "recompute": True},
    ],
    ids=["short", "micro-batch", "long", "recomputed"],
)
def test_every_change_that_is_advised_fits_and_is_the_least(gpus: int, stage: dict[str, Any]) -> None:
    mesh = only_mesh(plan(gpus, **stage))
    assert not mesh.fits
    assert mesh.changes
    for change in mesh.changes:
        changed = {
            name: getattr(change, name) for name in ("recompute", "offload", "micro_batch_size", "sequence_length")
        }
        tried = only_mesh(plan(change.gpus, **stage | changed))
        assert tried.fits
        assert tried.memory.total == change.memory
        if change.gpus != gpus:
            sequences = stage.get("batch_size", STAGE["batch_size"]) // change.micro_batch_size
            fewer = [n for n in range(1, change.gpus) if sequences % n == 0]
            assert not any(only_mesh(plan(n, **stage | changed)).fits for n in fewer)


def test_a_stage_that_trains_a_router_is_planned_for_masks_over_the_whole_model() -> None:
    soft, frozen = (
        only_mesh(plan(shares={"6b": 1.0}, router={"mode": mode})).memory.activations for mode in ("soft", "frozen")
    )
    everything = only_mesh(plan(router={"mode": "soft"})).memory.activations
    assert soft == everything > only_mesh(plan(router={"mode": "frozen"})).memory.activations > frozen


def test_a_teacher_that_is_trained_first_is_the_first_stage_and_has_no_teacher() -> None:
    pretraining = build(
        Pretraining,
        {
            "model": dataclasses.asdict(NANO_12B),
            "sequence_length": 8192,
            "batch_size": 64,
            "micro_batch_size": 2,
            "steps": 10,
            "optimizer": {"learning_rate": 1e-3},
        },
    )
    first = plan_recipe(
        dataclasses.replace(recipe(), teacher=Teacher(pretrain=pretraining)), NANO_12B, H100, [8]
    ).stages[0]
    assert (first.stage.name, first.tokens, first.meshes[0].micro_steps) == ("pretrain", 10 * 64 * 8192, 4)
    assert first.flops.teacher == first.meshes[0].memory.teacher == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 0}, "memory=0 must be greater than 0"),
        ({"flops_per_second": float("nan")}, "flops_per_second=nan must be greater than 0"),
        ({"mfu": 40}, "mfu=40 must be above 0 and at most 1"),
        ({"dollars_per_hour": -1.0}, "dollars_per_hour=-1.0 must be at least 0"),
    ],
)
def test_a_gpu_that_cannot_be_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(H100, **change)


# Traffic and margins


def test_what_leaves_a_gpu_is_what_its_micro_steps_gather_and_reduce() -> None:
    planned = plan(8, 64, router={"mode": "frozen"}, recompute=True)
    (stage,) = planned.stages
    for mesh in stage.meshes:
        assert mesh.sent == pytest.approx(micro_step_sent(planned, mesh.gpus) * stage.sequences / mesh.gpus)


def micro_step_sent(planned: RecipePlan, shards: int) -> float:
    """What one GPU sends in a micro-step, on average over the budgets."""
    steps = [MicroStep(**ONE_SEQUENCE, subnet=budget.subnet) for budget in planned.budgets]
    return sum(
        share * micro_step_traffic(NANO_12B, step, shards).sent(shards)
        for share, step in zip(SHARES.values(), steps, strict=True)
    )


def test_one_gpu_sends_nothing_and_one_host_nothing_outside() -> None:
    alone, host, hosts = plan(1, 8, 24, recompute=True).stages[0].meshes
    assert (alone.sent, alone.between_hosts, host.between_hosts) == (0, 0, 0)
    assert host.sent > 0
    assert hosts.between_hosts == 3 * hosts.sent


def test_hosts_with_a_copy_each_need_the_memory_of_one_host_and_send_gradients_alone_once_a_step() -> None:
    settings: dict[str, Any] = {"router": {"mode": "frozen"}, "recompute": True, "offload": True}
    (full,) = plan(8, 24, **settings).stages
    planned = plan(8, 24, sharding="hybrid", **settings)
    host, hosts = planned.stages[0].meshes
    assert dataclasses.replace(host, between_copies=None) == full.meshes[0]
    assert hosts.memory == host.memory
    assert hosts.between_hosts == full.meshes[1].between_copies < full.meshes[1].between_hosts
    gradients = 4 * sum(math.prod(shape) for shape in tensor_shapes(NANO_12B).values() if len(shape) == 2)
    # Three hosts in a ring: two thirds of every part go round it twice.
    assert hosts.between_hosts == pytest.approx(STAGE["steps"] * 3 * 2 * gradients * 2 / 3)
    inside = micro_step_sent(planned, 8) * STAGE["batch_size"] / 24
    assert hosts.sent == pytest.approx(STAGE["steps"] * (inside + 2 * gradients / 8 * 2 / 3))


def test_a_copy_on_every_host_is_not_advised_where_it_does_not_fit() -> None:
    tight = dataclasses.replace(H100, memory=plan(24, recompute=True).stages[0].meshes[0].memory.total * 10 // 9)
    mesh = plan(24, recompute=True, accelerator=tight).stages[0].meshes[0]
    assert mesh.fits and mesh.between_copies is None
    (mesh,) = plan(24, recompute=True, sharding="hybrid", accelerator=tight).stages[0].meshes
    assert not mesh.fits and "full" in {change.sharding for change in mesh.changes}


def test_a_stage_takes_as_long_as_it_computes_or_sends_and_a_larger_micro_batch_sends_less() -> None:
    fast = dataclasses.replace(H100, memory=10**12)
    base = plan(8, 24, recompute=True, accelerator=fast).stages[0]
    for mesh, hosts in zip(base.meshes, (1, 3), strict=True):
        assert mesh.sending == pytest.approx(max(mesh.sent / 4.5e11, mesh.between_hosts / hosts / 4e11) / 3600)
        assert mesh.hours == mesh.computing > mesh.sending and mesh.larger is None
    _, hosts = base.meshes
    slow = dataclasses.replace(fast, network=hosts.between_hosts / 3 / (2 * 3600 * hosts.computing))
    inside, between = plan(8, 24, recompute=True, accelerator=slow).stages[0].meshes
    assert inside == base.meshes[0]
    assert between.hours == between.sending == pytest.approx(2 * between.computing)
    assert between.gpu_hours == 24 * between.hours and between.dollars == 2.5 * between.gpu_hours
    assert between.larger is not None and between.larger.micro_batch_size == 5
    sparing = only_mesh(plan(24, recompute=True, accelerator=slow, micro_batch_size=5))
    assert sparing.larger is None and sparing.sending == pytest.approx(between.sending / 5)
    assert sparing.memory.total == between.larger.memory


def test_a_budget_is_rare_where_some_step_has_no_row_of_it() -> None:
    for mesh in plan(1, 24, 40, 60, 120, recompute=True).stages[0].meshes:
        stage = build(Stage, STAGE | {"budgets": SHARES})
        placed = [place_budgets(stage, SHARES, 0, step, stage.batch_size // mesh.gpus) for step in range(50)]
        assert {*mesh.rare} == {name for name in SHARES if any(name not in budgets for budgets in placed)}


def test_a_gpu_holds_its_share_of_the_experts_and_the_router_that_chooses_them_whole() -> None:
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}
    pattern = NANO_12B.hybrid_override_pattern.replace("-", "E", 1)
    mixture = dataclasses.replace(
        NANO_12B, hybrid_override_pattern=pattern, moe_shared_expert_intermediate_size=1024, **experts
    )
    (stage,) = plan_recipe(recipe(recompute=True, offload=True), mixture, H100, (1, 8)).stages
    alone, several = (mesh.memory.gradients // 4 for mesh in stage.meshes)
    params, chooses = subnet_params(mixture, full_subnet(mixture)), 8 * mixture.hidden_size
    assert several == math.ceil((params - chooses) / 8) + chooses + (alone - params), "float32, and the size router"


def test_a_fit_with_little_to_spare_is_tight() -> None:
    needed = only_mesh(plan(8, recompute=True)).memory.total
    fits = {
        share: only_mesh(plan(8, accelerator=dataclasses.replace(H100, memory=int(needed / share)), recompute=True))
        for share in (0.99 * USABLE_SHARE, 0.96 * USABLE_SHARE)
    }
    tight, loose = fits.values()
    assert (tight.fits, tight.tight) == (True, True)
    assert (loose.fits, loose.tight) == (True, False)
    assert tight.margin == pytest.approx(0.01, abs=1e-6)
