"""What is trained and measured on: rows of tokens from a file, what is to be learned of them, and whose they are."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic_core.files.shards import CheckpointError
from elastic_core.files.token_stream import TokenStream
from elastic_core.layers.packing import Packing, pack

# The target of a token after which nothing is to be learned.
IGNORED = -100


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

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(
            inputs_BT=self.inputs_BT.to(device),
            targets_BT=self.targets_BT.to(device),
            packing=self.packing.to(device) if self.packing else None,
            learned=self.learned,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """So many tokens of a stream, from the portion before on, and how often rows are drawn from them."""

    tokens: int
    weight: float


class TokenRows:
    """Rows of `sequence_length` tokens, each with its next token, cut from a stream of tokens on disk.

    Where the stream is made of `portions`, each is cut by itself, and `drawn` has the number of its rows and its
    weight; the rows of one follow those of another.

    Where the stream says where documents start, they are kept apart: none is read after another, and no first token is
    a target. Where it says what is learned, other tokens are no targets. Only the rows asked for are read. Raises
    CheckpointError, one line, for a file that is something else.
    """

    def __init__(self, path: Path, sequence_length: int, portions: Sequence[Portion] = ()) -> None:
        self._stream, self._length = TokenStream(path), sequence_length
        portions = portions or [Portion(tokens=len(self._stream), weight=1.0)]
        tokens = sum(portion.tokens for portion in portions)
        if tokens != len(self._stream):
            raise CheckpointError(
                f"{path}: holds {len(self._stream)} tokens, and its sources {tokens}; prepare the data again"
            )
        counts = [max(0, (portion.tokens - 1) // sequence_length) for portion in portions]
        self.drawn = tuple((count, portion.weight) for count, portion in zip(counts, portions, strict=True))
        self.num_rows = sum(counts)
        self._last_rows = [*accumulate(counts)]
        self._first_tokens = [0, *accumulate(portion.tokens for portion in portions)]

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """These rows, on the CPU."""
        tokens = np.stack([self._read(row) for row in rows])
        targets = np.where(np.stack([self._is_target(row) for row in rows]), tokens[:, 1:], IGNORED)
        return TokenBatch(
            inputs_BT=torch.from_numpy(tokens[:, :-1].copy()),
            targets_BT=torch.from_numpy(targets),
            packing=pack(torch.from_numpy(np.stack([*map(self._seq_idx, rows)]))) if self._stream.separate else None,
            learned=int(np.count_nonzero(targets != IGNORED)),
        )

    def learned(self, rows: Sequence[int]) -> int:
        """The number of targets that count in these rows."""
        if not self._stream.all_learned:
            return sum(int(np.count_nonzero(self._is_target(row))) for row in rows)
        return len(rows) * self._length - sum(len(self._documents_from(row)) for row in rows)

    def _read(self, row: int) -> NDArray[np.int64]:
        """The tokens of a row, and the one after them."""
        first = self._first(row)
        return self._stream.tokens(first, first + self._length + 1).astype(np.int64)

    def _is_target(self, row: int) -> NDArray[np.bool_]:
        """Which of the tokens after those of a row are to be learned: of another document's first nothing is known."""
        first = self._first(row)
        wanted: NDArray[np.bool_] = self._stream.learned(first + 1, first + self._length + 1) != 0
        wanted[self._documents_from(row) - 1] = False
        return wanted

    def _seq_idx(self, row: int) -> NDArray[np.int32]:
        begins = np.zeros(self._length + 1, dtype=np.int32)
        begins[self._documents_from(row)] = 1
        return np.cumsum(begins, dtype=np.int32)[:-1]

    def _documents_from(self, row: int) -> NDArray[np.int64]:
        """The places in a row, from 1 to the place after the last, at which a document begins."""
        first = self._first(row)
        return self._stream.document_starts(first + 1, first + self._length + 1) - first

    def _first(self, row: int) -> int:
        """The index of a row's first token."""
        portion = bisect_right(self._last_rows, row)
        before = self._last_rows[portion - 1] if portion else 0
        return self._first_tokens[portion] + (row - before) * self._length
