"""The stage loop: distil every budget of the family into one set of weights, under the router.

`train_stage` is a generator of `StepMetrics`; it knows no logger, no bucket and no scheduler. Everything random in a
step is a function of its number (curriculum.py), so that a run that starts again from a checkpoint ends in the same
bits as one that was never stopped. Several processes (parallel.py) run the same budget under the same noise in each
micro-step, on rows of their own.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from elastic_core.budget import Budget
from elastic_core.model import ElasticNemotronH, is_matrix, keeps_type
from elastic_core.recipe import Distillation, Stage
from elastic_core.router import (
    Router,
    budget_loss,
    drop_negligible,
    expected_choices,
    expected_params,
    gumbel_softmax,
    soft_subnet,
    straight_through,
)
from elastic_core.subnet import Masks, Subnet, full_subnet
from elastic_core.training import curriculum
from elastic_core.training.losses import LossParts, distillation_loss
from elastic_core.training.parallel import World, clip_gradients
from elastic_core.training.routing import Routing, balance, give_idle_gradients, watched
from elastic_core.training.tokens import TokenBatch, TokenRows


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetMetrics:
    """Means over what one step learns at one budget, in all processes: of losses over the tokens that count.

    `choices` are the router's expected sizes by axis, `experts` the curves of routing.py where there are experts.
    """

    loss: float
    kl: float
    cross_entropy: float
    router_loss: float
    expected_params: float
    choices: Mapping[str, float]
    experts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one optimizer step of all processes did.

    `loss` is the mean total loss, `shares` what each budget was given of the batch, `seconds` the step's wall time.
    """

    stage: str
    step: int
    steps: int
    loss: float
    budgets: Mapping[str, BudgetMetrics]
    learning_rate: float
    temperature: float
    gradient_norm: float
    shares: Mapping[str, float]
    tokens: int
    seconds: float


@dataclass(slots=True)
class StageRun:
    """What a stage trains with. `teacher` and `router` are None where the stage needs none.

    `subnets` are the budgets' chosen subnets, by name; a stage whose router is frozen runs on them.
    """

    student: ElasticNemotronH
    teacher: ElasticNemotronH | None
    router: Router | None
    optimizer: torch.optim.Optimizer
    stage: Stage
    distillation: Distillation
    budgets: tuple[Budget, ...]
    subnets: Mapping[str, Subnet]
    data: TokenRows
    seed: int
    world: World
    autocast: torch.dtype | None = None


def make_optimizer(student: ElasticNemotronH, router: Router | None, stage: Stage) -> torch.optim.Optimizer:
    """AdamW with the student's matrices in one group, its other weights, which do not decay, in another.

    The embedding decays, as in Megatron, which trained the teachers. The router's parameters have a rate of their own.
    """
    settings = stage.optimizer
    named = list(student.named_parameters())
    matrices = [weight for name, weight in named if not keeps_type(name, weight.ndim)]
    others = [weight for _, weight in named if not is_matrix(weight)]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "peak": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": others, "peak": settings.learning_rate, "weight_decay": 0.0},
    ]
    # Matrices that no processes divide; a fused step takes divided weights or whole ones.
    if whole := [weight for name, weight in named if is_matrix(weight) and keeps_type(name, weight.ndim)]:
        groups.append({"params": whole, "peak": settings.learning_rate, "weight_decay": settings.weight_decay})
    if router is not None and stage.router.mode != "frozen":
        groups.append({"params": list(router.parameters()), "peak": stage.router.learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), fused=True)


