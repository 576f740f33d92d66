"""The one-time permutation of a model into importance order, which leaves its function unchanged (C2).

Afterwards every subnet is a prefix. Hidden channels and FFN neurons move freely; Mamba heads move inside their SSM
group, and the channels of all heads of a layer move alike; query heads move inside their KV group. Keys, values, B, C
and the layers stay where they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.files.checkpoint import (
    ORDER_FILE,
    Axis,
    CheckpointError,
    Place,
    mamba_indices,
    open_checkpoint,
    tensor_places,
    write_checkpoint,
)
from elastic_core.files.shards import Index, Progress, read_tensors, regular_file, select, write_tensors
from elastic_core.geometry import ATTENTION, FFN, MAMBA, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """Indices of the components of each axis, most important first; the tuples have one entry a layer of their kind.

    `hidden` (D,), `ffn` (F,), `mamba_channels` (P,). `mamba_heads` (H,) and `query_heads` (Q,) hold every group's own
    heads in that group's place. `layers` ranks the layers, which are kept by rank and do not move.
    """

    hidden: Tensor
    ffn: tuple[Tensor, ...]
    mamba_heads: tuple[Tensor, ...]
    mamba_channels: tuple[Tensor, ...]
    query_heads: tuple[Tensor, ...]
    layers: tuple[int, ...]


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

    mamba, attention = config.layers_of(MAMBA), config.layers_of(ATTENTION)
    return Order(
        hidden=permutation(config.hidden_size),
        ffn=tuple(permutation(width) for width in config.ffn_sizes),
        mamba_heads=tuple(grouped(config.mamba_num_heads, config.n_groups) for _ in mamba),
        mamba_channels=tuple(permutation(config.mamba_head_dim) for _ in mamba),
        query_heads=tuple(grouped(config.num_attention_heads, config.num_key_value_heads) for _ in attention),
        layers=tuple(permutation(config.num_layers).tolist()),
    )


def check_order(order: Order, config: ModelConfig) -> None:
    """Raise ValueError unless every entry of `order` is a permutation that keeps heads inside their groups."""
    _check_permutation("order.hidden", order.hidden, config.hidden_size)
    _check_permutation("order.layers", torch.tensor(order.layers), config.num_layers)
    mamba, attention = len(config.layers_of(MAMBA)), len(config.layers_of(ATTENTION))
    expected: tuple[tuple[str, tuple[int, ...], int], ...] = (
        ("ffn", config.ffn_sizes, 1),
        ("mamba_heads", (config.mamba_num_heads,) * mamba, config.n_groups),
        ("mamba_channels", (config.mamba_head_dim,) * mamba, 1),
        ("query_heads", (config.num_attention_heads,) * attention, config.num_key_value_heads),
    )
    for name, sizes, groups in expected:
        entries: tuple[Tensor, ...] = getattr(order, name)
        if len(entries) != len(sizes):
            raise ValueError(f"order.{name} has {len(entries)} layers; the model has {len(sizes)}")
        for i, (entry, size) in enumerate(zip(entries, sizes, strict=True)):
            _check_permutation(f"order.{name}[{i}]", entry, size, groups)


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
    for name in ("ffn", "mamba_heads", "mamba_channels", "query_heads"):
        tensors |= {f"{name}.{i}": entry for i, entry in enumerate(getattr(order, name))}
    return tensors


def read_order(directory: Path, config: ModelConfig) -> Order:
    """The order of an elastic checkpoint; CheckpointError unless it fits `config`."""
    path = regular_file(directory, ORDER_FILE)
    tensors = read_tensors(path)
    expected = _named(identity_order(config))
    if tensors.keys() != expected.keys():
        different = sorted(tensors.keys() ^ expected.keys())
        raise CheckpointError(f"{path}: missing or unexpected: {', '.join(different)}; it belongs to another model")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64 or tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: {name}: is {tensor.dtype} {list(tensor.shape)}; expected int64 {list(expected[name].shape)}"
            )

    def entries(name: str, kind: str) -> tuple[Tensor, ...]:
        return tuple(tensors[f"{name}.{i}"] for i in range(len(config.layers_of(kind))))

    order = Order(
        hidden=tensors["hidden"],
        ffn=entries("ffn", FFN),
        mamba_heads=entries("mamba_heads", MAMBA),
        mamba_channels=entries("mamba_channels", MAMBA),
        query_heads=entries("query_heads", ATTENTION),
        layers=tuple(tensors["layers"].tolist()),
    )
    try:
        check_order(order, config)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return order


def reorder_weights(weights: Mapping[str, Tensor], order: Order, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of a model in `order`, by name in memory; those that do not move are the same objects."""
    check_order(order, config)
    return {
        name: select(weights[name], _indices(place, order, config)) for name, place in tensor_places(config).items()
    }


@torch.no_grad()
def reorder_in_place(weights: Mapping[str, Tensor], order: Order, config: ModelConfig) -> None:
    """Put all tensors of a model, by name in memory and on any device, in `order`; one tensor at a time is copied."""
    check_order(order, config)
    for name, place in tensor_places(config).items():
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
        lambda name: checkpoint.tensors[name].blocks(*_indices(places[name], order, config)),
        source=source,
        beside=beside,
        progress=progress,
    )


def _indices(place: Place, order: Order, config: ModelConfig) -> tuple[Index, ...]:
    """Where the entries along each dimension of a tensor come from; None where nothing moves."""
    moved: dict[Axis, Tensor] = {"hidden": order.hidden}
    if place.layer is not None:
        kind, ordinal = config.hybrid_override_pattern[place.layer], config.ordinal(place.layer)
        if kind == MAMBA:
            heads = order.mamba_heads[ordinal]
            moved |= mamba_indices(config, _spread(heads, order.mamba_channels[ordinal]), heads)
        elif kind == ATTENTION:
            moved["query"] = _spread(order.query_heads[ordinal], torch.arange(config.head_dim))
        else:
            moved["ffn"] = order.ffn[ordinal]
    return tuple(moved.get(axis) for axis in place.axes)


def _spread(heads: Tensor, channels: Tensor) -> Tensor:
    """Indices of all channels of `heads`, those of each head in the order `channels`."""
    return (heads[:, None] * len(channels) + channels).flatten()
