"""From the router to deployment: the subnets that keep to their budgets and nest in one another (C2, C4).

The router's favourite on every axis may exceed its budget by a little. The subnet to deploy is the feasible one of
greatest router log-probability: for each hidden size, Mamba head dim and depth the rest is a multiple-choice
knapsack, a small mixed-integer program.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, inf, prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from elastic_core.budget import Budget
from elastic_core.cost import Cost, shape_of
from elastic_core.router import ElasticModel, Router
from elastic_core.subnet import Subnet, full_subnet, is_nested, keep_layers, smallest_subnet

# A subnet for a size between the trained budgets uses at least this share of its target, or of what any can use of it.
USED_SHARE = 0.98

# Up to so many combinations it is quicker to try them all than to solve for the best.
ENUMERATED = 256

AxisScores = Mapping[str, Tensor]  # of each axis (rows, choices)

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint


@dataclass(frozen=True, slots=True)
class _Option:
    """One choice of a row: the value, its log-probability, what the row's kept layers then cost, and their peak."""

    value: int
    log_probability: float
    cost: int
    peak: int


@dataclass(frozen=True, slots=True)
class _Global:
    """The choices made once for the model, with the sum of their log-probabilities."""

    hidden: int
    shared: tuple[int, ...]
    depth: int
    layers: tuple[int, ...]
    log_probability: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Where to look for a subnet: around `inner`, inside `outer`, at a cost of `least` to `most`."""

    inner: Subnet
    outer: Subnet
    least: int
    most: int


def resolve_budgets(router: Router, budgets: Sequence[Budget]) -> tuple[Subnet, ...]:
    """The subnets to deploy, from the largest budget to the smallest, each within its budget and the one before.

    Raises ValueError for a budget below the smallest subnet.
    """
    elastic = router.elastic
    full, smallest = full_subnet(elastic.config), _smallest(elastic)
    subnets: list[Subnet] = []
    for index, budget in enumerate(budgets):
        outer, counted = subnets[-1] if subnets else full, elastic.cost_of(budget)
        target = budget.target if budget.target is not None else counted.of(full)
        if outer == full and target >= counted.of(full):
            subnets.append(full)
            continue
        scores = log_probabilities(router, router.one_hot(index))
        found = _best(elastic, counted, scores, Limits(smallest, outer, 0, target))
        if found is None:
            raise _too_small(budget, counted, smallest)
        subnets.append(found)
    return tuple(subnets)


def resolve_target(router: Router, resolved: Sequence[Subnet], budget: Budget) -> Subnet:
    """The subnet for a target of any kind and size, between the family's own `resolved` subnets.

    The router is asked with the two neighbouring budgets weighed by distance. The subnet lies inside the larger
    neighbour and around the smaller one. Raises ValueError for a target below the smallest subnet.
    """
    elastic, target = router.elastic, budget.target
    full, counted = full_subnet(elastic.config), elastic.cost_of(budget)
    if target is None or target >= counted.of(full):
        return full
    sizes = [counted.of(subnet) for subnet in resolved]
    below = next((i for i, size in enumerate(sizes) if size <= target), len(resolved))
    if below < len(resolved) and sizes[below] == target:
        return resolved[below]
    inner = resolved[below] if below < len(resolved) else _smallest(elastic)
    outer = resolved[below - 1] if below else full
    scores = log_probabilities(router, _between(router, sizes, below, target))
    if _best(elastic, counted, scores, Limits(inner, outer, 0, target)) is None:
        raise _too_small(budget, counted, inner)
    least = int(USED_SHARE * target)
    while (found := _best(elastic, counted, scores, Limits(inner, outer, least, target))) is None:
        least = int(USED_SHARE * least)  # none comes that near to the target, so look a little lower
    return found


def _between(router: Router, sizes: Sequence[int], below: int, target: int) -> Tensor:
    """The router's input for a target between the budgets `below - 1` and `below`, or beyond the first or last."""
    if below == 0 or below == len(sizes):
        return router.one_hot(min(below, len(sizes) - 1))
    share = (target - sizes[below]) / (sizes[below - 1] - sizes[below])
    return share * router.one_hot(below - 1) + (1 - share) * router.one_hot(below)


def _smallest(elastic: ElasticModel) -> Subnet:
    return smallest_subnet(elastic.config, elastic.axes, elastic.layer_ranking)


