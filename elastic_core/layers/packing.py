"""Documents packed into one row, for the layers that look back: none of them may look into the document before.

Letters beyond the package's legend: L, the tokens of a row in which every document starts a chunk of its own.
"""

import itertools
from dataclasses import dataclass, field

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
    _aligned: dict[int, "ChunkAlignment"] = field(default_factory=dict, repr=False, compare=False)

    def aligned(self, chunk: int) -> "ChunkAlignment":
        """The same rows with documents at multiples of `chunk` tokens; made once for all layers."""
        if chunk not in self._aligned:
            self._aligned[chunk] = _align(self, chunk)
        return self._aligned[chunk]

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


def _align(packing: Packing, chunk: int) -> ChunkAlignment:
    """Room after each document up to a multiple of `chunk` tokens, and after each row up to the longest."""
    rows = len(packing.seq_idx_BT)
    tokens = [torch.tensor([end - first for row, first, end in packing.spans if row == own]) for own in range(rows)]
    taken = [-(-of_row // chunk) * chunk for of_row in tokens]
    length = max(int(of_row.sum()) for of_row in taken)
    seq_idx_BL, places = torch.empty(rows, length, dtype=torch.int32), []
    for row, (own, room) in enumerate(zip(tokens, taken, strict=True)):
        numbers = torch.arange(len(own)).repeat_interleave(room)
        seq_idx_BL[row] = len(own) - 1
        seq_idx_BL[row, : len(numbers)] = numbers
        moved_by = (room - own).cumsum(0) - (room - own)  # the room before each document
        places.append(row * length + torch.arange(int(own.sum())) + moved_by.repeat_interleave(own))
    device = packing.seq_idx_BT.device
    return ChunkAlignment(places_T=torch.cat(places).to(device), seq_idx_BL=seq_idx_BL.to(device))