def train_stage(run: StageRun, start: int = 0, earlier: Iterable[Mapping[str, float]] = ()) -> Iterator[StepMetrics]:
    """Train from step `start` to the end of the stage, yielding after each optimizer step.

    `earlier` has, for each step before `start`, the KL that was measured of each budget: the shares follow it. Raises
    FloatingPointError when the loss or the gradient is no longer finite; the weights are then unchanged by that step.
    """
    stage, world = run.stage, run.world
    order = curriculum.DataOrder(run.data.num_rows, stage, run.seed, run.data.drawn)
    whole = full_subnet(run.student.config)
    need = curriculum.Need(stage, [name for name, subnet in run.subnets.items() if subnet == whole])
    for kl in earlier:
        need.add(kl)
    for step in range(start, stage.steps):
        began = time.perf_counter()
        for group in run.optimizer.param_groups:
            group["lr"] = curriculum.learning_rate(stage.optimizer, group["peak"], step, stage.steps)
        rows = order.rows(step)
        # What a process counts on average, so that every token of the global batch weighs the same.
        learned = run.data.learned(rows) / world.size
        tally, shares, routings = _Tally(), need.shares(), list[Routing]()
        for index, micro_step in enumerate(curriculum.micro_steps(stage, shares, run.seed, step, world.size)):
            batch = run.data.batch([rows[first + world.rank] for first in micro_step.firsts])
            choice = _choose(run, step, index, micro_step.budget)
            weight = len(micro_step.firsts) * world.size / stage.batch_size
            loss, report, routing = _micro_step(run, choice, batch.to(world.device), learned, weight)
            loss.backward()
            tally.add(micro_step.budget, report)
            routings.append(routing)
        if world.mesh is None:
            give_idle_gradients(run.student, routings)
        gradient_norm = _clip(run)
        mean_loss, budgets = tally.means(world, stage.router.loss_weight)
        need.add({name: budget.kl for name, budget in budgets.items()})
        metrics = StepMetrics(
            stage=stage.name,
            step=step,
            steps=stage.steps,
            loss=mean_loss,
            budgets=budgets,
            learning_rate=float(run.optimizer.param_groups[0]["lr"]),
            temperature=curriculum.temperature(stage, step),
            gradient_norm=gradient_norm,
            shares=shares,
            tokens=stage.batch_size * stage.sequence_length,
            seconds=time.perf_counter() - began,
        )
        _check_finite(metrics)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        if stage.expert_balance:
            balance(run.student, routings, stage.expert_balance, world)
        yield metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What a micro-step runs: a subnet, with masks and the router's loss while the router trains."""

    subnet: Subnet
    masks: Masks | None = None
    router_loss: Tensor | None = None
    expected_params: Tensor | None = None
    choices: Mapping[str, Tensor] = field(default_factory=dict)


# What one micro-step reports: scalars by name, still on the device.
_Report = dict[str, Tensor]
WITH_EXPERTS = "rows with experts"


def _choose(run: StageRun, step: int, micro_step: int, name: str) -> _Choice:
    schedule = run.stage.router
    if run.router is None or schedule.mode == "frozen" or run.subnets[name] == full_subnet(run.student.config):
        return _Choice(subnet=run.subnets[name])
    index, budget = next((i, b) for i, b in enumerate(run.budgets) if b.name == name)
    logits = run.router(run.router.one_hot(index))
    temperature, scale = curriculum.temperature(run.stage, step), curriculum.scale(run.stage, step)
    noise = curriculum.noise_generator(run.seed, run.stage, step, micro_step)
    sampled = gumbel_softmax(logits, temperature=temperature, scale=scale, generator=noise)
    # The cost of what is sampled, because that is what runs; without noise the gradient dies as the choice sharpens.
    router_loss = budget_loss(run.router.elastic, sampled, budget)
    sampled = straight_through(sampled) if schedule.mode == "hard" else drop_negligible(sampled)
    subnet, masks = soft_subnet(run.router.elastic, sampled)
    likely = gumbel_softmax(logits, temperature=1.0, scale=scale, generator=None)
    return _Choice(
        subnet=subnet,
        masks=masks,
        router_loss=router_loss,
        expected_params=expected_params(run.router.elastic, likely).detach(),
        choices=expected_choices(run.router.elastic, likely),
    )


def _micro_step(
    run: StageRun, choice: _Choice, batch: TokenBatch, learned: float, weight: float
) -> tuple[Tensor, _Report, Routing]:
    """What a micro-batch adds to the step's loss at one choice, differentiable, and what to report of it.

    Its token losses are summed and divided by `learned`, the tokens that a process counts in this step on average;
    `weight` is its share of the step's rows, by which the router's loss counts.
    """
    with _autocast(run):
        with watched(run.student) as routing:
            hidden_BTD = run.student(batch.inputs_BT, choice.subnet, choice.masks, packing=batch.packing)
        teacher_hidden = _teacher_hidden(run, batch, choice)
        teacher = run.teacher or run.student
        parts = distillation_loss(
            hidden_BTD.flatten(0, 1),
            run.student.head_weight(choice.subnet.hidden),
            teacher_hidden.flatten(0, 1) if teacher_hidden is not None else None,
            teacher.lm_head.weight.detach() if teacher_hidden is not None else None,
            batch.targets_BT.flatten(),
            kl_weight=run.distillation.kl_weight if teacher_hidden is not None else 0.0,
            ce_weight=run.distillation.ce_weight,
            temperature=run.distillation.temperature,
            learned=batch.learned,
            denominator=learned,
        )
    loss = parts.total
    if choice.router_loss is not None:
        loss = loss + weight * run.stage.router.loss_weight * choice.router_loss
    return loss, _report(loss, parts, choice, routing, learned, weight), routing


