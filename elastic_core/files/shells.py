"""Shells: a family stored as its smallest slice and, for each larger one, only what it adds to the one below.

Slices nest (C2): the smaller one lies in the larger one at the indices that it keeps. What the larger one adds to a
matrix X is two rectangles, whole rows, and columns of the rows that both have (drawn together, though they interleave):

                  kept      added
              +---------+-----------+
      kept    |  below  | X.columns |
              +---------+-----------+
      added   |          X          |
              +---------------------+

A shell is a directory: shell.json says where the slice below lies, shell*.safetensors hold the rectangles. The zero
neurons that pad FFN layers to one width are in no shell. A shell of another hidden size than the slice below has
the norms of the residual stream whole, because each hidden size has a gain of its own in them. Everything is read and
written in bounded pieces (C7), and what `assemble` writes is byte for byte what `slice_checkpoint` writes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from elastic_core.files import shards
from elastic_core.files.checkpoint import (
    CheckpointError,
    TensorPlace,
    disk_name,
    memory_name,
    open_checkpoint,
    read_config,
    tensor_places,
    tensor_shapes,
)
from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import (
    Progress,
    StoredTensor,
    TensorInfo,
    read_header,
    read_json,
    regular_file,
    write_json,
    write_shards,
)
from elastic_core.files.slicing import is_in, kept_indices, name_in_full_model
from elastic_core.geometry import ModelConfig
from elastic_core.schema import OPTIONAL, build, to_dict
from elastic_core.subnet import Subnet, check_subnet, full_subnet, sliced_config

SHELL_FILE = "shell.json"
MAX_FILE_BYTES = 10**9  # so that a download has several to fetch at once

Indices = tuple[Tensor, ...]  # rising, along each dimension
Rows = Callable[[int, int], Tensor]  # the rows of a tensor from one index up to another


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """What shell.json says of a slice: its own widths, without padding, and which part of it the slice below is.

    `ffn` has the width of each of its FFN layers, `expert_ffn` that of the experts of each of its `E` layers.
    `below` is None where nothing is below: such a shell has all of the slice but its padding. Of the stream's norms it
    has all where they are its "own", and what it adds to those below where they are "shared".
    """

    ffn: tuple[int, ...]
    below: Subnet | None
    norms: Literal["shared", "own"] = "shared"
    expert_ffn: tuple[int, ...] = field(default=(), metadata=OPTIONAL)
    format_version: Literal[1] = 1


# Writing


def write_shell(
    source: Path, target: Path, *, own: Subnet, below: Subnet | None, progress: Progress | None = None
) -> None:
    """Write what the slice `source` adds to its subnet `below` into the new directory `target`.

    `own` is the slice as a subnet of itself, with its widths without padding. Raises ValueError where `below` is not in
    the slice.
    """
    checkpoint = open_checkpoint(source)
    config = _unpadded(checkpoint.config, own.ffn, own.expert_ffn)
    if below is not None:
        check_subnet(below, config)
    is_wider = below is not None and below.hidden < config.hidden_size
    shell = Shell(ffn=own.ffn, expert_ffn=own.expert_ffn, below=below, norms="own" if is_wider else "shared")
    added = {
        key: (checkpoint.tensors[name], indices)
        for name, rectangles in _added(config, shell).items()
        for key, indices in rectangles.items()
    }
    plan = {key: TensorInfo(dtype=stored.dtype, shape=_shape(indices)) for key, (stored, indices) in added.items()}

    def blocks(key: str) -> Iterator[Tensor]:
        stored, indices = added[key]
        return stored.blocks(*indices)

    with staged_directory(target) as staging:
        write_json(staging / SHELL_FILE, to_dict(shell))
        if plan:
            for name in write_shards(staging, plan, blocks, max_shard_bytes=MAX_FILE_BYTES, progress=progress):
                (staging / name).rename(staging / name.replace("model", "shell"))
            (staging / "model.safetensors.index.json").unlink(missing_ok=True)


def _added(config: ModelConfig, shell: Shell) -> dict[str, dict[str, Indices]]:
    """By tensor in memory: the rectangles, by their names on disk, that the shell of a slice of this geometry holds."""
    places, added, below = tensor_places(config), {}, shell.below
    for name, shape in tensor_shapes(config).items():
        key, every, place = disk_name(name), _every(shape), places[name]
        if below is None or _is_own(place, shell) or not is_in(place, below, config):
            added[name] = {key: every}
            continue
        kept = _kept(config, below, place, shape)
        rectangles = {key: (_others(kept[0], shape[0]), *every[1:])}
        if len(shape) > 1:
            rectangles[f"{key}.columns"] = (kept[0], _others(kept[1], shape[1]), *every[2:])
        added[name] = {key: indices for key, indices in rectangles.items() if all(len(index) for index in indices)}
    return added


def _is_own(place: TensorPlace, shell: Shell) -> bool:
    return shell.norms == "own" and place.stream_norm


def _kept(config: ModelConfig, below: Subnet, place: TensorPlace, shape: Sequence[int]) -> Indices:
    """Where a tensor of the slice `below` lies in that of a slice of this geometry."""
    kept = kept_indices(place, below, config)
    return tuple(every if index is None else index for every, index in zip(_every(shape), kept, strict=True))


def _every(shape: Sequence[int]) -> Indices:
    return tuple(torch.arange(size) for size in shape)


def _others(kept: Tensor, size: int) -> Tensor:
    return torch.ones(size, dtype=torch.bool).index_fill(0, kept, False).nonzero().flatten()


def _shape(indices: Indices) -> tuple[int, ...]:
    return tuple(len(index) for index in indices)


def _unpadded(config: ModelConfig, ffn: tuple[int, ...], expert_ffn: tuple[int, ...]) -> ModelConfig:
    """The geometry of a slice without the zero neurons that pad its FFN layers and experts to one width each.

    A shell that was written before experts could be padded has no `expert_ffn`.
    """
    full = full_subnet(config)
    return sliced_config(config, dataclasses.replace(full, ffn=ffn, expert_ffn=expert_ffn or full.expert_ffn))


# Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor(TensorInfo):
    """A tensor of a slice, wherever its rows come from."""

    rows: Rows


def assemble(directory: Path, shells: Sequence[Path], *, progress: Progress | None = None) -> dict[str, str]:
    """Write the weights of the slice whose config.json is in `directory` beside it; their SHA-256 by file name.

    `shells` are the slice's own and all below it, the smallest first; the first may be a whole slice. Raises
    CheckpointError for shells that do not make up exactly this slice.
    """
    config, shell = read_config(directory), read_shell(shells[-1])
    with _named(f"{shells[-1] / SHELL_FILE}: ffn"):
        unpadded = _unpadded(config, shell.ffn, shell.expert_ffn)
    tensors = _assembled(unpadded, shells)
    plan = {}
    for name, shape in tensor_shapes(config).items():
        own = tensors[name]
        if own.shape != shape:
            tensors[name] = _union(shape, own.dtype, [(_every(own.shape), own.rows)])
        plan[disk_name(name)] = TensorInfo(dtype=own.dtype, shape=shape)
    return write_shards(directory, plan, lambda key: _blocks(tensors[memory_name(key)]), progress=progress)


def read_shell(directory: Path) -> Shell:
    """The shell.json of a shell; its numbers are checked where they meet the slice that they are of."""
    path = regular_file(directory, SHELL_FILE)
    with _named(str(path)):
        return build(Shell, read_json(path))


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Turn a ValueError about numbers into a CheckpointError about the file that they are from."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def _assembled(config: ModelConfig, shells: Sequence[Path]) -> dict[str, _Tensor]:
    """The tensors, by name in memory, of the slice of this (unpadded) geometry."""
    *smaller, directory = shells
    if not smaller and not (directory / SHELL_FILE).exists():
        return _whole(config, directory)
    shell = read_shell(directory)
    below = shell.below
    if (below is None) == bool(smaller):
        raise CheckpointError(f"{directory / SHELL_FILE}: below is {below}; there are {len(smaller)} slices below")
    kept: dict[str, _Tensor] = {}
    if below is not None:
        with _named(f"{directory / SHELL_FILE}: below"):
            inner_config = sliced_config(config, below)
            inner, inner_places = _assembled(inner_config, smaller), tensor_places(inner_config)
        kept = {name_in_full_model(name, inner_places[name], below, config): tensor for name, tensor in inner.items()}
    places, added = tensor_places(config), _added(config, shell)
    stored = _stored(directory, {key: _shape(i) for rectangles in added.values() for key, i in rectangles.items()})
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        pieces = [(indices, stored[key]) for key, indices in added[name].items()]
        if below is not None and name in kept and not _is_own(places[name], shell):
            pieces.append((_kept(config, below, places[name], shape), kept[name]))
        dtypes = {piece.dtype for _, piece in pieces}
        if len(dtypes) > 1:
            raise CheckpointError(f"{directory}: {disk_name(name)}: its parts are {', '.join(map(str, dtypes))}")
        tensors[name] = _union(shape, dtypes.pop(), [(indices, piece.rows) for indices, piece in pieces])
    return tensors


def _whole(config: ModelConfig, directory: Path) -> dict[str, _Tensor]:
    """The tensors of a slice that is there as a checkpoint, without the zeros that pad it."""
    tensors, shapes = open_checkpoint(directory).tensors, tensor_shapes(config)
    if tensors.keys() != shapes.keys():
        raise CheckpointError(f"{directory}: holds other layers than the shell above it says")
    for name, shape in shapes.items():
        if any(size > there for size, there in zip(shape, tensors[name].shape, strict=True)):
            raise CheckpointError(
                f"{directory}: {tensors[name].name}: has shape {list(tensors[name].shape)}; the shell above it "
                f"needs {list(shape)}"
            )
    return {name: _readable(tensors[name], shape) for name, shape in shapes.items()}


def _stored(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Tensor]:
    """The rectangles of a shell by name, when they are exactly these."""
    found: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("shell*.safetensors")):
        for key, tensor in read_header(regular_file(directory, path.name)).items():
            if key in found:
                raise CheckpointError(f"{path}: {key}: is in {found[key].path.name} too; expected it once")
            found[key] = tensor
    if found.keys() != shapes.keys():
        missing, unexpected = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
        raise CheckpointError(f"{directory}: missing: {missing[:6] or 'none'}; unexpected: {unexpected[:6] or 'none'}")
    for key, shape in shapes.items():
        if found[key].shape != shape or not found[key].dtype.is_floating_point:
            raise CheckpointError(
                f"{found[key].path}: {key}: is {found[key].dtype} {list(found[key].shape)}; expected floats of "
                f"shape {list(shape)}"
            )
    return {key: _readable(found[key], shape) for key, shape in shapes.items()}


def _readable(stored: StoredTensor, shape: tuple[int, ...]) -> _Tensor:
    columns = _every(shape[1:])

    def rows(start: int, stop: int) -> Tensor:
        blocks = [*stored.blocks(torch.arange(start, stop), *columns)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    return _Tensor(dtype=stored.dtype, shape=shape, rows=rows)


def _union(shape: tuple[int, ...], dtype: torch.dtype, pieces: Sequence[tuple[Indices, Rows]]) -> _Tensor:
    """The tensor that has each piece at its indices, and zeros elsewhere."""

    def rows(start: int, stop: int) -> Tensor:
        whole = torch.zeros(stop - start, *shape[1:], dtype=dtype)
        for (row_indices, *others), read in pieces:
            first, last = torch.searchsorted(row_indices.contiguous(), torch.tensor([start, stop])).tolist()
            if first < last:
                _put(whole, (row_indices[first:last] - start, *others), read(first, last))
        return whole

    return _Tensor(dtype=dtype, shape=shape, rows=rows)


def _put(target: Tensor, indices: Indices, values: Tensor) -> None:
    """Write `values` where `indices` lie in `target`; all dimensions but one must be runs, as all of ours are."""
    scattered = None
    for dim, index in enumerate(indices):
        first, last = int(index[0]), int(index[-1])
        if last - first + 1 == len(index):
            target = target.narrow(dim, first, len(index))
        else:
            assert scattered is None, f"dimensions {scattered} and {dim} are both scattered"
            scattered = dim
    if scattered is None:
        target.copy_(values)
    else:
        target.index_copy_(scattered, indices[scattered], values)


def _blocks(tensor: _Tensor) -> Iterator[Tensor]:
    row_bytes = tensor.nbytes // tensor.shape[0]
    step = max(1, shards.CHUNK_BYTES // row_bytes)
    for start in range(0, tensor.shape[0], step):
        yield tensor.rows(start, min(start + step, tensor.shape[0]))
