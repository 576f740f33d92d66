"""A stream of tokens in one safetensors file or in several, read through maps: no file need fit in memory.

A map keeps its file open, and a process may have few files open (often 1024), so that of many files only some are
mapped at once.

A file holds `tokens`, int32 (N,); where documents are kept apart `document_starts`, int64 (D,), the index of each
document's first token, rising from 0; and where not all tokens are targets `learned`, uint8 (N,), 1 where one is. A
document lies in one file. `train.safetensors` may lie divided beside itself, as `train-00001-of-00016.safetensors` and
so on; the stream is the same however it is divided.
"""

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_core.files.shards import CheckpointError, StoredTensor, read_header

# Files of one stream that are mapped at once.
MOST_MAPPED = 64

N = TypeVar("N", np.int32, np.int64, np.uint8)

_STORED = {np.int32: torch.int32, np.int64: torch.int64, np.uint8: torch.uint8}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    """The tensors of one file, of which pages are read as they are used, and none may be written."""

    path: Path
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64] | None
    learned: NDArray[np.uint8] | None


class TokenStream:
    """Reads any range of a stream by the index of its tokens. Raises CheckpointError, one line, for another file.

    `separate`: the files say where documents start. `all_learned`: every token is a target to learn. A range that lies
    in one file is a view of the file's map, and keeps the file open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files, self._map = stream_files(path), lru_cache(MOST_MAPPED)(_map)
        counts: list[int] = []
        for file in map(self._map, self._files):
            if not counts:
                self.separate, self.all_learned = file.starts is not None, True
            if (file.starts is not None) != self.separate:
                raise CheckpointError(
                    f"{file.path}: only some files of this stream have document_starts; prepare the data again"
                )
            self.all_learned &= file.learned is None
            counts.append(len(file.tokens))
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def tokens(self, first: int, end: int) -> NDArray[np.int32]:
        """The tokens from `first` to before `end`."""
        return _joined([file.tokens[low:high] for file, _, low, high in self._parts(first, end)], np.int32)

    def learned(self, first: int, end: int) -> NDArray[np.uint8]:
        """1 for each of these tokens that is a target to learn, else 0."""
        return _joined(
            [
                np.ones(high - low, dtype=np.uint8) if file.learned is None else file.learned[low:high]
                for file, _, low, high in self._parts(first, end)
            ],
            np.uint8,
        )

    def document_starts(self, first: int, end: int) -> NDArray[np.int64]:
        """The indices, rising, of those of these tokens that begin a document; none where the files do not say it."""
        if not self.separate:
            return np.empty(0, dtype=np.int64)
        found = []
        for file, offset, low, high in self._parts(first, end):
            assert file.starts is not None, f"{file.path}"
            places = file.starts[slice(*np.searchsorted(file.starts, [low, high]))]
            if (np.diff(places) <= 0).any():
                raise CheckpointError(
                    f"{file.path}: document_starts do not rise between tokens {low} and {high}; prepare the data again"
                )
            found.append(places + offset)
        return _joined(found, np.int64)

    def _parts(self, first: int, end: int) -> Iterator[tuple[_Mapped, int, int, int]]:
        """Each file that holds some of these tokens, the index of its first one, and which of its own they are."""
        at = int(np.searchsorted(self._ends, first, side="right"))
        while first < end:
            file, offset, last = self._map(self._files[at]), int(self._ends[at - 1]) if at else 0, int(self._ends[at])
            if len(file.tokens) != last - offset:
                raise CheckpointError(f"{file.path}: holds {len(file.tokens)} tokens and held {last - offset} before")
            last = min(end, last)
            yield file, offset, first - offset, last - offset
            first, at = last, at + 1


def stream_files(path: Path) -> list[Path]:
    """The files of the stream at `path`: itself, or where it lies divided all its parts, in order."""
    if path.exists():
        return [path]
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(path.suffix)}")
    found = {file.name for file in path.parent.glob(f"{path.stem}-*-of-*{path.suffix}") if pattern.fullmatch(file.name)}
    counts = {int(name.removesuffix(path.suffix).rpartition("-")[2]) for name in found}
    if not found:
        return [path]
    expected = [part_name(path.name, number, max(counts)) for number in range(1, max(counts) + 1)]
    if found != set(expected):
        name = min(found ^ set(expected))
        fault = "is of another division" if name in found else "is missing"
        raise CheckpointError(f"{path.parent / name}: {fault}; {path.name} needs all its parts, of one division")
    return [path.with_name(name) for name in expected]


def part_name(name: str, number: int, count: int) -> str:
    """The name of the part `number`, from 1, of a stream that is divided into so many; the stream's where it is not."""
    stem, _, suffix = name.rpartition(".")
    return name if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.{suffix}"


def _joined(parts: list[NDArray[N]], kind: type[N]) -> NDArray[N]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype=kind)


def _map(path: Path) -> _Mapped:
    try:
        stored = read_header(path)
        content = np.memmap(path, dtype=np.uint8, mode="r")  # one for all tensors, since each keeps a file open
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise CheckpointError(f"{path}: this process may open no more files; raise its limit (ulimit -n)") from error
    tokens = _mapped(path, content, stored, "tokens", np.int32)
    starts = _mapped(path, content, stored, "document_starts", np.int64) if "document_starts" in stored else None
    learned = _mapped(path, content, stored, "learned", np.uint8) if "learned" in stored else None
    count = len(tokens)
    if starts is not None and (len(starts) == 0 or starts[0] != 0 or starts[-1] >= count):
        raise CheckpointError(f"{path}: document_starts do not rise from 0 to below {count}, the number of tokens")
    if learned is not None and len(learned) != count:
        raise CheckpointError(f"{path}: learned has {len(learned)} entries for {count} tokens")
    return _Mapped(path=path, tokens=tokens, starts=starts, learned=learned)


def _mapped(
    path: Path, content: NDArray[np.uint8], stored: dict[str, StoredTensor], name: str, kind: type[N]
) -> NDArray[N]:
    found = stored.get(name)
    if found is None or found.dtype != _STORED[kind] or len(found.shape) != 1:
        what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(f"{path}: {name} is {what}; expected one row of {_STORED[kind]}, as a corpus has it")
    end = found.offset + found.shape[0] * np.dtype(kind).itemsize
    return content[found.offset : end].view(kind)
