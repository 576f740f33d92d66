"""How a weight is laid out, from which its views, indices, masks, shapes and counts all follow.

A dimension is a sequence of runs: the rows of a Mamba layer's in_proj are [z, x, B and C, dt]. A run is a grid in
row-major order: z is [group, head in group, channel in head]. Every side of a grid has a name and a size. A subnet
keeps a prefix along every side (C2): `Kept` maps the names of sides to numbers of entries, and a side that it does not
name is kept whole.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a grid."""

    name: str
    size: int


Run = tuple[Side, ...]
Dim = tuple[Run, ...]
Kept = Mapping[str, int]  # entries kept of each side; where it is in groups, of each group

WHOLE: Kept = {}


@dataclass(frozen=True, slots=True)
class Member:
    """One of the equal tensors of an axis, such as an expert; its name has `.axis.index.` in it.

    Its axis comes in equal groups of `in_group` members, of each of which a subnet keeps the first.
    """

    axis: str
    index: int
    in_group: int

    def is_kept(self, kept: Kept) -> bool:
        return self.index % self.in_group < kept.get(self.axis, self.in_group)

    def within(self, in_group: int) -> int:
        """This member's index where the groups have so many members."""
        group, place = divmod(self.index, self.in_group)
        return group * in_group + place

    def renamed(self, name: str, index: int) -> str:
        """The tensor of the member `index` that is to it what the tensor `name` is to this one."""
        return name.replace(f".{self.axis}.{self.index}.", f".{self.axis}.{index}.", 1)


def grid(**sides: int) -> Run:
    """A run from its sides, the outermost first."""
    return tuple(Side(name, size) for name, size in sides.items())


def size(dim: Dim, kept: Kept = WHOLE) -> int:
    """How many entries of a dimension are kept."""
    return sum(math.prod(kept.get(side.name, side.size) for side in run) for run in dim)


def indices(dim: Dim, along: Mapping[str, Tensor]) -> Tensor | None:
    """Where the entries of a dimension come from when the sides are indexed; None where no side of it is.

    `along` has the indices of a side, (n,), or (outer sides, n) where they differ from one outer entry to the next, as
    the order of heads does from group to group. A prefix and a permutation are both of this form.
    """
    if not any(side.name in along for run in dim for side in run):
        return None
    parts, start = [], 0
    for run in dim:
        stride = size((run,))
        places, end = torch.full((1,) * len(run), start), start + stride
        for position, side in enumerate(run):
            stride //= side.size
            index = along.get(side.name, torch.arange(side.size))
            places = places + stride * index.view(*index.shape, *(1,) * (len(run) - position - 1))
        parts.append(places.flatten())
        start = end
    return torch.cat(parts)


def prefixes(kept: Kept) -> dict[str, Tensor]:
    """`kept` as the indices of every side that it names."""
    return {name: torch.arange(entries) for name, entries in kept.items()}


def mask(run: Run, kept: Kept, soft: Mapping[str, Tensor]) -> Tensor:
    """The mask over the kept entries of a run: the product of the masks of its sides, at least one of which has one.

    Sides without a mask are expanded one by one, the outermost first: so the gradients are summed in a fixed order.
    """
    shape = [1] * len(run)
    masks = [soft[s.name].view(*shape[:i], -1, *shape[i + 1 :]) for i, s in enumerate(run) if s.name in soft]
    product = math.prod(masks[1:], start=masks[0])
    for position, side in enumerate(run):
        if side.name not in soft:
            expanded = list(product.shape)
            expanded[position] = kept.get(side.name, side.size)
            product = product.expand(expanded)
    return product.flatten()


class Layout:
    """The dimensions of one weight, of which at most one has several runs or a run of several sides.

    The tensor of a `member` is there only in subnets that keep the member.
    """

    def __init__(self, *dims: Dim, member: Member | None = None) -> None:
        self.dims, self.member = dims, member
        divided = [i for i, dim in enumerate(dims) if len(dim) > 1 or len(dim[0]) > 1]
        assert len(divided) < 2, f"dimensions {divided} are divided; views of one alone can be joined"
        self._divided = divided[0] if divided else 0
        self._runs = dims[self._divided]
        self._starts = [size((run,)) for run in self._runs]
        self._others = [(i, dim[0][0]) for i, dim in enumerate(dims) if i != self._divided]
        self._sides = {side.name: side.size for dim in dims for run in dim for side in run}

    @property
    def axes(self) -> tuple[str | None, ...]:
        """What each dimension counts, where it is a run of one side."""
        return tuple(dim[0][0].name if len(dim) == len(dim[0]) == 1 else None for dim in self.dims)

    def shape(self, kept: Kept = WHOLE) -> tuple[int, ...]:
        """The shape of what is kept."""
        return tuple(size(dim, kept) for dim in self.dims)

    def numel(self, kept: Kept = WHOLE) -> int:
        """How many elements are kept."""
        return math.prod(self.shape(kept)) if self.is_there(kept) else 0

    def is_there(self, kept: Kept) -> bool:
        """Whether anything is kept."""
        return self.member is None or self.member.is_kept(kept)

    def is_whole(self, kept: Kept) -> bool:
        """Whether all of the weight is kept."""
        return all(self._sides.get(name, entries) <= entries for name, entries in kept.items())

    def is_joined(self, kept: Kept) -> bool:
        """Whether `join` copies: there are several runs, or an inner side of the one is cut."""
        inner = self._runs[0][1:]
        return not self.is_whole(kept) and (
            len(self._runs) > 1 or any(kept.get(side.name, side.size) < side.size for side in inner)
        )

    def views(self, weight: Tensor, kept: Kept) -> list[Tensor]:
        """What is kept of `weight`, or of its gradient: one view for each run, one dimension for each of its sides."""
        for dim, side in self._others:
            weight = _first(weight, dim, side, kept)
        parts = weight.split(self._starts, self._divided) if len(self._runs) > 1 else (weight,)
        return [self._prefix(part, run, kept) for part, run in zip(parts, self._runs, strict=True)]

    def join(self, views: list[Tensor]) -> Tensor:
        """The views as one tensor of shape `shape(kept)`; still a view where one prefix is all of it."""
        first, ndim = self._divided, len(self.dims)
        flat = [view.flatten(first, first + view.ndim - ndim) for view in views]
        return flat[0] if len(flat) == 1 else torch.cat(flat, first)

    def add(self, weight: Tensor, kept: Kept, values: Tensor) -> None:
        """Add `values`, of shape `shape(kept)`, to what is kept of `weight`, in place."""
        start = 0
        for run, view in zip(self._runs, self.views(weight, kept), strict=True):
            entries = size((run,), kept)
            view.add_(values.narrow(self._divided, start, entries).reshape(view.shape))
            start += entries

    def _prefix(self, part: Tensor, run: Run, kept: Kept) -> Tensor:
        if len(run) > 1:
            part = part.unflatten(self._divided, [side.size for side in run])
        for position, side in enumerate(run):
            part = _first(part, self._divided + position, side, kept)
        return part


def _first(tensor: Tensor, dim: int, side: Side, kept: Kept) -> Tensor:
    entries = kept.get(side.name, side.size)
    return tensor if entries == side.size else tensor.narrow(dim, 0, entries)
