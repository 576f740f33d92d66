"""From the router to deployment: the subnets that keep to their budgets and nest in one another (C2, C4).

The router's favourite on every axis may exceed its budget by a little. The subnet to deploy is the feasible one of
greatest router log-probability: for each hidden size, Mamba head dim and depth the rest is a multiple-choice
knapsack, a small mixed-integer program.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, inf

import numpy as np
import torch
from scipy.linalg import block_diag
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from elastic_core import cost
from elastic_core.config import Budget
from elastic_core.router import KIND_OF_AXIS, ElasticModel, Router
from elastic_core.subnet import Subnet, full_subnet, is_nested, keep_layers, smallest_subnet

# A subnet for a size between the trained budgets uses at least this share of its target, or of what any can use of it.
USED_SHARE = 0.98

LogProbabilities = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Option:
    """One choice of a row: the value, its log-probability, and the parameters of the row's kept layers with it."""

    value: int
    log_probability: float
    params: int


@dataclass(frozen=True, slots=True)
class _Global:
    """The choices made once for the model, with the sum of their log-probabilities."""

    hidden: int
    mamba_head_dim: int
    layers: tuple[int, ...]
    log_probability: float


def resolve_budgets(router: Router, budgets: Sequence[Budget]) -> tuple[Subnet, ...]:
    """The subnets to deploy, from the largest budget to the smallest, each within its budget and the one before.

    Raises ValueError for a budget below the smallest subnet.
    """
    elastic = router.elastic
    full = full_subnet(elastic.config)
    smallest = smallest_subnet(elastic.config, elastic.axes, elastic.layer_ranking)
    subnets: list[Subnet] = []
    for index, budget in enumerate(budgets):
        outer = subnets[-1] if subnets else full
        target = budget.params if budget.params is not None else cost.subnet_params(elastic.config, full)
        if outer == full and target >= cost.subnet_params(elastic.config, full):
            subnets.append(full)
            continue
        _check_target(elastic, budget.name, target)
        found = _best(elastic, _log_probabilities(router, router.one_hot(index)), 0, target, smallest, outer)
        assert found is not None, f"no subnet within {target} parameters, though the smallest fits"
        subnets.append(found)
    return tuple(subnets)


def resolve_target(router: Router, resolved: Sequence[Subnet], target: int) -> Subnet:
    """The subnet for any size of at most `target` parameters, between the family's own `resolved` subnets.

    The router is asked with the two neighbouring budgets weighed by distance. The subnet lies inside the larger
    neighbour and around the smaller one. Raises ValueError for a target below the smallest subnet.
    """
    elastic = router.elastic
    _check_target(elastic, "target", target)
    full, sizes = full_subnet(elastic.config), [cost.subnet_params(elastic.config, s) for s in resolved]
    if target >= cost.subnet_params(elastic.config, full):
        return full
    for subnet, size in zip(resolved, sizes, strict=True):
        if size == target:
            return subnet
    above = [i for i, size in enumerate(sizes) if size > target]
    below = [i for i, size in enumerate(sizes) if size < target]
    outer = resolved[above[-1]] if above else full
    inner = resolved[below[0]] if below else smallest_subnet(elastic.config, elastic.axes, elastic.layer_ranking)
    if above and below:
        share = (target - sizes[below[0]]) / (sizes[above[-1]] - sizes[below[0]])
        budget = share * router.one_hot(above[-1]) + (1 - share) * router.one_hot(below[0])
    else:
        budget = router.one_hot(above[-1] if above else below[0])
    scores = _log_probabilities(router, budget)
    least = int(USED_SHARE * target)
    while (found := _best(elastic, scores, least, target, inner, outer)) is None:
        assert least > 0, f"no subnet within {target} parameters, though the inner neighbour fits"
        least = int(USED_SHARE * least)  # none comes that near to the target, so look a little lower
    return found


def _check_target(elastic: ElasticModel, name: str, target: int) -> None:
    smallest = smallest_subnet(elastic.config, elastic.axes, elastic.layer_ranking)
    least = cost.subnet_params(elastic.config, smallest)
    if target < least:
        raise ValueError(
            f"budget {name}: {target:,} parameters is below the smallest subnet of these axes, {least:,}; "
            "raise the budget or add smaller choices to the axes"
        )


@torch.no_grad()
def _log_probabilities(router: Router, budget: Tensor) -> LogProbabilities:
    return {axis: logits.double().log_softmax(-1).cpu() for axis, logits in router(budget).items()}


