"""What a recipe will take, before it is run: sizes, tokens, FLOPs, memory and money, from its numbers alone.

Nothing is downloaded and no weight is made. The router has not chosen yet, so that each budget is planned at an
example: a subnet within it that uses nearly all of it, with the first layers kept.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from elastic_core.budget import Budget, Dtype
from elastic_core.cost import DTYPE_BYTES, Cost, LatencyCost, LatencyTable, budget_cost, subnet_params
from elastic_core.geometry import GROUPS, Axes, ModelConfig
from elastic_core.planning.flops import backward_flops, forward_flops, recomputed_flops
from elastic_core.planning.memory import Memory, MicroStep, activation_bytes, training_memory
from elastic_core.recipe import Distillation, Recipe, Stage
from elastic_core.resolve import resolve_target
from elastic_core.router import ElasticModel, Router
from elastic_core.subnet import Subnet, full_subnet, smallest_subnet
from elastic_core.training.curriculum import Need, generator

# The rest of a GPU's memory is for CUDA, NCCL's buffers and what the allocator cannot use.
USABLE_SHARE = 0.94

# Smaller choices are looked for in these steps, or in those that the model's groups allow.
WIDTH_STEP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """A GPU: bytes of memory, FLOP/s at its peak, the share of them that training reaches, dollars an hour."""

    memory: int
    flops_per_second: float
    utilisation: float
    dollars_per_hour: float

    def __post_init__(self) -> None:
        for name in ("memory", "flops_per_second"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation={self.utilisation} must be above 0 and at most 1")
        if not (math.isfinite(self.dollars_per_hour) and self.dollars_per_hour >= 0):
            raise ValueError(f"dollars_per_hour={self.dollars_per_hour} must be at least 0")

    @property
    def usable(self) -> int:
        """Bytes that can be planned with."""
        return int(USABLE_SHARE * self.memory)

    def hours(self, flops: float) -> float:
        """Hours of one GPU."""
        return flops / (self.flops_per_second * self.utilisation) / 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPlan:
    """A budget and an example of a subnet within it; `cost` and `target` are in what the budget counts.

    Where no subnet of the axes is within it (`feasible` is False), the example is the smallest there is, and `choices`
    has the axes that one smaller choice would open: the largest choice that does.
    """

    budget: Budget
    feasible: bool
    target: int | None
    cost: int
    subnet: Subnet
    params: int
    bytes: int
    choices: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFlops:
    """Floating-point operations of a stage: the student's forward and backward passes, the teacher's forward passes,
    and the student's forward passes that recomputation adds."""

    student: int
    teacher: int
    recomputed: int

    @property
    def total(self) -> int:
        return self.student + self.teacher + self.recomputed


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Settings of a stage, or the number of GPUs, that would make it fit, and the bytes on a GPU then."""

    gpus: int
    recompute: bool
    micro_batch_size: int
    sequence_length: int
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """A stage on so many GPUs. `micro_steps` is None where its batch does not divide over them.

    `changes` are single changes that make it fit where it does not, or one of several settings where no single one
    does; none, if nothing does.
    """

    gpus: int
    micro_steps: int | None
    memory: Memory
    fits: bool
    gpu_hours: float
    hours: float
    dollars: float
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage on every mesh. `flops_at_most` is for a router that always samples the full model.

    `sequence_bytes` is what one sequence's activations take: all saved, and recomputed. No sequence is divided between
    GPUs.
    """

    stage: Stage
    sequences: int
    tokens: int
    flops: StageFlops
    flops_at_most: StageFlops
    sequence_bytes: tuple[int, int]
    meshes: tuple[MeshPlan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipePlan:
    """A recipe's plan; `least_params` are those of the smallest subnet that its axes hold."""

    family: str
    model: ModelConfig
    teacher_params: int
    least_params: int
    accelerator: Accelerator
    gpus: tuple[int, ...]
    budgets: tuple[BudgetPlan, ...]
    stages: tuple[StagePlan, ...]

    @property
    def feasible(self) -> bool:
        return all(budget.feasible for budget in self.budgets)

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
) -> RecipePlan:
    """The plan of `recipe` for a teacher of the geometry `model`, on each number of GPUs.

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
        _Work(model, stage, recipe.distillation, subnets, router_params, recipe.dtype, accelerator)
        for stage in recipe.stages
    ]
    if recipe.teacher.pretrain is not None:
        alone = Distillation(kl_weight=0.0, ce_weight=1.0)
        stage = recipe.teacher.pretrain.stage()
        full = dict.fromkeys(stage.budgets, full_subnet(model))
        work.insert(0, _Work(model, stage, alone, full, 0, recipe.dtype, accelerator))
    return RecipePlan(
        family=recipe.family,
        model=model,
        teacher_params=subnet_params(model, full_subnet(model)),
        least_params=subnet_params(model, smallest_subnet(model, elastic.axes, elastic.layer_ranking)),
        accelerator=accelerator,
        gpus=tuple(gpus),
        budgets=budgets,
        stages=tuple(stage.plan(gpus) for stage in work),
    )


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
    for axis in ("hidden", *Axes.WIDTHS):
        step = config.groups(axis) if axis in GROUPS else WIDTH_STEP
        least = elastic.axes.choices(axis)[-1]
        size = getattr(smallest, axis)
        for choice in range((least - 1) // step * step, 0, -step):
            narrower: dict[str, Any] = {axis: (choice,) * len(size) if isinstance(size, tuple) else choice}
            if counted.of(dataclasses.replace(smallest, **narrower)) <= target:
                yield axis, choice
                break


# Stages


@dataclass(frozen=True, slots=True)
class _Work:
    """A stage with all that its plan depends on; `subnets` by the names of its budgets."""

    model: ModelConfig
    stage: Stage
    distillation: Distillation
    subnets: Mapping[str, Subnet]
    router_params: int
    dtype: Dtype
    accelerator: Accelerator

    def plan(self, gpus: Sequence[int]) -> StagePlan:
        stage, flops = self.stage, self.flops(self.subnets)
        full = full_subnet(self.model)
        widest = self.subnets if stage.router.mode == "frozen" else dict.fromkeys(self.subnets, full)
        one = dataclasses.replace(self.largest(stage), sequences=1)
        return StagePlan(
            stage=stage,
            sequences=stage.steps * stage.batch_size,
            tokens=stage.tokens,
            flops=flops,
            flops_at_most=self.flops(widest),
            sequence_bytes=(
                activation_bytes(self.model, dataclasses.replace(one, recompute=False)),
                activation_bytes(self.model, dataclasses.replace(one, recompute=True)),
            ),
            meshes=tuple(self.mesh(count, flops.total) for count in gpus),
        )

    def shares(self) -> dict[str, Fraction]:
        """The share of each budget that has any; where shares follow need, as if all cut sizes needed as much."""
        full = full_subnet(self.model)
        need = Need(self.stage, [name for name, subnet in self.subnets.items() if subnet == full])
        need.add(dict.fromkeys(self.stage.budgets, 1.0))
        return {name: Fraction(share) for name, share in need.shares().items() if share > 0}

    def masked(self, subnet: Subnet) -> bool:
        return self.stage.router.mode != "frozen" and subnet != full_subnet(self.model)

    def flops(self, subnets: Mapping[str, Subnet]) -> StageFlops:
        """The FLOPs of the whole stage, with every budget at its subnet of `subnets`."""
        model, length, full = self.model, self.stage.sequence_length, full_subnet(self.model)
        student = teacher = recomputed = Fraction(0)
        for name, share in self.shares().items():
            subnet, masked = subnets[name], self.masked(self.subnets[name])
            student += share * (forward_flops(model, subnet, length) + backward_flops(model, subnet, length)).total
            if self.stage.recompute:
                recomputed += share * recomputed_flops(model, subnet, length, masked=masked).total
            teaches_itself = self.distillation.teacher == "trainable" and self.subnets[name] == full
            if self.distillation.kl_weight > 0 and not teaches_itself:
                teacher += share * forward_flops(model, full, length).total
        sequences = self.stage.steps * self.stage.batch_size
        return StageFlops(
            student=round(sequences * student),
            teacher=round(sequences * teacher),
            recomputed=round(sequences * recomputed),
        )

    def largest(self, stage: Stage) -> MicroStep:
        """The micro-step that needs most: while a router learns, a soft choice may enclose the whole model."""
        subnets = [self.subnets[name] for name in self.shares()]
        masked = any(map(self.masked, subnets))
        largest = max(subnets, key=lambda subnet: subnet_params(self.model, subnet))
        return MicroStep(
            subnet=full_subnet(self.model) if masked else largest,
            masked=masked,
            sequences=stage.micro_batch_size,
            sequence_length=stage.sequence_length,
            recompute=stage.recompute,
            distillation=self.distillation,
            dtype=self.dtype,
        )

    def memory(self, stage: Stage, gpus: int) -> Memory:
        return training_memory(self.model, self.largest(stage), gpus=gpus, router_params=self.router_params)

    def mesh(self, gpus: int, flops: int) -> MeshPlan:
        divides = self.divides(self.stage, gpus)
        memory = self.memory(self.stage, gpus)
        fits = divides and memory.total <= self.accelerator.usable
        hours = self.accelerator.hours(flops)
        return MeshPlan(
            gpus=gpus,
            micro_steps=self.stage.micro_steps(gpus) if divides else None,
            memory=memory,
            fits=fits,
            gpu_hours=hours,
            hours=hours / gpus,
            dollars=hours * self.accelerator.dollars_per_hour,
            changes=() if fits else tuple(self.changes(gpus)),
        )

    @staticmethod
    def divides(stage: Stage, gpus: int) -> bool:
        """Whether the batch, and the rows that share a budget, divide among so many GPUs."""
        together = stage.budget_rows or gpus
        return stage.batch_size % (stage.micro_batch_size * gpus) == 0 and together % gpus == 0

    # What would fit

    def changes(self, gpus: int) -> Iterator[Change]:
        """Single changes that make the stage fit; failing those, the fewest GPUs with everything else at its least."""
        found = [change for change in self.single_changes(gpus) if change is not None]
        if not any(change.sequence_length == self.stage.sequence_length for change in found):
            sparing = dataclasses.replace(self.stage, recompute=True, micro_batch_size=1)
            found += [change for change in [self.fewest_gpus(sparing)] if change is not None]
        yield from found

    def single_changes(self, gpus: int) -> Iterator[Change | None]:
        stage = self.stage
        if not stage.recompute:
            yield self.change(dataclasses.replace(stage, recompute=True), gpus)
        smaller = (size for size in range(stage.micro_batch_size - 1, 0, -1) if stage.batch_size % size == 0)
        yield self.first(gpus, (dataclasses.replace(stage, micro_batch_size=size) for size in smaller))
        yield self.fewest_gpus(stage)
        halves = (stage.sequence_length >> power for power in range(1, stage.sequence_length.bit_length()))
        yield self.first(gpus, (dataclasses.replace(stage, sequence_length=length) for length in halves))

    def first(self, gpus: int, stages: Iterator[Stage]) -> Change | None:
        return next((change for stage in stages if (change := self.change(stage, gpus)) is not None), None)

    def fewest_gpus(self, stage: Stage) -> Change | None:
        together = stage.batch_size // stage.micro_batch_size
        counts = (count for count in range(1, together + 1) if together % count == 0)
        return next((change for count in counts if (change := self.change(stage, count)) is not None), None)

    def change(self, stage: Stage, gpus: int) -> Change | None:
        """The change to these settings, if they fit."""
        if not self.divides(stage, gpus):
            return None
        memory = self.memory(stage, gpus).total
        if memory > self.accelerator.usable:
            return None
        return Change(
            gpus=gpus,
            recompute=stage.recompute,
            micro_batch_size=stage.micro_batch_size,
            sequence_length=stage.sequence_length,
            memory=memory,
        )
