"""What is trained and measured on: rows of tokens from a file, what is to be learned of them, and whose they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic_core.files.shards import CheckpointError, StoredTensor, read_header
from elastic_core.layers.packing import Packing, pack

# The target of a token after which nothing is to be learned.
IGNORED = -100

N = TypeVar("N", np.int32, np.int64, np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Rows of tokens (B, T), int64, and the token that follows each, or IGNORED where it is not to be learned.

    `packing` says which document each token is of; None where no row holds two that are kept apart. `learned` is the
    number of targets that count.
    """

    inputs_BT: Tensor
    targets_BT: Tensor
    packing: Packing | None
    learned: int

    @property
    def ignore_index(self) -> int | None:
        """IGNORED, or None where every target counts."""
        return IGNORED if self.learned < self.targets_BT.numel() else None

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(
            inputs_BT=self.inputs_BT.to(device),
            targets_BT=self.targets_BT.to(device),
            packing=self.packing.to(device) if self.packing else None,
            learned=self.learned,
        )


class TokenRows:
    """Rows of `sequence_length` tokens, each with its next token, cut from a flat stream in a safetensors file.

    The file holds `tokens`, int32 (N,). Where it holds `document_starts`, int64 (D,), the index of each document's
    first token, rising from 0, documents are kept apart: none is read after another, and no first token is a target.
    Where it holds `learned`, uint8 (N,), only tokens with a 1 are targets. Only the rows asked for are read, however
    large the file is. Raises CheckpointError, one line, for a file that is something else.
    """

    def __init__(self, path: Path, sequence_length: int) -> None:
        stored = read_header(path)
        self._path, self._length = path, sequence_length
        self._tokens = _mapped(path, stored, "tokens", np.int32)
        self._starts = _mapped(path, stored, "document_starts", np.int64) if "document_starts" in stored else None
        self._learned = _mapped(path, stored, "learned", np.uint8) if "learned" in stored else None
        count = len(self._tokens)
        if self._starts is not None and (len(self._starts) == 0 or self._starts[0] != 0 or self._starts[-1] >= count):
            raise CheckpointError(f"{path}: document_starts do not rise from 0 to below {count}, the number of tokens")
        if self._learned is not None and len(self._learned) != count:
            raise CheckpointError(f"{path}: learned has {len(self._learned)} entries for {count} tokens")
        self.num_rows = max(0, (count - 1) // sequence_length)

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """These rows, on the CPU."""
        targets = np.stack([self._targets(row) for row in rows])
        return TokenBatch(
            inputs_BT=torch.from_numpy(np.stack([self._row(self._tokens, row, 0) for row in rows]).astype(np.int64)),
            targets_BT=torch.from_numpy(targets),
            packing=None if self._starts is None else pack(torch.from_numpy(np.stack([*map(self._seq_idx, rows)]))),
            learned=int(np.count_nonzero(targets != IGNORED)),
        )

    def learned(self, rows: Sequence[int]) -> int:
        """The number of targets that count in these rows."""
        if self._learned is not None:
            return sum(int(np.count_nonzero(self._targets(row) != IGNORED)) for row in rows)
        return len(rows) * self._length - sum(len(self._documents_from(row)) for row in rows)

    def _row(self, values: NDArray[N], row: int, shift: int) -> NDArray[N]:
        """A row of a tensor of the file, begun `shift` entries later."""
        first = row * self._length + shift
        return values[first : first + self._length]

    def _targets(self, row: int) -> NDArray[np.int64]:
        targets = self._row(self._tokens, row, 1).astype(np.int64)
        if self._learned is not None:
            targets[self._row(self._learned, row, 1) == 0] = IGNORED
        targets[self._documents_from(row) - 1] = IGNORED  # a document says nothing of the next one's first token
        return targets

    def _seq_idx(self, row: int) -> NDArray[np.int32]:
        begins = np.zeros(self._length + 1, dtype=np.int32)
        begins[self._documents_from(row)] = 1
        return np.cumsum(begins, dtype=np.int32)[:-1]

    def _documents_from(self, row: int) -> NDArray[np.int64]:
        """The places in a row, from 1 to the place after the last, at which a document begins."""
        if self._starts is None:
            return np.empty(0, dtype=np.int64)
        first = row * self._length
        low, high = np.searchsorted(self._starts, [first, first + self._length], side="right")
        places: NDArray[np.int64] = self._starts[low:high] - first
        if (np.diff(places) <= 0).any():
            raise CheckpointError(
                f"{self._path}: document_starts do not rise between {low} and {high}; prepare the data again"
            )
        return places


_STORED = {np.int32: torch.int32, np.int64: torch.int64, np.uint8: torch.uint8}


def _mapped(path: Path, stored: dict[str, StoredTensor], name: str, kind: type[N]) -> NDArray[N]:
    """A tensor of one dimension in the file, of which pages are read as they are used, and none may be written."""
    found = stored.get(name)
    if found is None or found.dtype != _STORED[kind] or len(found.shape) != 1:
        what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise CheckpointError(f"{path}: {name} is {what}; expected one row of {_STORED[kind]}, as a corpus has it")
    if not found.shape[0]:
        return np.empty(0, dtype=kind)
    return np.memmap(path, dtype=kind, mode="r", offset=found.offset, shape=found.shape)
