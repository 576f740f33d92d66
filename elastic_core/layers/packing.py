"""Documents packed into one row, for the layers that look back: none of them may look into the document before.

Letters beyond the package's legend: L, the tokens of a row in which every document starts a chunk of its own.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """Rows of which at least one holds several documents.

    `seq_idx_BT` (int32) numbers the document of each token, rising along its row. `spans` lists every document as
    (row, first token, token after the last), in order: known on the host, so that no layer waits for the device.
    """

    seq_idx_BT: Tensor
    spans: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device) -> "Packing":
        return Packing(seq_idx_BT=self.seq_idx_BT.to(device, non_blocking=True), spans=self.spans)


def pack(seq_idx_BT: Tensor) -> Packing | None:
    """What the layers need of the numbers of documents, rising along each row; None where every row is one document.

    The numbers are read on the host: give them on the CPU, where tokens come from, and move what this returns.
    """
    numbers_BT = seq_idx_BT.cpu()
    rows, tokens = numbers_BT.shape
    begins_BT = numbers_BT[:, 1:] != numbers_BT[:, :-1]
    if not begins_BT.any():
        return None
    if (numbers_BT[:, 1:] < numbers_BT[:, :-1]).any():
        raise ValueError("seq_idx falls along a row; it must number the documents of a row in their order")
    spans = []
    for row in range(rows):
        bounds = [0, *(begins_BT[row].nonzero()[:, 0] + 1).tolist(), tokens]
        spans += [(row, first, end) for first, end in itertools.pairwise(bounds)]
    return Packing(seq_idx_BT=seq_idx_BT.int(), spans=tuple(spans))


@dataclass(frozen=True, slots=True)
class ChunkAlignment:
    """The same rows with room between their documents, so that every document starts a chunk of its own.

    Within a chunk then stands one document alone, whose values no kernel adds to those of another. `places_T` says
    where each token, counted over all rows, stands in the longer rows; `seq_idx_BL` is int32 and reaches over the room.
    """

    places_T: Tensor
    seq_idx_BL: Tensor

    def spread(self, t_BT: Tensor) -> Tensor:
        """(B, T, ...) to (B, L, ...), with zeros in between."""
        rows, tokens = self.seq_idx_BL.shape
        longer = t_BT.new_zeros(rows * tokens, *t_BT.shape[2:])
        return longer.index_copy(0, self.places_T, t_BT.flatten(0, 1)).view(rows, tokens, *t_BT.shape[2:])

    def gather(self, t_BL: Tensor) -> Tensor:
        """(B, L, ...) to (B, T, ...), without what lies in between."""
        return t_BL.flatten(0, 1).index_select(0, self.places_T).view(len(t_BL), -1, *t_BL.shape[2:])


def align(packing: Packing, chunk: int) -> ChunkAlignment:
    """Room after each document up to a multiple of `chunk` tokens."""
    starts: list[list[int]] = [[] for _ in packing.seq_idx_BT]
    ends = [0] * len(starts)
    for row, first, end in packing.spans:
        starts[row].append(ends[row])
        ends[row] += -(-(end - first) // chunk) * chunk
    length = max(ends)
    seq_idx_BL = torch.empty(len(starts), length, dtype=torch.int32)
    for row, of_row in enumerate(starts):
        for number, start in enumerate(of_row):
            seq_idx_BL[row, start:] = number
    every = iter(start for of_row in starts for start in of_row)
    places = [
        torch.arange(row * length + start, row * length + start + end - first)
        for (row, first, end), start in zip(packing.spans, every, strict=True)
    ]
    device = packing.seq_idx_BT.device
    return ChunkAlignment(places_T=torch.cat(places).to(device), seq_idx_BL=seq_idx_BL.to(device))
