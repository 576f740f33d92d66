"""The router: from a budget to a choice on every axis, learned with the weights (arXiv 2511.16664, Router).

One small MLP an axis maps a one-hot budget to logits over that axis's choices. While it trains, Gumbel-Softmax turns
logits into masks that the loss reaches; for deployment `resolve.py` turns them into the nested subnets that keep to
their budgets.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core import cost
from elastic_core.budget import Budget
from elastic_core.geometry import LAYER_AXES, Axes, ModelConfig
from elastic_core.layers.kind import LayerShape
from elastic_core.subnet import Masks, Subnet, keep_layers

# A choice below this probability is dropped from a soft mask, so that compute shrinks as the router makes up its mind.
NEGLIGIBLE = 1e-3

# In sums over choices: the letters of the axes that layers share, beside h hidden, w width, r row, d depth, v level.
_SHARED = "pqstu"

Probabilities = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ElasticModel:
    """What the router chooses for: the geometry, its bound axes, and the layers from most to least important.

    `latency_table` is what latency budgets are counted by.
    """

    config: ModelConfig
    axes: Axes
    layer_ranking: tuple[int, ...]
    latency_table: cost.LatencyTable | None = None

    def __post_init__(self) -> None:
        if self.latency_table is not None:
            self.latency_table.check(self.config, self.axes)

    def cost_of(self, budget: Budget) -> cost.Cost:
        """What `budget` counts; ValueError for a latency that the table does not give."""
        return cost.budget_cost(self.config, budget, self.latency_table)

    def rows(self, axis: str) -> int:
        """How many choices are made on an axis: one, or one for each layer that has it."""
        return len(self.config.layers_on(axis)) if axis in self.axes.per_layer else 1

    def per_layer(self, axis: str, values: Sequence[T]) -> tuple[T, ...]:
        """The rows' values of an axis, repeated to one for each layer that has it."""
        return tuple(values) if axis in self.axes.per_layer else tuple(values) * len(self.config.layers_on(axis))

    def layers_of(self, axis: str, row: int) -> tuple[int, ...]:
        """The layers that a row of choices of an axis decides on."""
        layers = self.config.layers_on(axis)
        return (layers[row],) if axis in self.axes.per_layer else layers

    def kinds(self) -> dict[str, str]:
        """The kinds of the model's layers, by the axis of their width."""
        return {
            axis: self.config.hybrid_override_pattern[i]
            for axis in self.axes.widths
            for i in self.config.layers_on(axis)
        }

    def subnet(self, rows: Mapping[str, Sequence[int]]) -> Subnet:
        """The subnet with these sizes on every axis: one, or one for each row of a width."""
        sizes: dict[str, Any] = {axis: self.per_layer(axis, rows[axis]) for axis in self.axes.widths}
        sizes |= {axis: rows[axis][0] for axis in ("hidden", *self.axes.shared)}
        return Subnet(layers=keep_layers(self.layer_ranking, rows["depth"][0]), **sizes)


