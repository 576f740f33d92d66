"""What a recipe will take, before it is run: sizes, tokens, FLOPs, memory, traffic, disk and money, from its numbers.

Nothing is downloaded and no weight is made. The router has not chosen yet, so that each budget is planned at an
example: a subnet within it that uses nearly all of it, with the first layers kept.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_core.budget import Budget, Dtype
from elastic_core.cost import DTYPE_BYTES, Cost, LatencyCost, LatencyTable, active_params, budget_cost, subnet_params
from elastic_core.geometry import GROUPS, ModelConfig
from elastic_core.planning.judged import BenchmarkPlan, plan_benchmarks
from elastic_core.planning.machine import ELSEWHERE, Accelerator, Locality
from elastic_core.planning.stages import StagePlan, StageWork
from elastic_core.planning.steps import Around, StepPlan
from elastic_core.recipe import Distillation, Recipe
from elastic_core.resolve import resolve_target
from elastic_core.router import ElasticModel, Router
from elastic_core.subnet import Subnet, full_subnet, smallest_subnet
from elastic_core.training.curriculum import generator

# Smaller choices are looked for in these steps, or in those that the model's groups allow.
WIDTH_STEP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPlan:
    """A budget and an example of a subnet within it; `cost` and `target` are in what the budget counts.

    `active_params` are those that a token passes through.
    Where no subnet of the axes is within it (`feasible` is False), the example is the smallest there is, and `choices`
    has the axes that one smaller choice would open: the largest choice that does.
    """

    budget: Budget
    feasible: bool
    target: int | None
    cost: int
    subnet: Subnet
    params: int
    active_params: int
    bytes: int
    choices: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipePlan:
    """A recipe's plan; `least_params` are those of the smallest subnet that its axes hold.

    `steps` are the steps of the pipeline in their order, the stages among them, which `stages` has on every mesh.
    `benchmarks` are planned apart, and are in no sum: how long answers are is known only when they are there.
    """

    family: str
    dtype: Dtype
    model: ModelConfig
    teacher_params: int
    teacher_active_params: int
    least_params: int
    accelerator: Accelerator
    gpus: tuple[int, ...]
    budgets: tuple[BudgetPlan, ...]
    stages: tuple[StagePlan, ...]
    steps: tuple[StepPlan, ...]
    benchmarks: tuple[BenchmarkPlan, ...]

    @property
    def around(self) -> tuple[StepPlan, ...]:
        """The steps that are no training stages."""
        names = {planned.stage.name for planned in self.stages}
        return tuple(step for step in self.steps if step.name not in names)

    @property
    def disk(self) -> tuple[int, int]:
        """Bytes on disk at the end, and at the most."""
        kept = most = 0
        for step in self.steps:
            most = max(most, kept + step.disk + step.scratch)
            kept += step.disk
        return kept, most

    def gpu_hours(self, step: StepPlan) -> float:
        """Hours of one GPU that a step takes."""
        full = self.teacher_params * DTYPE_BYTES[self.dtype]
        return self.accelerator.hours(step.flops) + self.accelerator.decoding_hours(step.decoded, full)

    def judging_hours(self, benchmark: BenchmarkPlan) -> float:
        """Hours of one GPU that a benchmark takes at most, where the number of its problems is known."""
        return self.accelerator.decoding_hours(benchmark.tokens_of_a_model or 0, benchmark.weight_bytes)

    @property
    def all_gpu_hours(self) -> float:
        """Of all steps."""
        return sum(map(self.gpu_hours, self.steps))

    def dollars(self, step: StepPlan) -> float:
        gpu = self.accelerator
        return gpu.dollars_per_hour * self.gpu_hours(step) + gpu.dollars_per_core_hour * step.core_hours

    @property
    def feasible(self) -> bool:
        return all(budget.feasible for budget in self.budgets)

    def require_budgets(self) -> None:
        """ValueError, naming them, where budgets cannot be met."""
        if missed := [planned.budget.name for planned in self.budgets if not planned.feasible]:
            raise ValueError(
                f"{' and '.join(missed)} cannot be met by these axes; `elastic plan` says which choices would make room"
            )

    @property
    def fitting(self) -> tuple[int, ...]:
        """The numbers of GPUs, of those asked for, on which every stage fits."""
        unfit = {mesh.gpus for stage in self.stages for mesh in stage.meshes if not mesh.fits}
        return tuple(gpus for gpus in self.gpus if gpus not in unfit)


def plan_recipe(
    recipe: Recipe,
    model: ModelConfig,
    accelerator: Accelerator,
    gpus: Sequence[int],
    latency_table: LatencyTable | None = None,
    locality: Locality = ELSEWHERE,
    problems: Mapping[str, int] | None = None,
) -> RecipePlan:
    """The plan of `recipe` for a teacher of the geometry `model`, on each number of GPUs.

    `locality` says what lies where the run works: a teacher there is not copied, a store there takes disk. `problems`
    are those of benchmarks, by name, where they have been counted.

    ValueError for axes or a budget that such a teacher cannot have.
    """
    check_budgets(recipe.budgets, model, latency_table)
    elastic = ElasticModel(model, recipe.axes.bind(model), tuple(range(model.num_layers)), latency_table)
    router = Router(elastic, len(recipe.budgets), recipe.router.hidden_size)
    router.initialise(generator(recipe.seed, "router"))
    budgets = _plan_budgets(router, recipe)
    subnets = {plan.budget.name: plan.subnet for plan in budgets}
    router_params = sum(weight.numel() for weight in router.parameters())
    work = [
        StageWork(model, stage, recipe.distillation, subnets, router_params, recipe.dtype, accelerator)
        for stage in recipe.stages
    ]
    if recipe.teacher.pretrain is not None:
        alone = Distillation(kl_weight=0.0, ce_weight=1.0)
        stage = recipe.teacher.pretrain.stage()
        full = dict.fromkeys(stage.budgets, full_subnet(model))
        work.insert(0, StageWork(model, stage, alone, full, 0, recipe.dtype, accelerator))
    planned = tuple(stage.plan(gpus) for stage in work)
    around = Around(recipe, elastic, subnets, locality)
    return RecipePlan(
        family=recipe.family,
        dtype=recipe.dtype,
        model=model,
        teacher_params=subnet_params(model, full_subnet(model)),
        teacher_active_params=active_params(model, full_subnet(model)),
        least_params=subnet_params(model, smallest_subnet(model, elastic.axes, elastic.layer_ranking)),
        accelerator=accelerator,
        gpus=tuple(gpus),
        budgets=budgets,
        stages=planned,
        steps=tuple(_steps(around, planned, router_params)),
        benchmarks=tuple(plan_benchmarks(recipe, around.teacher_bytes, around.slice_bytes, problems or {})),
    )


def _steps(around: Around, stages: Sequence[StagePlan], router_params: int) -> Iterator[StepPlan]:
    """All steps in their order; a recipe that trains its teacher does so once there is data."""

    def stage_step(planned: StagePlan) -> StepPlan:
        return StepPlan(
            name=planned.stage.name,
            flops=planned.flops.total,
            disk=around.teacher_bytes,
            scratch=around.checkpoints(router_params),
        )

    pretrained = stages[: len(stages) - len(around.recipe.stages)]
    for step in around.before():
        yield step
        if step.name == "data":
            yield from map(stage_step, pretrained)
    for planned in stages[len(pretrained) :]:
        yield stage_step(planned)
        yield from around.after_stage(planned.stage)
    yield from around.after()


# Budgets


def check_budgets(budgets: Sequence[Budget], model: ModelConfig, latency_table: LatencyTable | None) -> None:
    """ValueError for a budget of more than the teacher takes, and for a latency that no table gives."""
    for budget in budgets:
        counted = budget_cost(model, budget, latency_table)
        full = counted.of(full_subnet(model))
        if budget.target is not None and budget.target > full:
            raise ValueError(
                f"budget {budget.name}: {counted.text(budget.target)} is above the teacher's {counted.text(full)}; "
                "lower it, or give no target for the full model"
            )


def _plan_budgets(router: Router, recipe: Recipe) -> tuple[BudgetPlan, ...]:
    """Examples that nest in one another, as the subnets that the router will choose do."""
    elastic = router.elastic
    outer = full_subnet(elastic.config)
    smallest = smallest_subnet(elastic.config, elastic.axes, elastic.layer_ranking)
    plans = []
    for budget in recipe.budgets:
        counted, target = elastic.cost_of(budget), budget.target
        feasible = True
        if target is not None and target < counted.of(outer):
            try:
                outer = resolve_target(router, [outer], budget)
            except ValueError:  # no subnet is within the budget
                feasible = False
        subnet = outer if feasible else smallest
        params = subnet_params(elastic.config, subnet)
        plans.append(
            BudgetPlan(
                budget=budget,
                feasible=feasible,
                target=target,
                cost=counted.of(subnet),
                subnet=subnet,
                params=params,
                active_params=active_params(elastic.config, subnet),
                bytes=params * DTYPE_BYTES[recipe.dtype],
                choices=dict(_opening_choices(elastic, counted, smallest, target)) if target and not feasible else {},
            )
        )
    return tuple(plans)


def _opening_choices(elastic: ElasticModel, counted: Cost, smallest: Subnet, target: int) -> Iterator[tuple[str, int]]:
    """Of each width, the largest choice with which the smallest subnet is within the target, if there is one.

    None for a latency: its table has no other choices than the axes.
    """
    config = elastic.config
    if isinstance(counted, LatencyCost):
        return
    for axis in ("hidden", *elastic.axes.widths):
        step = config.groups(axis) if axis in GROUPS else WIDTH_STEP
        least = elastic.axes.choices(axis)[-1]
        size = getattr(smallest, axis)
        for choice in range((least - 1) // step * step, 0, -step):
            narrower: dict[str, Any] = {axis: (choice,) * len(size) if isinstance(size, tuple) else choice}
            if counted.of(dataclasses.replace(smallest, **narrower)) <= target:
                yield axis, choice
                break