def _best(
    elastic: ElasticModel, scores: LogProbabilities, least: int, most: int, inner: Subnet, outer: Subnet
) -> Subnet | None:
    """The subnet of greatest log-probability with `least` to `most` parameters, around `inner` and inside `outer`."""
    best, best_score = None, -inf
    ceiling = sum(float(scores[axis].max(-1).values.sum()) for axis in KIND_OF_AXIS)
    for choice in sorted(_globals(elastic, scores, inner, outer), key=lambda g: -g.log_probability):
        if choice.log_probability + ceiling <= best_score:
            break
        rows = {axis: _rows(elastic, scores, choice, axis, inner, outer) for axis in KIND_OF_AXIS}
        fixed = int(cost.embedding_params(elastic.config, choice.hidden))
        picked = _knapsack([options for axis in KIND_OF_AXIS for options in rows[axis]], least - fixed, most - fixed)
        if picked is None:
            continue
        score = choice.log_probability + sum(option.log_probability for option in picked)
        if score > best_score:
            best, best_score = _subnet(elastic, choice, rows, picked), score
    assert best is None or (is_nested(inner, best) and is_nested(best, outer)), f"{best}"
    return best


def _globals(elastic: ElasticModel, scores: LogProbabilities, inner: Subnet, outer: Subnet) -> Iterator[_Global]:
    axes = ("hidden", "mamba_head_dim", "depth")
    within = {
        axis: [
            (c, float(s))
            for c, s in zip(elastic.axes.choices(axis), scores[axis][0], strict=True)
            if getattr(inner, axis) <= c <= getattr(outer, axis)
        ]
        for axis in axes
    }
    for (hidden, a), (head_dim, b), (depth, c) in product(*(within[axis] for axis in axes)):
        yield _Global(hidden, head_dim, keep_layers(elastic.layer_ranking, depth), a + b + c)


def _rows(
    elastic: ElasticModel, scores: LogProbabilities, choice: _Global, axis: str, inner: Subnet, outer: Subnet
) -> list[list[_Option]]:
    """The options of each row of an axis, given the global choices."""
    config, kept = elastic.config, set(choice.layers)
    layers = config.layers_of(KIND_OF_AXIS[axis])
    rows = []
    for row in range(elastic.rows(axis)):
        members = [i for i, layer in enumerate(layers) if row == i or elastic.rows(axis) == 1]
        count = sum(layers[i] in kept for i in members)
        low = max((getattr(inner, axis)[i] for i in members), default=0)
        high = min((getattr(outer, axis)[i] for i in members), default=inf)
        rows.append(
            [
                _Option(value, float(score), count * _layer_params(elastic, choice, axis, value))
                for value, score in zip(elastic.axes.choices(axis), scores[axis][row], strict=True)
                if low <= value <= high
            ]
        )
    return rows


def _layer_params(elastic: ElasticModel, choice: _Global, axis: str, value: int) -> int:
    if axis == "ffn":
        return int(cost.ffn_params(choice.hidden, value))
    if axis == "attention_heads":
        return int(cost.attention_params(elastic.config, choice.hidden, value))
    return int(cost.mamba_params(elastic.config, choice.hidden, value, choice.mamba_head_dim))


def _knapsack(rows: Sequence[Sequence[_Option]], least: int, most: int) -> list[_Option] | None:
    """One option of each row, of greatest total log-probability, with `least` to `most` parameters in all.

    The solver takes a value within 1e-6 of a whole number for whole, so it is given small numbers: parameters above
    each row's smallest option, in units of their common divisor. What still slips over `most` is refused.
    """
    options = [option for row in rows for option in row]
    smallest = [min(option.params for option in row) for row in rows]
    above = [option.params - low for row, low in zip(rows, smallest, strict=True) for option in row]
    unit, floor = max(1, gcd(*above)), sum(smallest)
    one_of_each_row = block_diag(*[np.ones((1, len(row))) for row in rows])
    units, margin = np.array([[params // unit for params in above]]), 0
    while True:
        solution = milp(
            [-option.log_probability for option in options],
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one_of_each_row, 1, 1),
                LinearConstraint(units, -((floor - least) // unit) - 0.5, (most - floor) // unit + 0.5 - margin),
            ],
            options={"mip_rel_gap": 0},
        )
        if solution.x is None:
            return None
        picked = [option for option, x in zip(options, solution.x, strict=True) if x > 0.5]
        over = sum(option.params for option in picked) - most
        if over <= 0:
            return picked
        margin = 2 * margin + over // unit + 1


def _subnet(
    elastic: ElasticModel, choice: _Global, rows: Mapping[str, list[list[_Option]]], picked: Sequence[_Option]
) -> Subnet:
    values = iter(option.value for option in picked)
    sizes = {axis: elastic.per_layer(axis, [next(values) for _ in rows[axis]]) for axis in KIND_OF_AXIS}
    return Subnet(
        hidden=choice.hidden,
        ffn=sizes["ffn"],
        mamba_heads=sizes["mamba_heads"],
        mamba_head_dim=choice.mamba_head_dim,
        attention_heads=sizes["attention_heads"],
        layers=choice.layers,
    )
