"""The one-time permutation of a model into importance order, which leaves its function unchanged (C2).

Afterwards every subnet is a prefix. Hidden channels and FFN neurons move freely; Mamba heads move inside their SSM
group, and the channels of all heads of a layer move alike; query heads move inside their KV group; experts move inside
their expert group, and the neurons of each of them on their own; the latent channels of all experts of a layer move
alike. Keys, values, B, C and the layers stay where they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_core.files.checkpoint import (
    ENERGY,
    ORDER_FILE,
    CheckpointError,
    TensorPlace,
    open_checkpoint,
    tensor_places,
    write_checkpoint,
)
from elastic_core.files.shards import Index, Progress, is_finite, read_tensors, regular_file, select, write_tensors
from elastic_core.geometry import MEMBERS, NUMBERS, Axes, ModelConfig
from elastic_core.layers.norm import Energy
from elastic_core.layout import indices

# How the entries of some axes are called in the file.
_FILE_NAMES = {"mamba_head_dim": "mamba_channels", "attention_heads": "query_heads"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """Indices of the components of each axis, most important first; the tuples have one entry a layer of their kind.

    `hidden` (D,), `ffn` (F,), `mamba_head_dim` (P,), `shared_ffn` (F,); `latent` (L,) where experts have latent
    channels. `mamba_heads` (H,), `attention_heads` (Q,) and `experts` (N,) hold every group's own in that group's
    place. `expert_ffn` (N, F) has the neurons of every expert, by the expert's index before the reorder. `layers` ranks
    the layers, which are kept by rank and do not move; those that every subnet keeps come first, in model order.
    `energy` (D,), float32, is no index: the mean square of each hidden channel in the normalised stream, in the order
    of `hidden`, by which the norms of subnets are scaled.
    """

    hidden: Tensor
    ffn: tuple[Tensor, ...]
    mamba_heads: tuple[Tensor, ...]
    mamba_head_dim: tuple[Tensor, ...]
    attention_heads: tuple[Tensor, ...]
    layers: tuple[int, ...]
    expert_ffn: tuple[Tensor, ...] = ()
    experts: tuple[Tensor, ...] = ()
    shared_ffn: tuple[Tensor, ...] = ()
    latent: tuple[Tensor, ...] = ()
    energy: Tensor | None = None


def identity_order(config: ModelConfig) -> Order:
    """The order that moves nothing and ranks the layers from the first to the last."""
    return _order(config, torch.arange)


def random_order(config: ModelConfig, generator: torch.Generator) -> Order:
    """A uniformly random order: what importance is compared with."""
    return _order(config, lambda size: torch.randperm(size, generator=generator))


def _order(config: ModelConfig, permutation: Callable[[int], Tensor]) -> Order:
    def grouped(size: int, groups: int) -> Tensor:
        in_group = size // groups
        return torch.cat([group * in_group + permutation(in_group) for group in range(groups)])

    def entry(axis: str, size: int) -> Tensor:
        if axis in MEMBERS:
            return torch.stack([permutation(size) for _ in range(config.full_sizes(MEMBERS[axis])[0])])
        return grouped(size, config.groups(axis))

    hidden = permutation(config.hidden_size)
    sizes: dict[str, Any] = {
        axis: tuple(entry(axis, size) for size in config.full_sizes(axis)) for axis in Axes.ORDERED
    }
    return Order(hidden=hidden, layers=tuple(permutation(config.num_layers).tolist()), **sizes)


def check_order(order: Order, config: ModelConfig) -> None:
    """Raise ValueError unless every entry of `order` is a permutation that keeps heads inside their groups."""
    _check_permutation("order.hidden", order.hidden, config.hidden_size)
    if order.energy is not None:
        _check_energy(order.energy, config.hidden_size)
    _check_permutation("order.layers", torch.tensor(order.layers), config.num_layers)
    for axis in Axes.ORDERED:
        entries, sizes = getattr(order, axis), config.full_sizes(axis)
        if len(entries) != len(sizes):
            raise ValueError(f"order.{axis} has {len(entries)} layers; the model has {len(sizes)}")
        for i, (entry, size) in enumerate(zip(entries, sizes, strict=True)):
            if axis in MEMBERS and len(entry) != config.full_sizes(MEMBERS[axis])[i]:
                raise ValueError(f"order.{axis}[{i}] is {list(entry.shape)}; expected one row each of {MEMBERS[axis]}")
            for row in entry if axis in MEMBERS else (entry,):
                _check_permutation(f"order.{axis}[{i}]", row, size, config.groups(axis))


def _check_energy(energy_D: Tensor, size: int) -> None:
    if energy_D.dtype != torch.float32 or energy_D.shape != (size,):
        raise ValueError(f"order.energy is {energy_D.dtype} {list(energy_D.shape)}; expected float32 [{size}]")
    if not (is_finite(energy_D) and bool((energy_D >= 0).all()) and float(energy_D[0]) > 0):
        raise ValueError("order.energy must be finite, not negative, and more than 0 in its first channel")


def _check_permutation(where: str, entry: Tensor, size: int, groups: int = 1) -> None:
    if entry.dtype != torch.int64 or entry.shape != (size,):
        raise ValueError(f"{where} is {entry.dtype} {list(entry.shape)}; expected int64 [{size}]")
    if not torch.equal(entry.sort().values, torch.arange(size)):
        raise ValueError(f"{where} is not a permutation of 0..{size - 1}")
    in_group = size // groups
    if not torch.equal(entry // in_group, torch.arange(size) // in_group):
        raise ValueError(f"{where} moves heads from one group of {in_group} to another; they must stay in their group")


def write_order(directory: Path, order: Order) -> None:
    """Write `order` into the directory of an elastic checkpoint."""
    write_tensors(directory / ORDER_FILE, _named(order))


def _named(order: Order) -> dict[str, Tensor]:
    tensors = {"hidden": order.hidden, "layers": torch.tensor(order.layers)}
    for axis in Axes.ORDERED:
        tensors |= {f"{_FILE_NAMES.get(axis, axis)}.{i}": entry for i, entry in enumerate(getattr(order, axis))}
    return tensors if order.energy is None else tensors | {ENERGY: order.energy}


def read_order(directory: Path, config: ModelConfig) -> Order:
    """The order of an elastic checkpoint; CheckpointError unless it fits `config`."""
    path = regular_file(directory, ORDER_FILE)
    tensors = read_tensors(path)
    expected, energy = _named(identity_order(config)), tensors.pop(ENERGY, None)
    if tensors.keys() != expected.keys():
        different = sorted(tensors.keys() ^ expected.keys())
        raise CheckpointError(f"{path}: missing or unexpected: {', '.join(different)}; it belongs to another model")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64 or tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name}: is {tensor.dtype} {list(tensor.shape)}; expected int64 {list(expected[name].shape)}"
            )

    entries: dict[str, Any] = {
        axis: tuple(tensors[f"{_FILE_NAMES.get(axis, axis)}.{i}"] for i in range(len(config.layers_on(axis))))
        for axis in Axes.ORDERED
    }
    order = Order(hidden=tensors["hidden"], layers=tuple(tensors["layers"].tolist()), energy=energy, **entries)
    try:
        check_order(order, config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return order


def read_energy(directory: Path, config: ModelConfig) -> Energy | None:
    """What scales the norms of an elastic checkpoint's subnets; None where nothing does, as in a stock checkpoint."""
    if not (directory / ORDER_FILE).exists():
        return None
    energy_D = read_order(directory, config).energy
    return None if energy_D is None else Energy(energy_D)


