"""The router: from a budget to a choice on every axis, learned with the weights (arXiv 2511.16664, Router).

One small MLP an axis maps a one-hot budget to logits over that axis's choices. While it trains, Gumbel-Softmax turns
logits into masks that the loss reaches; for deployment `resolve.py` turns them into the nested subnets that keep to
their budgets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core import cost
from elastic_core.config import ATTENTION, FFN, MAMBA, Axes, ModelConfig
from elastic_core.subnet import Masks, Subnet, keep_layers

KIND_OF_AXIS = {"ffn": FFN, "mamba_heads": MAMBA, "attention_heads": ATTENTION}

# A choice below this probability is dropped from a soft mask, so that compute shrinks as the router makes up its mind.
NEGLIGIBLE = 1e-3

Probabilities = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ElasticModel:
    """What the router chooses for: the geometry, its bound axes, and the layers from most to least important."""

    config: ModelConfig
    axes: Axes
    layer_ranking: tuple[int, ...]

    def rows(self, axis: str) -> int:
        """How many choices are made on an axis: one, or one for each layer of its kind."""
        return len(self.config.layers_of(KIND_OF_AXIS[axis])) if axis in self.axes.per_layer else 1

    def per_layer(self, axis: str, values: Sequence[T]) -> tuple[T, ...]:
        """The rows' values of an axis, repeated to one for each layer of its kind."""
        if axis in self.axes.per_layer:
            return tuple(values)
        return tuple(values) * len(self.config.layers_of(KIND_OF_AXIS[axis]))


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
                for axis in Axes.NAMES
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
    for axis in Axes.NAMES:
        choices = axes.choices(axis)
        weighty = (probabilities[axis].detach() > 0).tolist()
        enclosing[axis] = [max(c for c, has in zip(choices, row, strict=True) if has) for row in weighty]
        divisor = {"mamba_heads": config.n_groups, "attention_heads": config.num_key_value_heads}.get(axis, 1)
        widths = [size // divisor for size in enclosing[axis]]
        prefixes = [c // divisor for c in choices]
        masks[axis] = [_prefix_mask(p, prefixes, w) for p, w in zip(probabilities[axis], widths, strict=True)]

    subnet = Subnet(
        hidden=enclosing["hidden"][0],
        ffn=elastic.per_layer("ffn", enclosing["ffn"]),
        mamba_heads=elastic.per_layer("mamba_heads", enclosing["mamba_heads"]),
        mamba_head_dim=enclosing["mamba_head_dim"][0],
        attention_heads=elastic.per_layer("attention_heads", enclosing["attention_heads"]),
        layers=keep_layers(elastic.layer_ranking, enclosing["depth"][0]),
    )
    return subnet, Masks(
        hidden_D=masks["hidden"][0],
        ffn_F=elastic.per_layer("ffn", masks["ffn"]),
        mamba_heads_R=elastic.per_layer("mamba_heads", masks["mamba_heads"]),
        mamba_head_dim_P=masks["mamba_head_dim"][0],
        query_heads_R=elastic.per_layer("attention_heads", masks["attention_heads"]),
        layers_L=layer_gates(elastic, probabilities["depth"][0]),
    )


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


def expected_widths(elastic: ElasticModel, probabilities: Probabilities) -> cost.Widths:
    """Expected sizes of independent choices, for the differentiable cost."""
    sizes = {axis: list(_expected_sizes(elastic, probabilities, axis)) for axis in Axes.NAMES}
    return cost.Widths(
        hidden=sizes["hidden"][0],
        ffn=elastic.per_layer("ffn", sizes["ffn"]),
        mamba_heads=elastic.per_layer("mamba_heads", sizes["mamba_heads"]),
        mamba_head_dim=sizes["mamba_head_dim"][0],
        attention_heads=elastic.per_layer("attention_heads", sizes["attention_heads"]),
        layers=list(layer_gates(elastic, probabilities["depth"][0])),
    )


def expected_choices(elastic: ElasticModel, probabilities: Probabilities) -> dict[str, Tensor]:
    """The expected size of every axis, averaged over its layers, to watch the router make up its mind."""
    return {axis: _expected_sizes(elastic, probabilities, axis).mean().detach() for axis in Axes.NAMES}


def _expected_sizes(elastic: ElasticModel, probabilities: Probabilities, axis: str) -> Tensor:
    """Expected size (rows,) of an axis."""
    p = probabilities[axis]
    return p @ torch.tensor(elastic.axes.choices(axis), dtype=p.dtype, device=p.device)


def expected_params(elastic: ElasticModel, probabilities: Probabilities) -> Tensor:
    """Expected parameters of the choice, differentiable."""
    expected = cost.params(elastic.config, expected_widths(elastic, probabilities))
    assert isinstance(expected, Tensor)
    return expected


def budget_loss(elastic: ElasticModel, probabilities: Probabilities, target_params: int) -> Tensor:
    """The distance of the expected cost from the budget: |expected parameters / target - 1|."""
    return (expected_params(elastic, probabilities) / target_params - 1).abs()