def _too_small(budget: Budget, counted: Cost, smallest: Subnet) -> ValueError:
    assert budget.target is not None
    return ValueError(
        f"budget {budget.name}: {counted.text(budget.target)} is below the smallest subnet of these axes, "
        f"{counted.text(counted.of(smallest))}; raise the budget or add smaller choices to the axes"
    )


@torch.no_grad()
def log_probabilities(router: Router, budget: Tensor) -> AxisScores:
    """The router's log-probability (rows, choices) of every choice, for its input `budget`."""
    return {axis: logits.double().log_softmax(-1).cpu() for axis, logits in router(budget).items()}


def _best(elastic: ElasticModel, counted: Cost, scores: AxisScores, bounds: Limits) -> Subnet | None:
    """The subnet of greatest log-probability within the bounds."""
    best, best_score = None, -inf
    ceiling = sum(float(scores[axis].max(-1).values.sum()) for axis in elastic.axes.widths)
    for choice in _globals(elastic, scores, bounds):
        if choice.log_probability + ceiling <= best_score:
            break
        found = _best_with(choice, elastic, counted, scores, bounds)
        if found is not None and found[1] > best_score:
            best, best_score = found
    return best


def proposals(elastic: ElasticModel, counted: Cost, scores: AxisScores, bounds: Limits) -> list[Subnet]:
    """The subnet of greatest log-probability within the bounds for each hidden size, Mamba head dim and depth."""
    found = (_best_with(choice, elastic, counted, scores, bounds) for choice in _globals(elastic, scores, bounds))
    return [subnet for subnet, _ in filter(None, found)]


def _best_with(
    choice: _Global, elastic: ElasticModel, counted: Cost, scores: AxisScores, bounds: Limits
) -> tuple[Subnet, float] | None:
    """The subnet of greatest log-probability with these global choices, and that log-probability."""
    rows = {axis: _rows(elastic, counted, scores, choice, axis, bounds) for axis in elastic.axes.widths}
    picked = _knapsack(
        [options for of_axis in rows.values() for options in of_axis],
        counted.fixed_peak(choice.hidden),
        bounds.least - counted.fixed(choice.hidden),
        bounds.most - counted.fixed(choice.hidden),
    )
    if picked is None:
        return None
    subnet = _subnet(elastic, choice, rows, picked)
    assert is_nested(bounds.inner, subnet) and is_nested(subnet, bounds.outer), f"{subnet}"
    assert bounds.least <= counted.of(subnet) <= bounds.most, f"{subnet}"
    return subnet, choice.log_probability + sum(option.log_probability for option in picked)


def _globals(elastic: ElasticModel, scores: AxisScores, bounds: Limits) -> list[_Global]:
    """The choices made once for the model, the most likely first."""
    within = [
        [
            (c, float(s))
            for c, s in zip(elastic.axes.choices(axis), scores[axis][0], strict=True)
            if getattr(bounds.inner, axis) <= c <= getattr(bounds.outer, axis)
        ]
        for axis in ("hidden", *elastic.axes.shared, "depth")
    ]
    found = []
    for picked in product(*within):
        (hidden, *shared, depth), likely = zip(*picked, strict=True)
        layers = keep_layers(elastic.layer_ranking, depth)
        found.append(_Global(hidden, tuple(shared), depth, layers, sum(likely)))
    return sorted(found, key=lambda choice: -choice.log_probability)


def _rows(
    elastic: ElasticModel, counted: Cost, scores: AxisScores, choice: _Global, axis: str, bounds: Limits
) -> list[list[_Option]]:
    """The options of each row of an axis, given the global choices."""
    layers, kept, kind = elastic.config.layers_on(axis), set(choice.layers), elastic.kinds().get(axis)
    rows = []
    for row in range(elastic.rows(axis)):
        members = elastic.layers_of(axis, row)
        count = sum(layer in kept for layer in members)
        low = max((getattr(bounds.inner, axis)[layers.index(layer)] for layer in members), default=0)
        high = min((getattr(bounds.outer, axis)[layers.index(layer)] for layer in members), default=inf)
        options = []
        for value, score in zip(elastic.axes.choices(axis), scores[axis][row].tolist(), strict=True):
            if low <= value <= high:
                adds = peak = 0
                if count and kind:
                    shape = shape_of(kind, choice.hidden, value, choice.shared)
                    adds, peak = count * counted.layer(shape), counted.peak(shape)
                options.append(_Option(value, score, adds, peak))
        rows.append(options)
    return rows


