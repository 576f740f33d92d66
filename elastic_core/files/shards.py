"""Safetensors files, read and written in bounded pieces.

A safetensors file is 8 bytes of header length, a JSON header {name: dtype, shape, data_offsets}, then raw data. Only
headers are read on opening, and all of a header is checked before any of it is used. Data is read with plain reads
instead of a memory map, because mapped pages count as resident memory: a 24 GB checkpoint streams in under 1 GiB.
Reading, hashing and writing go on at the same time, a few chunks apart, and leave no trail in the page cache: finding
room there for what is used once can take longer than the disk does.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from elastic_core.files.pointers import pointer_fault

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by itemsize: what numpy, which lacks bfloat16, can move

MAX_JSON_BYTES = 100_000_000  # the limit that the safetensors library sets for a header
CHUNK_BYTES = 8 * 2**20  # read, selected, hashed and written at once; small, to stay in the processor's cache
CHUNKS_AHEAD = 2  # made while one is written
BLOCK_BYTES = 256 * 2**20  # gathered at once where rows change their order; holds any matrix of a 12B model
UNWRITTEN_BYTES = 64 * 2**20  # of a file, that may wait in the page cache for the disk
MAX_BUFFERS = 1024  # filled by one call: IOV_MAX of Linux and macOS

Index = Tensor | None
Progress = Callable[[int, int], None]  # bytes done, bytes in all


class CheckpointError(ValueError):
    """A file that cannot be used. One line: the file, the field or tensor, what was found, what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Type and shape of a tensor, stored or planned."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; aminmax passes both on and, unlike isfinite, makes no copy."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def select(tensor: Tensor, indices: Sequence[Index]) -> Tensor:
    """`tensor` with `indices[d]` selected along each dimension d (None: all); views where the indices are runs."""
    for dim, index in enumerate(indices):
        if index is not None:
            run = _run(index)
            tensor = tensor.narrow(dim, run[0], len(index)) if run else _take(tensor, dim, index)
    return tensor