def _report(
    loss: Tensor, parts: LossParts, choice: _Choice, routing: Routing, learned: float, weight: float
) -> _Report:
    """Sums over this micro-batch's tokens, and over its share of the rows for what routers say."""
    report = {"loss": loss, "tokens": torch.full_like(loss, parts.tokens), "rows": torch.full_like(loss, weight)}
    sums = {"task": parts.total, "kl": parts.kl, "cross_entropy": parts.cross_entropy}
    report |= {name: mean * learned for name, mean in sums.items()}
    of_router = {f"choices.{axis}": size for axis, size in choice.choices.items()}
    if curves := routing.curves():  # a subnet may have no layer of experts
        of_router |= {f"experts.{name}": value for name, value in curves.items()}
        report[WITH_EXPERTS] = report["rows"]
    if choice.router_loss is not None and choice.expected_params is not None:
        of_router |= {"router_loss": choice.router_loss, "expected_params": choice.expected_params}
    report |= {name: value * weight for name, value in of_router.items()}
    return {name: value.detach() for name, value in report.items()}


@torch.no_grad()
def _teacher_hidden(run: StageRun, batch: TokenBatch, choice: _Choice) -> Tensor | None:
    """The teacher's last hidden states; a trainable teacher teaches every budget but its own."""
    full = full_subnet(run.student.config)
    if run.distillation.kl_weight == 0:
        return None
    if run.distillation.teacher == "frozen":
        assert run.teacher is not None, "a frozen teacher is missing"
        return run.teacher(batch.inputs_BT, full, packing=batch.packing)  # type: ignore[no-any-return]
    is_teacher = choice.masks is None and choice.subnet == full
    return None if is_teacher else run.student(batch.inputs_BT, full, packing=batch.packing)


def _autocast(run: StageRun) -> AbstractContextManager[Any]:
    if run.autocast is None:
        return nullcontext()
    return torch.autocast(run.world.device.type, run.autocast)


def _clip(run: StageRun) -> float:
    """Clip the student's gradient and the router's, each to the stage's norm; the student's norm before that.

    Where one of them is not finite, that norm.
    """
    trained = [list(run.student.parameters())]
    if run.router is not None:
        trained.append(list(run.router.parameters()))
    for parameters in trained:
        run.world.average_gradients(parameters)
    norms = [clip_gradients(parameters, run.stage.optimizer.max_grad_norm) for parameters in trained]
    return next((norm for norm in norms if not math.isfinite(norm)), norms[0])


def _check_finite(metrics: StepMetrics) -> None:
    if math.isfinite(metrics.loss) and math.isfinite(metrics.gradient_norm):
        return
    losses = ", ".join(f"{name} {budget.loss:.4g}" for name, budget in metrics.budgets.items())
    raise FloatingPointError(
        f"stage {metrics.stage}, step {metrics.step}: loss {metrics.loss} (by budget: {losses}), gradient norm "
        f"{metrics.gradient_norm}; lower optimizer.learning_rate or max_grad_norm, and look at the data near this step"
    )


class _Tally:
    """Collects what micro-steps report; at the step's end reads it off the device once, averaged over the processes."""

    def __init__(self) -> None:
        self._reports: dict[str, list[_Report]] = {}

    def add(self, name: str, report: _Report) -> None:
        self._reports.setdefault(name, []).append(report)

    def means(self, world: World, router_weight: float) -> tuple[float, dict[str, BudgetMetrics]]:
        """The mean loss, and the means of every budget; `router_weight` is that of the router's loss."""
        scalars = [_sum([report for reports in self._reports.values() for report in reports], "loss")]
        scalars += [_sum(reports, key) for reports in self._reports.values() for key in _keys(reports)]
        loss, *rest = world.mean(torch.stack(scalars))
        sums = iter(rest)
        return loss, {
            name: _budget_metrics({key: next(sums) for key in _keys(reports)}, router_weight)
            for name, reports in self._reports.items()
        }


def _keys(reports: list[_Report]) -> dict[str, None]:
    """What any of them reports, in the same order in every process, since all run the same subnets."""
    return dict.fromkeys(key for report in reports for key in report)


def _sum(reports: list[_Report], key: str) -> Tensor:
    return torch.stack([report[key].float() for report in reports if key in report]).sum()


def _budget_metrics(sums: Mapping[str, float], router_weight: float) -> BudgetMetrics:
    tokens, rows = sums["tokens"] or 1.0, sums["rows"]  # a budget may have met no token that counts
    router_loss = sums.get("router_loss", 0.0) / rows
    return BudgetMetrics(
        loss=sums["task"] / tokens + router_weight * router_loss,
        kl=sums["kl"] / tokens,
        cross_entropy=sums["cross_entropy"] / tokens,
        router_loss=router_loss,
        expected_params=sums.get("expected_params", 0.0) / rows,
        choices=_under("choices.", sums, rows),
        experts=_under("experts.", sums, sums.get(WITH_EXPERTS, rows)),
    )


def _under(prefix: str, sums: Mapping[str, float], rows: float) -> dict[str, float]:
    """The means over the rows of what is reported under a prefix."""
    return {key.removeprefix(prefix): total / rows for key, total in sums.items() if key.startswith(prefix)}
