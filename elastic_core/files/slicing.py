"""Cutting a subnet out of an elastic checkpoint: the result is a stock checkpoint that inference engines load."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.cost import subnet_params
from elastic_core.files.card import slice_card
from elastic_core.files.checkpoint import (
    FAMILY_FILE,
    TensorPlace,
    main_dtype,
    open_checkpoint,
    read_config,
    read_family,
    tensor_places,
    write_checkpoint,
)
from elastic_core.files.reorder import read_energy
from elastic_core.files.shards import CHUNK_BYTES, Index, Progress, TensorInfo, select
from elastic_core.files.side_files import CARD_FILE
from elastic_core.geometry import BY_LAYER, FULL_SIZES, FfnLayout, ModelConfig
from elastic_core.layers.norm import Energy
from elastic_core.layout import indices, prefixes
from elastic_core.subnet import Subnet, kept_at, sliced_config


def target_config(config: ModelConfig, subnet: Subnet, *, ffn_layout: FfnLayout = "padded") -> ModelConfig:
    """Geometry of the checkpoint that `subnet` is cut out to; padded, its FFN layers and experts have one width each.

    Raises ValueError for a subnet that is not in the model or that no engine loads.
    """
    sliced = sliced_config(config, subnet)
    if ffn_layout == "list":
        return sliced
    widths: dict[str, Any] = {FULL_SIZES[axis]: max(sizes) for axis in BY_LAYER if (sizes := sliced.full_sizes(axis))}
    return dataclasses.replace(sliced, **widths)


def slice_weights(
    weights: Mapping[str, Tensor],
    subnet: Subnet,
    config: ModelConfig,
    *,
    ffn_layout: FfnLayout = "padded",
    energy: Energy | None = None,
) -> dict[str, Tensor]:
    """The weights of `subnet` as a stock model of its own, by name in memory; see `slice_checkpoint`.

    `energy` is what scales the norms of the model's subnets.
    """
    places = tensor_places(config)
    sliced = {}
    for name, place in tensor_places(target_config(config, subnet, ffn_layout=ffn_layout)).items():
        old = name_in_full_model(name, place, subnet, config)
        kept = _scaled(select(weights[old], kept_indices(places[old], subnet, config)), place, subnet, energy)
        sliced[name] = torch.cat([*_padded([kept], TensorInfo(dtype=kept.dtype, shape=place.layout.shape()))])
    return sliced


def slice_checkpoint(
    source: Path,
    subnet: Subnet,
    target: Path,
    *,
    ffn_layout: FfnLayout = "padded",
    beside: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Cut `subnet` out of the checkpoint `source` into the new directory `target`, in bounded memory (C7).

    The stream's norms are multiplied by the gain of the hidden size, where the source has one, and are at least float32
    then.

    Widths of FFN layers and experts that differ by layer are padded with zero neurons to one width, which is the same
    function, or with "list" written as they are, those of experts in the form of NVIDIA's Puzzle. Returns the SHA-256
    of the weight files by name. Raises ValueError for a subnet that is not in the model or that no engine loads.
    """
    checkpoint = open_checkpoint(source)
    config, places = checkpoint.config, tensor_places(checkpoint.config)
    new_config = target_config(config, subnet, ffn_layout=ffn_layout)
    new_places = tensor_places(new_config)
    energy = read_energy(source, config)
    old_names = {name: name_in_full_model(name, place, subnet, config) for name, place in new_places.items()}
    stored = {name: checkpoint.tensors[old] for name, old in old_names.items()}
    plan = {
        name: TensorInfo(
            dtype=_scaled(torch.empty(0, dtype=stored[name].dtype), place, subnet, energy).dtype,
            shape=place.layout.shape(),
        )
        for name, place in new_places.items()
    }

    def blocks(name: str) -> Iterator[Tensor]:
        kept = kept_indices(places[old_names[name]], subnet, config)
        blocks = (_scaled(block, new_places[name], subnet, energy) for block in stored[name].blocks(*kept))
        return _padded(blocks, plan[name])

    def with_card(staging: Path) -> None:
        (staging / CARD_FILE).write_text(_card(source, subnet, new_config, plan), encoding="utf-8")
        if beside is not None:
            beside(staging)

    return write_checkpoint(target, new_config, plan, blocks, source=source, beside=with_card, progress=progress)


def _card(source: Path, subnet: Subnet, sliced: ModelConfig, plan: Mapping[str, TensorInfo]) -> str:
    """The slice's model card: named by its budget, where the subnet is that of one."""
    family = read_family(source) if (source / FAMILY_FILE).exists() else None
    budgets = family.budgets if family is not None else ()
    params = subnet_params(read_config(source), subnet)
    return slice_card(
        sliced,
        params=params,
        zeros=sum(math.prod(planned.shape) for planned in plan.values()) - params,
        dtype=str(main_dtype(plan.values())).removeprefix("torch."),
        family=family,
        name=next((f"Budget {budget.name}" for budget in budgets if budget.subnet == subnet), "A size of its own"),
    )


def name_in_full_model(name: str, place: TensorPlace, subnet: Subnet, config: ModelConfig) -> str:
    """The tensor of the full model that the slice's tensor `name` is cut from.

    `place` is its place in the slice, in which kept layers and kept experts are numbered anew.
    """
    if place.layer is None:
        return name
    if (member := place.layout.member) is not None:
        in_group = config.full_sizes(member.axis)[0] // config.groups(member.axis)
        name = member.renamed(name, member.within(in_group))
    return name.replace(f"layers.{place.layer}.", f"layers.{subnet.layers[place.layer]}.", 1)


def is_in(place: TensorPlace, subnet: Subnet, config: ModelConfig) -> bool:
    """Whether `subnet` keeps anything of a tensor."""
    if place.layer is None:
        return True
    return place.layer in subnet.layers and place.layout.is_there(kept_at(subnet, config, place.layer))


def kept_indices(place: TensorPlace, subnet: Subnet, config: ModelConfig) -> tuple[Index, ...]:
    """What `subnet` keeps along each dimension of a tensor; None where it keeps all."""
    kept = {"hidden": subnet.hidden} if place.layer is None else kept_at(subnet, config, place.layer)
    return tuple(indices(dim, prefixes(kept)) for dim in place.layout.dims)


def _scaled(block: Tensor, place: TensorPlace, subnet: Subnet, energy: Energy | None) -> Tensor:
    return energy.scaled(block, subnet.hidden) if energy is not None and place.stream_norm else block


def _padded(blocks: Iterable[Tensor], planned: TensorInfo) -> Iterator[Tensor]:
    """Blocks of rows with zero columns and, after the last block, zero rows added up to the planned shape."""
    missing = planned.shape[0]
    for block in blocks:
        missing -= len(block)
        columns = planned.shape[1] - block.shape[1] if block.ndim == 2 else 0
        yield F.pad(block, (0, columns)) if columns else block
    row = torch.zeros(1, *planned.shape[1:], dtype=planned.dtype)
    step = max(1, CHUNK_BYTES // row.nbytes)
    for done in range(0, missing, step):
        yield row.expand(min(step, missing - done), *planned.shape[1:])
