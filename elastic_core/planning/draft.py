"""A first recipe for a teacher: axes around its geometry that hold the budgets asked for, stages of so many tokens."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from elastic_core.budget import Budget
from elastic_core.cost import LatencyTable, budget_cost
from elastic_core.geometry import EXPERTS_MULTIPLE, GROUPS, LAYER_AXES, MOE, Axes, ModelConfig
from elastic_core.planning.machine import Accelerator
from elastic_core.planning.plan import RecipePlan, check_budgets, plan_recipe
from elastic_core.planning.stages import StagePlan
from elastic_core.recipe import Optimizer, Recipe, RouterSchedule, Stage
from elastic_core.subnet import Subnet, smallest_subnet

REACHES = (
    0.7,
    0.6,
    0.5,
    0.4,
    0.3,
    0.2,
    0.1,
)  # the least share of a width: the nearest that holds every budget is taken
ROOM = 0.95  # the smallest subnet takes at most this share of a budget, so that there is something to choose
CHOICES = 5  # of an axis
SHORT, LONG = 8192, 49152  # tokens of a sequence in the two stages of arXiv 2511.16664
SHORT_SHARE = 65 / 110  # of all its tokens, those of its first stage
STEPS = 2000  # of a stage, at most
LEAST_STEPS = 10
# The paper's rate for 12B, scaled by the root of the hidden size: 2.0e-4 at 1024.
RATE, RATE_HIDDEN = 9e-5, 5120


def draft_axes(model: ModelConfig, budgets: Sequence[Budget], table: LatencyTable | None = None) -> Axes:
    """The axes that reach least far below the teacher and still hold a subnet well within every budget.

    With a latency table its own choices are the axes, for only these were measured. ValueError, naming the budget,
    where no axes hold it.
    """
    check_budgets(budgets, model, table)
    drafts = [_measured(table)] if table is not None else [_around(model, reach) for reach in REACHES]
    layers, missed = range(model.num_layers), None
    for axes in drafts:
        smallest = smallest_subnet(model, axes.bind(model), layers)
        missed = next((b for b in budgets if not _holds(model, b, table, smallest)), None)
        if missed is None:
            return axes
    assert missed is not None, "there is a draft, and it holds every budget or misses one"
    counted = budget_cost(model, missed, table)
    raise ValueError(
        f"budget {missed.name} is too small for this teacher: of {counted.text(counted.of(smallest))} is the smallest "
        f"subnet of its axes; ask for more"
    )


def draft_stages(model: ModelConfig, budgets: Sequence[Budget], tokens: int, gpus: int) -> tuple[Stage, Stage]:
    """Two stages of `tokens` together, the second at a longer context, whose batches divide among so many GPUs.

    ValueError for fewer tokens than make LEAST_STEPS steps.
    """
    long = min(LONG, model.max_position_embeddings)
    short = min(SHORT, max(1, long // 4))
    first = _stage("stage1", model, budgets, short, tokens * SHORT_SHARE, gpus)
    second = _stage("stage2", model, budgets, long, tokens * (1 - SHORT_SHARE), gpus)
    return first, replace(second, optimizer=replace(second.optimizer, schedule="cosine"))


def fit_stages(
    recipe: Recipe, model: ModelConfig, accelerator: Accelerator, gpus: int, table: LatencyTable | None = None
) -> tuple[Recipe, RecipePlan]:
    """The recipe with what lets its stages fit on so many GPUs, and its plan.

    That is recompute; where this is not enough, offload; and then shorter sequences, more of them. Where nothing helps,
    the plan says so.
    """
    while True:
        plan = plan_recipe(recipe, model, accelerator, (gpus,), table)
        stages = tuple(map(_fitting, plan.stages))
        if stages == recipe.stages:
            return recipe, plan
        recipe = replace(recipe, stages=stages)


def _around(model: ModelConfig, reach: float) -> Axes:
    """Axes down to `reach` of the widths; FFN further, layers less far, as in the paper's own 6B of 12B."""
    layers, widths = model.num_layers, dict[str, Any]()
    for axis in Axes.WIDTHS:
        if full := max(model.full_sizes(axis), default=0):
            step = model.groups(axis) if axis in GROUPS else _step(model, full)
            widths[axis] = _choices(full, reach**2 if axis == "ffn" else reach, step)
    hidden = _choices(model.hidden_size, reach, _step(model, model.hidden_size))
    return Axes(hidden=hidden, depth=_choices(layers, (1 + reach) / 2, max(1, layers // 31)), **widths)


def _measured(table: LatencyTable) -> Axes:
    def falling(sizes: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(set(sizes), reverse=True))

    measured: dict[str, Any] = {
        axis: falling(layer.width for layer in table.layers if LAYER_AXES[layer.kind][0] == axis)
        for axis in Axes.WIDTHS
    }
    measured |= {
        axis: falling(size for layer in table.layers if (size := getattr(layer, axis))) for axis in Axes.SHARED
    }
    depth = _choices(table.model.num_layers, 0.5, max(1, table.model.num_layers // 31))
    return Axes(hidden=falling(table.fixed), depth=depth, **measured)


def _holds(model: ModelConfig, budget: Budget, table: LatencyTable | None, smallest: Subnet) -> bool:
    return budget.target is None or budget_cost(model, budget, table).of(smallest) <= ROOM * budget.target


def _choices(full: int, share: float, step: int) -> tuple[int, ...]:
    """The full size and multiples of `step` below it, down to `share` of it: evenly spaced, CHOICES at most."""
    sizes = [full, *(size for size in range((full - 1) // step * step, 0, -step) if size >= share * full)]
    last = min(CHOICES, len(sizes)) - 1
    return tuple(sizes[round(i * (len(sizes) - 1) / max(1, last))] for i in range(last + 1))


def _step(model: ModelConfig, full: int) -> int:
    """The power of two that the choices of a width are multiples of: 128, or what divides a small or uneven width.

    Of a model with experts at least EXPERTS_MULTIPLE, which their widths have to be multiples of.
    """
    least = EXPERTS_MULTIPLE if model.layers_of(MOE) else 1
    powers = (1, 2, 4, 8, 16, 32, 64, 128)
    return max(power for power in powers if power <= least or (full % power == 0 and full >= 16 * power))


def _stage(name: str, model: ModelConfig, budgets: Sequence[Budget], length: int, tokens: float, gpus: int) -> Stage:
    together = gpus * len(budgets)  # so that a batch gives every budget the same number of rows on every GPU
    batch = together * max(1, math.ceil(tokens / (STEPS * length * together)))
    steps = round(tokens / (batch * length))
    if steps < LEAST_STEPS:
        needed = LEAST_STEPS * batch * length / (SHORT_SHARE if name == "stage1" else 1 - SHORT_SHARE)
        raise ValueError(
            f"{name} has {tokens:,.0f} of the tokens, which are {steps} steps, and takes at least {LEAST_STEPS}: with "
            f"{gpus} GPU{'s' * (gpus > 1)} (--gpus) and {len(budgets)} sizes, the teacher's own among them, a step has "
            f"at least {batch} sequences of {length:,} tokens; train on {math.ceil(needed):,} tokens or more, or on "
            "fewer GPUs"
        )
    rate = float(f"{RATE * math.sqrt(RATE_HIDDEN / model.hidden_size):.1e}")
    return Stage(
        name=name,
        sequence_length=length,
        batch_size=batch,
        steps=steps,
        budgets={budget.name: 1.0 for budget in budgets},
        optimizer=Optimizer(learning_rate=rate, warmup_steps=min(60, steps // 10)),
        router=RouterSchedule(mode="frozen"),
        checkpoint_every=min(100, max(LEAST_STEPS, steps // 10)),
    )


def _fitting(planned: StagePlan) -> Stage:
    """The stage with the next thing that may make it fit, or as it is where it fits or nothing helps."""
    stage, (mesh,) = planned.stage, planned.meshes
    if mesh.fits:
        return stage
    if not stage.recompute:
        return replace(stage, recompute=True)
    if not stage.offload:
        return replace(stage, offload=True)
    shorter = [
        c.sequence_length for c in mesh.changes if c.gpus == mesh.gpus and c.sequence_length < stage.sequence_length
    ]
    if not shorter:
        return stage
    return replace(stage, sequence_length=shorter[0], steps=round(stage.tokens / (stage.batch_size * shorter[0])))