def _take(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """`index_select` by numpy, which moves elements of two bytes three times as fast."""
    bits = tensor.detach().view(_BITS[tensor.dtype.itemsize]).numpy()
    return torch.from_numpy(np.take(bits, index.numpy(), axis=dim)).view(tensor.dtype)


def _run(index: Tensor) -> tuple[int, int] | None:
    """(start, stop) when `index` counts from start to stop, so that it can be a view."""
    start, stop = int(index[0]), int(index[0]) + len(index)
    return (start, stop) if torch.equal(index, torch.arange(start, stop)) else None


# Reading


def regular_file(directory: Path, name: str) -> Path:
    """The path of the regular file `name` of `directory`; CheckpointError where there is none to trust.

    A link is followed only within the directory or into the Hub cache's own layout (snapshots/REVISION/NAME ->
    blobs/HASH), so that a downloaded directory cannot have files of this machine read, copied and published.
    """
    path = directory / name
    if Path(name).name != name or "\\" in name:
        raise CheckpointError(f"{path}: is not a plain file name; expected a file of {directory} itself")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; copy or download it again")
    home, target = directory.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if target.parent not in (home, blobs):
        raise CheckpointError(f"{path}: links to {target}, outside the checkpoint; copy that file in its place")
    if fault := pointer_fault(path):
        raise CheckpointError(fault)
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`; CheckpointError for any other content and for a key given twice."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: is {path.stat().st_size} bytes; expected at most {MAX_JSON_BYTES}")
    return _parse_json(path, path.read_bytes())


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return values

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=object_of)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(value).__name__}; expected an object")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor(TensorInfo):
    """A tensor in a file; nothing of it is read until asked for. Reading raises CheckpointError at NaN or infinity."""

    path: Path
    name: str
    offset: int

    def read(self) -> Tensor:
        """The whole tensor."""
        with self.path.open("rb", buffering=0) as file:
            return self._rows(file, 0, self.shape[0]) if self.shape else self._rows(file, 0, 1)[0]

    def blocks(self, *indices: Index) -> Iterator[Tensor]:
        """The tensor with `indices[d]` selected along each dimension d (None: all), in consecutive blocks of rows.

        Reads the selected rows and no others. Holds a chunk, and BLOCK_BYTES as well where these rows are no run.
        """
        rows, others = indices[0], indices[1:]
        run = (0, self.shape[0]) if rows is None else _run(rows)
        step = self._rows_in(CHUNK_BYTES)
        with self.path.open("rb", buffering=0) as file:
            if run:
                for start in range(*run, step):
                    yield select(self._rows(file, start, min(start + step, run[1])), (None, *others))
            elif rows is not None:
                for wanted in torch.split(rows, self._rows_in(BLOCK_BYTES)):
                    for part in torch.split(self._gather(file, wanted), step):
                        yield select(part, (None, *others))

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _rows_in(self, size: int) -> int:
        return max(1, size // self._row_bytes)

    def _rows(self, file: FileIO, start: int, stop: int) -> Tensor:
        data = torch.empty((stop - start) * self._row_bytes, dtype=torch.uint8)
        self._fill(file, start, [data.numpy().data])
        return self._checked(data)

    def _gather(self, file: FileIO, rows: Tensor) -> Tensor:
        """These rows. The file is read forwards, past what is not wanted, each row straight into its place."""
        size = self._row_bytes
        data = torch.empty(len(rows) * size, dtype=torch.uint8)
        view = data.numpy().data
        source, place = rows.sort()
        begin = 0
        for run in torch.tensor_split(source, (source.diff() != 1).nonzero().flatten() + 1):
            places = place[begin : begin + len(run)].tolist()
            self._fill(file, int(run[0]), [view[i * size : (i + 1) * size] for i in places])
            begin += len(run)
        return self._checked(data)

    def _fill(self, file: FileIO, start: int, buffers: Sequence[memoryview]) -> None:
        """Read into `buffers`, one after the other, from row `start` on."""
        begin = file.seek(self.offset + start * self._row_bytes)
        left = _unfilled(buffers, 0)
        while left:
            count = os.readv(file.fileno(), left[:MAX_BUFFERS])
            if not count:
                raise CheckpointError(f"{self.path}: {self.name}: the file became shorter while it was read")
            left = _unfilled(left, count)
            # A chunk further back too: pages at the seam of two reads stay when only a part of them is named.
            _uncache(file, max(self.offset, begin - CHUNK_BYTES), file.tell())

    def _checked(self, data: Tensor) -> Tensor:
        tensor = data.view(self.dtype).view(-1, *self.shape[1:])
        if not is_finite(tensor):
            raise CheckpointError(f"{self.path}: {self.name}: holds NaN or infinity; expected finite numbers")
        return tensor


def _unfilled(buffers: Sequence[memoryview], count: int) -> list[memoryview]:
    """What is left of `buffers` when their first `count` bytes are filled."""
    for i, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[i + 1 :]]
        count -= len(buffer)
    return []


def _uncache(file: BinaryIO | FileIO, start: int, stop: int) -> None:
    """Let go of this part of the page cache; the disk begins to write what it has not written yet."""
    if hasattr(os, "posix_fadvise"):  # macOS lacks it
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name, every number of its header checked against the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: claims a header of {length} bytes; expected at most {MAX_JSON_BYTES}")
        if size < 8 + length:
            raise CheckpointError(f"{path}: is truncated: {size} bytes, too few for its header; copy it again")
        header = _parse_json(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is {metadata!r}; expected an object of texts")
    tensors = {name: _stored_tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors.values(), 8 + length, size)
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    where = f"{path}: {name}:"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is {entry!r}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where} has dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has shape {shape!r} and data_offsets {offsets!r}; expected whole numbers >= 0")
    tensor = StoredTensor(
        path=path, name=name, dtype=DTYPES[dtype], shape=tuple(shape), offset=data_start + int(offsets[0])
    )
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise CheckpointError(
            f"{where} has data_offsets {offsets}; shape {shape} of {dtype} takes {tensor.nbytes} bytes"
        )
    return tensor


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(path: Path, tensors: Iterable[StoredTensor], position: int, size: int) -> None:
    """The tensors must cover the file's data exactly, without gaps or overlaps, as safetensors demands."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            raise CheckpointError(f"{path}: {tensor.name}: begins at byte {tensor.offset}; expected {position}")
        position += tensor.nbytes
    if position != size:
        kind = "is truncated" if size < position else "has trailing bytes"
        raise CheckpointError(f"{path}: {kind}: {size} bytes, its header describes {position}; copy it again")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, by name; for small files."""
    return {name: stored.read() for name, stored in read_header(path).items()}


# Writing


def write_shards(
    directory: Path,
    plan: Mapping[str, TensorInfo],
    blocks: Callable[[str], Iterable[Tensor]],
    *,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write the planned tensors into `directory` as model*.safetensors (and its index); SHA-256 by file name.

    `blocks(name)` is asked for each tensor once and gives it as consecutive blocks of rows. Raises OSError when the
    disk is full, before the first byte where that can be known.
    """
    total = sum(tensor.nbytes for tensor in plan.values())
    free = shutil.disk_usage(directory).free
    if free < total:
        raise OSError(
            errno.ENOSPC,
            f"disk full: {total} bytes to write, {free} free; free some space and run again",
            str(directory),
        )
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    shards = _assign_shards(plan, max_shard_bytes)
    digests = {
        name: _write_file(directory / name, {key: plan[key] for key in keys}, blocks, report)
        for name, keys in shards.items()
    }
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, shard in shards.items() for key in shard},
        }
        write_json(directory / "model.safetensors.index.json", index)
    return digests


def _assign_shards(plan: Mapping[str, TensorInfo], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> its tensors, in order; a tensor larger than `max_shard_bytes` has a shard of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in plan.items():
        if groups[-1] and size + tensor.nbytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_file(
    path: Path, plan: Mapping[str, TensorInfo], blocks: Callable[[str], Iterable[Tensor]], report: Callable[[int], None]
) -> str:
    """Write one safetensors file piece by piece; returns its SHA-256."""
    # Larger elements first, as safetensors itself writes, so that every tensor is aligned to its own elements.
    plan = dict(sorted(plan.items(), key=lambda item: -item[1].dtype.itemsize))
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file, ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as hasher:

            def put(data: bytes | memoryview) -> None:
                hashed = hasher.submit(digest.update, data)
                file.write(data)
                _uncache(file, max(0, file.tell() - UNWRITTEN_BYTES), file.tell())
                hashed.result()

            put(_header(plan))
            for chunk in _ahead(_chunks(plan, blocks), reader):
                put(chunk)
                report(len(chunk))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, "disk full; free some space and run again", str(path)) from None
        raise
    return digest.hexdigest()


def _chunks(plan: Mapping[str, TensorInfo], blocks: Callable[[str], Iterable[Tensor]]) -> Iterator[memoryview]:
    """The data of a file, as `blocks` gives it."""
    for name, planned in plan.items():
        size = 0
        for block in blocks(name):
            assert block.dtype == planned.dtype, f"{name} is {block.dtype}, planned {planned.dtype}"
            data = block.detach().contiguous().flatten().view(torch.uint8).numpy().data
            yield from (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))
            size += len(data)
        assert size == planned.nbytes, f"{name} has {size} bytes, planned {planned.nbytes}"


def _ahead(chunks: Iterator[memoryview], thread: Executor) -> Iterator[memoryview]:
    """`chunks`, the next few of which are made by `thread` while one is used."""
    coming = deque(thread.submit(next, chunks, None) for _ in range(CHUNKS_AHEAD))
    while (chunk := coming.popleft().result()) is not None:
        coming.append(thread.submit(next, chunks, None))
        yield chunk


def _header(plan: Mapping[str, TensorInfo]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in plan.items():
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one safetensors file, tensor by tensor; they may lie on a device. Returns its SHA-256."""
    plan = {name: TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()}
    return _write_file(path, plan, lambda name: [tensors[name].cpu()], lambda count: None)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
