"""What an order of importance is worth: what cutting one axis alone loses in that order, and in random ones.

A ranking that loses no less than a random order costs quality that no later number of a run shows. The cuts are
measured before any training, with forward passes only.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic_core.files.reorder import Order, identity_order, random_order, reorder_in_place
from elastic_core.geometry import NUMBERS, Axes, ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import Subnet, full_subnet, keep_layers

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """The teacher with one axis cut from `full` to `size`, all others whole, with no training.

    `by_importance` is what the cut loses in the order of importance: the KL divergence from the whole teacher, in nats
    a token. `at_random` is the same for each of several random orders.
    """

    axis: str
    full: int
    size: int
    by_importance: float
    at_random: tuple[float, ...]

    @property
    def random_mean(self) -> float:
        return sum(self.at_random) / len(self.at_random)

    @property
    def random_spread(self) -> float:
        """The standard deviation of a random order's loss."""
        mean, count = self.random_mean, len(self.at_random)
        return math.sqrt(sum((lost - mean) ** 2 for lost in self.at_random) / (count - 1))

    @property
    def beats_random(self) -> bool:
        """Whether importance loses less than random orders do: less than their mean by more than its standard error."""
        return self.by_importance < self.random_mean - self.random_spread / math.sqrt(len(self.at_random))


def sizes_to_compare(axes: Axes, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The middle and the smallest choice of every (bound) axis that has an order, is elastic, and is in `model`."""
    full, sizes = full_subnet(model), {}
    for axis in axes.names:
        choices = axes.choices(axis)
        if len(choices) > 1 and axis not in NUMBERS and (axis == "depth" or getattr(full, axis)):
            sizes[axis] = tuple(sorted({choices[len(choices) // 2], choices[-1]}, reverse=True))
    return sizes


@torch.no_grad()
def compare_orders(
    model: ElasticNemotronH,
    axes: Axes,
    layer_ranking: Sequence[int],
    distance: Callable[[Subnet], float],
    *,
    random_orders: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> tuple[Cut, ...]:
    """Cut each elastic axis alone, at its middle and its smallest choice, by importance and in random orders.

    `model` is in the order of importance; `layer_ranking` ranks its layers. `distance` says how far `model` at a subnet
    is from the whole `model`. It is called cuts x (1 + random_orders) times: 54 for the 9 cuts of the 12B recipe and 5
    random orders. For a random order the components of the axis are permuted inside `model`, tensor by tensor, so that
    there is never a second copy of the weights. Afterwards the model computes the same function, but its order of
    importance is lost.
    """
    config, wanted = model.config, sizes_to_compare(axes, model.config)
    full = full_subnet(config)
    total, done = sum(map(len, wanted.values())) * (1 + random_orders), 0

    def measured(subnet: Subnet) -> float:
        nonlocal done
        found, done = distance(subnet), done + 1
        if progress is not None:
            progress(done, total)
        return found

    def lost(axis: str, sizes: Sequence[int], ranking: Sequence[int]) -> list[float]:
        return [measured(cut_axis(full, axis, size, ranking)) for size in sizes]

    cuts = list[Cut]()
    for axis, sizes in wanted.items():
        by_importance, at_random = lost(axis, sizes, layer_ranking), []
        for _ in range(random_orders):
            order = _along(axis, random_order(config, generator), config)
            reorder_model(model, order)
            at_random.append(lost(axis, sizes, order.layers))
        cuts += [
            Cut(axis=axis, full=axes.choices(axis)[0], size=size, by_importance=ours, at_random=tuple(theirs))
            for size, ours, *theirs in zip(sizes, by_importance, *at_random, strict=True)
        ]
    return tuple(cuts)


def reorder_model(model: ElasticNemotronH, order: Order) -> None:
    """Put a model's components in another order, in place: its weights, and what scales its norms."""
    reorder_in_place(model.state_dict(), order, model.config)
    if model.energy is not None:
        model.scale_norms(model.energy.permuted(order.hidden))


def cut_axis(full: Subnet, axis: str, size: int, layer_ranking: Sequence[int]) -> Subnet:
    """The whole model with `axis` alone cut to `size`."""
    if axis == "depth":
        return dataclasses.replace(full, layers=keep_layers(layer_ranking, size))
    whole = getattr(full, axis)
    changed: dict[str, Any] = {axis: (size,) * len(whole) if isinstance(whole, tuple) else size}
    return dataclasses.replace(full, **changed)


def _along(axis: str, order: Order, config: ModelConfig) -> Order:
    """The order that moves the components of `axis` as `order` does, and no others."""
    name = "layers" if axis == "depth" else axis
    return dataclasses.replace(identity_order(config), **{name: getattr(order, name)})