def reorder_weights(weights: Mapping[str, Tensor], order: Order, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of a model in `order`, by name in memory; those that do not move are the same objects."""
    check_order(order, config)
    return {
        name: select(weights[_source(name, place, order, config)], _indices(place, order, config))
        for name, place in tensor_places(config).items()
    }


@torch.no_grad()
def reorder_in_place(weights: Mapping[str, Tensor], order: Order, config: ModelConfig) -> None:
    """Put all tensors of a model, by name in memory and on any device, in `order`.

    One tensor at a time is copied; of experts, which change places, those of a layer.
    """
    check_order(order, config)
    places = tensor_places(config)
    sources = {name: _source(name, place, order, config) for name, place in places.items()}
    for layer in range(config.num_layers):
        moving = [name for name, source in sources.items() if places[name].layer == layer and source != name]
        before = {sources[name]: weights[sources[name]].clone() for name in moving}
        for name in moving:
            weights[name].copy_(before[sources[name]])
    for name, place in places.items():
        for dim, index in enumerate(_indices(place, order, config)):
            if index is not None and not torch.equal(index, torch.arange(len(index))):
                weights[name].copy_(weights[name].index_select(dim, index.to(weights[name].device)))


def reorder_checkpoint(
    source: Path,
    order: Order,
    target: Path,
    *,
    beside: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write the checkpoint `source` in `order` to the new directory `target`, in bounded memory (C7).

    Returns the SHA-256 of the weight files by name.
    """
    checkpoint = open_checkpoint(source)
    config, places = checkpoint.config, tensor_places(checkpoint.config)
    check_order(order, config)
    return write_checkpoint(
        target,
        config,
        checkpoint.tensors,
        lambda name: checkpoint.tensors[_source(name, places[name], order, config)].blocks(
            *_indices(places[name], order, config)
        ),
        source=source,
        beside=beside,
        progress=progress,
    )


def _member(place: TensorPlace, order: Order, config: ModelConfig) -> int:
    """The index, before the reorder, of the member that the tensor at `place` is of afterwards."""
    assert place.layer is not None and place.layout.member is not None, f"{place}"
    of_layers = getattr(order, place.layout.member.axis)
    return int(of_layers[config.ordinal(place.layer)][place.layout.member.index])


def _source(name: str, place: TensorPlace, order: Order, config: ModelConfig) -> str:
    """The tensor that the tensor `name` comes from: that of another expert, where experts move."""
    member = place.layout.member
    return name if member is None else member.renamed(name, _member(place, order, config))


def _indices(place: TensorPlace, order: Order, config: ModelConfig) -> tuple[Index, ...]:
    """Where the entries along each dimension of a tensor come from; None where nothing moves."""
    moved = {"hidden": order.hidden}
    if place.layer is not None:
        ordinal = config.ordinal(place.layer)
        for axis in config.axes_of(config.hybrid_override_pattern[place.layer]):
            if axis in NUMBERS:
                continue
            entry, groups = getattr(order, axis)[ordinal], config.groups(axis)
            if axis in MEMBERS:
                if place.layout.member is not None:
                    moved[axis] = entry[_member(place, order, config)]
                continue
            in_group = len(entry) // groups
            moved[axis] = entry if groups == 1 else (entry % in_group).view(groups, in_group)
    return tuple(indices(dim, moved) for dim in place.layout.dims)