class Router(nn.Module):
    """One MLP an axis: budget (num_budgets,) -> Linear -> LeakyReLU -> Linear -> logits (rows, choices)."""

    def __init__(self, elastic: ElasticModel, num_budgets: int, hidden_size: int) -> None:
        super().__init__()
        self.elastic, self.num_budgets = elastic, num_budgets
        self.heads = nn.ModuleDict(
            {
                axis: nn.Sequential(
                    nn.Linear(num_budgets, hidden_size),
                    nn.LeakyReLU(),
                    nn.Linear(hidden_size, elastic.rows(axis) * len(elastic.axes.choices(axis))),
                    nn.Unflatten(-1, (elastic.rows(axis), len(elastic.axes.choices(axis)))),
                )
                for axis in elastic.axes.names
            }
        )

    def forward(self, budget: Tensor) -> dict[str, Tensor]:
        """Logits (rows, choices) of every axis; `budget` is one-hot, or weighs two neighbours for a size between."""
        return {axis: head(budget) for axis, head in self.heads.items()}

    def one_hot(self, budget: int) -> Tensor:
        """The router's input for the trained budget with this index."""
        weight = next(self.parameters())
        return F.one_hot(torch.tensor(budget, device=weight.device), self.num_budgets).to(weight.dtype)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights; the last layer is zero, so that every choice starts equally likely."""
        for head in self.heads.values():
            first, last = (module for module in head.modules() if isinstance(module, nn.Linear))
            bound = self.num_budgets**-0.5
            first.weight.uniform_(-bound, bound, generator=generator)
            first.bias.zero_()
            last.weight.zero_()
            last.bias.zero_()

    @torch.no_grad()
    def imitate(self, tables: Sequence[Mapping[str, Tensor]]) -> None:
        """Set the last layers so that each budget's logits are those of its table, (rows, choices) an axis.

        Exact where the hidden size is at least the number of budgets, and the nearest by least squares elsewhere.
        """
        budgets = torch.eye(self.num_budgets)
        for axis, head in self.heads.items():
            first, last = (module for module in head.modules() if isinstance(module, nn.Linear))
            features = F.leaky_relu(first(budgets.to(first.weight))).double()
            wanted = torch.stack([table[axis].flatten().to(features) for table in tables])
            last.weight.copy_((torch.linalg.pinv(features) @ wanted).T)
            last.bias.zero_()


def gumbel_softmax(
    logits: Mapping[str, Tensor], *, temperature: float, scale: float, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """Choice probabilities softmax((scale x logits + Gumbel noise) / temperature); no noise without a generator.

    The noise is drawn on the generator's device, so that a step's noise does not depend on where it trains.
    """
    probabilities = {}
    for axis, axis_logits in logits.items():
        noisy = axis_logits * scale
        if generator is not None:
            uniform = torch.rand(axis_logits.shape, generator=generator, device=generator.device)
            tiny = torch.finfo(uniform.dtype).tiny
            noisy = noisy - (-uniform.clamp(min=tiny).log()).clamp(min=tiny).log().to(noisy)
        probabilities[axis] = (noisy / temperature).softmax(-1)
    return probabilities


def straight_through(probabilities: Probabilities) -> dict[str, Tensor]:
    """The most likely choice with value 1, carrying the gradient of its probabilities."""
    chosen = {}
    for axis, p in probabilities.items():
        hard = F.one_hot(p.argmax(-1), p.shape[-1]).to(p)
        chosen[axis] = hard + (p - p.detach())  # in this order, which leaves `hard` as it is to the last bit
    return chosen


def drop_negligible(probabilities: Probabilities) -> dict[str, Tensor]:
    """The probabilities with the negligible choices at zero, summing to 1 again."""
    kept = {axis: torch.where(p < NEGLIGIBLE, 0.0, p) for axis, p in probabilities.items()}
    return {axis: p / p.sum(-1, keepdim=True) for axis, p in kept.items()}


def soft_subnet(elastic: ElasticModel, probabilities: Probabilities) -> tuple[Subnet, Masks]:
    """The smallest subnet that encloses every choice with weight, and the masks that weigh it.

    A mask is the sum of its choices' prefix masks, each times its probability, so that a one-hot choice runs exactly
    as its subnet does.
    """
    config, axes = elastic.config, elastic.axes
    enclosing: dict[str, list[int]] = {}
    masks: dict[str, list[Tensor]] = {}
    for axis in axes.names:
        choices = axes.choices(axis)
        weighty = (probabilities[axis].detach() > 0).tolist()
        enclosing[axis] = [max(c for c, has in zip(choices, row, strict=True) if has) for row in weighty]
        groups = config.groups(axis)
        widths = [size // groups for size in enclosing[axis]]
        prefixes = [c // groups for c in choices]
        masks[axis] = [_prefix_mask(p, prefixes, w) for p, w in zip(probabilities[axis], widths, strict=True)]

    of_axes: dict[str, Any] = {axis: elastic.per_layer(axis, masks[axis]) for axis in axes.widths}
    of_axes |= {axis: masks[axis][0] for axis in ("hidden", *axes.shared)}
    return elastic.subnet(enclosing), Masks(layers=layer_gates(elastic, probabilities["depth"][0]), **of_axes)


def _prefix_mask(probabilities: Tensor, prefixes: Sequence[int], width: int) -> Tensor:
    ends = torch.tensor(prefixes, device=probabilities.device)
    inside = torch.arange(width, device=probabilities.device) < ends[:, None]
    return probabilities @ inside.to(probabilities)


def layer_gates(elastic: ElasticModel, depth_probabilities: Tensor) -> Tensor:
    """The probability (L,) that each layer is kept."""
    rank = torch.empty(len(elastic.layer_ranking), dtype=torch.long)
    rank[list(elastic.layer_ranking)] = torch.arange(len(rank))
    kept = (
        rank.to(depth_probabilities.device)
        < torch.tensor(elastic.axes.depth, device=depth_probabilities.device)[:, None]
    )
    return depth_probabilities @ kept.to(depth_probabilities)


def expected_choices(elastic: ElasticModel, probabilities: Probabilities) -> dict[str, Tensor]:
    """The expected size of every axis, averaged over its layers, to watch the router make up its mind."""
    return {axis: _expected_sizes(elastic, probabilities, axis).mean().detach() for axis in elastic.axes.names}


def _expected_sizes(elastic: ElasticModel, probabilities: Probabilities, axis: str) -> Tensor:
    """Expected size (rows,) of an axis."""
    p = probabilities[axis]
    return p @ torch.tensor(elastic.axes.choices(axis), dtype=p.dtype, device=p.device)


def expected_cost(elastic: ElasticModel, probabilities: Probabilities, counted: cost.Cost) -> Tensor:
    """The mean cost of all subnets, weighed by their probabilities; exact, since choices are independent.

    Each layer adds what it costs at each of its shapes, weighed by the shape's probability and by the layer's of being
    kept; what the peaks add is in `_expected_peak`.
    """
    hidden, *shared = (probabilities[axis][0] for axis in ("hidden", *elastic.axes.shared))
    gates_L, once = layer_gates(elastic, probabilities["depth"][0]), _SHARED[: len(shared)]
    total: Tensor = hidden @ hidden.new_tensor([counted.fixed(size) for size in elastic.axes.hidden])
    for axis, kind in elastic.kinds().items():
        costs = _at_every_shape(elastic, kind, counted.layer).to(hidden)
        rows = torch.einsum(f"h,hw{once},rw,{','.join(once)}->r", hidden, costs, probabilities[axis], *shared)
        total = total + (rows * gates_L[list(elastic.config.layers_of(kind))]).sum()
    return total + _expected_peak(elastic, probabilities, counted)


def _at_every_shape(elastic: ElasticModel, kind: str, count: Callable[[LayerShape], int]) -> Tensor:
    """`count` of a layer of `kind` at every choice of (hidden size, width, each shared axis), in float64."""
    axes = ("hidden", LAYER_AXES[kind][0], *elastic.axes.shared)
    counts = [count(shape) for shape in _every_shape(elastic.axes, kind)]
    return torch.tensor(counts, dtype=torch.float64).view([len(elastic.axes.choices(axis)) for axis in axes])


@cache
def _every_shape(axes: Axes, kind: str) -> tuple[LayerShape, ...]:
    sizes = axes.hidden, axes.choices(LAYER_AXES[kind][0]), product(*map(axes.choices, axes.shared))
    return tuple(cost.shape_of(kind, *size) for size in product(*sizes))


def _expected_peak(elastic: ElasticModel, probabilities: Probabilities, counted: cost.Cost) -> Tensor:
    """The mean of the largest peak: E[max] = v_max - sum over l of F(v_l) (v_(l+1) - v_l).

    F(v) = P(max <= v). Given the choices made once for the model, the rows are independent, so that F(v) is the product
    of P(peak <= v) over the rows with a kept layer.
    """
    axes = elastic.axes
    hidden, *shared, depth = (probabilities[axis][0] for axis in ("hidden", *axes.shared, "depth"))
    peaks = {axis: _at_every_shape(elastic, kind, counted.peak) for axis, kind in elastic.kinds().items()}
    outside = torch.tensor([counted.fixed_peak(size) for size in axes.hidden], dtype=torch.float64)
    levels: Tensor = torch.cat([outside, *(p.flatten() for p in peaks.values())]).unique()
    if len(levels) == 1:
        return levels[0].to(hidden)
    once = _SHARED[: len(shared)]
    below = (outside.view(-1, *[1] * len(once), 1) <= levels).to(hidden).expand(len(depth), -1, *map(len, shared), -1)
    for axis, p in peaks.items():
        stays = torch.einsum(f"rw,hw{once}v->rh{once}v", probabilities[axis], (p[..., None] <= levels).to(hidden))
        for row in range(elastic.rows(axis)):
            best = min(elastic.layer_ranking.index(i) for i in elastic.layers_of(axis, row))
            is_kept = torch.tensor([best < size for size in axes.depth], device=hidden.device)
            below = below * torch.where(is_kept.view(-1, *[1] * (below.ndim - 1)), stays[row], 1.0)
    steps, highest = levels.diff().to(hidden), levels[-1].to(hidden)
    each = f"d,h,{','.join(once)},dh{once}v,v->"
    mean: Tensor = highest - torch.einsum(each, depth, hidden, *shared, below[..., :-1], steps)
    return mean


def expected_params(elastic: ElasticModel, probabilities: Probabilities) -> Tensor:
    """Expected parameters of the choice, differentiable."""
    return expected_cost(elastic, probabilities, cost.ParamsCost(model=elastic.config))


def budget_loss(elastic: ElasticModel, probabilities: Probabilities, budget: Budget) -> Tensor:
    """The distance of the expected cost from the budget's target: |expected cost / target - 1|."""
    assert budget.target is not None, f"budget {budget.name} has no target"
    return (expected_cost(elastic, probabilities, elastic.cost_of(budget)) / budget.target - 1).abs()