def _knapsack(rows: Sequence[Sequence[_Option]], peak: int, least: int, most: int) -> list[_Option] | None:
    """One option of each row, of greatest total log-probability, whose costs and largest peak add up within bounds.

    The largest peak is `peak` unless an option exceeds it. Few combinations are all tried; of many, an integer program
    finds the best.
    """
    if prod(map(len, rows)) <= ENUMERATED:
        return _enumerated(rows, peak, least, most)
    return _solved(rows, peak, least, most)


def _enumerated(rows: Sequence[Sequence[_Option]], peak: int, least: int, most: int) -> list[_Option] | None:
    """`_knapsack` by trying every combination."""
    best, best_score = None, -inf
    for picked in product(*rows):
        cost = sum(option.cost for option in picked) + max([peak, *(option.peak for option in picked)])
        score = sum(option.log_probability for option in picked)
        if least <= cost <= most and score > best_score:
            best, best_score = list(picked), score
    return best


def _solved(rows: Sequence[Sequence[_Option]], peak: int, least: int, most: int) -> list[_Option] | None:
    """`_knapsack` by integer program.

    The solver takes a value within 1e-6 of a whole number for whole,
    so it is given small numbers: costs above each row's smallest, in units of their common divisor. What still slips
    over `most` is refused.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # half a second, for those alone who resolve budgets

    options = [option for row in rows for option in row]
    smallest = [min(option.cost for option in row) for row in rows]
    peak = max([peak, *(min(option.peak for option in row) for row in rows)])
    levels = sorted({option.peak for option in options if option.peak > peak})
    above = [option.cost - low for row, low in zip(rows, smallest, strict=True) for option in row]
    above += [level - lower for level, lower in zip(levels, [peak, *levels], strict=False)]
    unit, floor = max(1, gcd(*above)), sum(smallest) + peak
    structure = _structure(rows, levels)
    units, margin = np.array([[amount // unit for amount in above]]), 0
    while True:
        solution = milp(
            [-option.log_probability for option in options] + [0.0] * len(levels),
            integrality=[1] * len(options) + [0] * len(levels),
            bounds=Bounds(0, 1),
            constraints=[
                *structure,
                LinearConstraint(units, -((floor - least) // unit) - 0.5, (most - floor) // unit + 0.5 - margin),
            ],
            options={"mip_rel_gap": 0},
        )
        if solution.x is None:
            return None
        picked = [option for option, x in zip(options, solution.x, strict=False) if x > 0.5]
        over = sum(option.cost for option in picked) + max([peak, *(o.peak for o in picked)]) - most
        if over <= 0:
            return picked
        margin = 2 * margin + over // unit + 1


def _structure(rows: Sequence[Sequence[_Option]], levels: Sequence[int]) -> "list[LinearConstraint]":
    """What variables mean: a binary one of each option that it is picked, of each row one; then one of each level.

    A level is 1 if an option as high is picked and 0 if none is, without being declared binary: it is at least each
    row's picked options as high, and at most the sum of them all. The steps up to the levels that are 1 thus add up to
    the largest peak.
    """
    from scipy.linalg import block_diag
    from scipy.optimize import LinearConstraint

    one_of_each = block_diag(*[np.ones((1, len(row))) for row in rows])
    none = np.zeros((len(rows), len(levels)))
    constraints = [LinearConstraint(np.hstack([one_of_each, none]), 1, 1)]
    for index, level in enumerate(levels):
        this = np.zeros((1, len(levels)))
        this[0, index] = 1
        high = np.array([option.peak >= level for row in rows for option in row])
        constraints += [
            LinearConstraint(np.hstack([-one_of_each * high, np.repeat(this, len(rows), 0)]), 0, np.inf),
            LinearConstraint(np.hstack([high[None], -this]), 0, np.inf),
        ]
    return constraints


def _subnet(
    elastic: ElasticModel, choice: _Global, rows: Mapping[str, list[list[_Option]]], picked: Sequence[_Option]
) -> Subnet:
    values = iter(option.value for option in picked)
    sizes = {axis: [next(values) for _ in of_axis] for axis, of_axis in rows.items()}
    once = zip(("hidden", *elastic.axes.shared, "depth"), (choice.hidden, *choice.shared, choice.depth), strict=True)
    return elastic.subnet(sizes | {axis: [size] for axis, size in once})
