"""Laws of layouts, against an oracle that walks over every element of a weight and asks whether it is kept."""

import itertools
import math
import random
from collections.abc import Iterator

import pytest
import torch

from elastic_core.layout import Dim, Kept, Layout, grid, indices, mask, prefixes, size

NAMES = ("group", "head", "channel", "state", "neuron")


def random_dim(rng: random.Random, sizes: dict[str, int], runs: int, sides: int) -> Dim:
    return tuple(
        grid(**{name: sizes[name] for name in rng.sample(NAMES, rng.randint(1, sides))})
        for _ in range(rng.randint(1, runs))
    )


def random_layout(rng: random.Random) -> tuple[Layout, Kept]:
    """A weight of one to three dimensions, of which one is divided, and a subnet that keeps part of some sides."""
    sizes = {name: rng.randint(1, 4) for name in NAMES} | {"hidden": rng.randint(1, 4)}
    plain: list[Dim] = [(grid(hidden=sizes["hidden"]),) for _ in range(rng.randint(0, 2))]
    plain.insert(rng.randint(0, len(plain)), random_dim(rng, sizes, runs=4, sides=3))
    kept = {name: rng.randint(1, whole) for name, whole in sizes.items() if rng.random() < 0.7}
    return Layout(*plain), kept


def coordinates(dim: Dim) -> Iterator[dict[str, int]]:
    """Where every entry of a dimension stands on the sides of its run."""
    for run in dim:
        for place in itertools.product(*(range(side.size) for side in run)):
            yield {side.name: i for side, i in zip(run, place, strict=True)}


def is_kept(place: dict[str, int], kept: Kept) -> bool:
    return all(i < kept.get(name, math.inf) for name, i in place.items())


def kept_entries(dim: Dim, kept: Kept) -> list[int]:
    return [entry for entry, place in enumerate(coordinates(dim)) if is_kept(place, kept)]


CASES = range(60)


@pytest.mark.parametrize("seed", CASES)
def test_views_indices_shapes_and_counts_keep_the_same_elements(seed: int) -> None:
    layout, kept = random_layout(random.Random(seed))
    weight = torch.arange(layout.numel()).view(layout.shape())
    expected = weight
    for dim, dimension in enumerate(layout.dims):
        entries = torch.tensor(kept_entries(dimension, kept))
        expected = expected.index_select(dim, entries)
        found = indices(dimension, prefixes(kept))
        assert torch.equal(entries, torch.arange(size(dimension)) if found is None else found)
        assert size(dimension, kept) == len(entries)
    assert torch.equal(layout.join(layout.views(weight, kept)), expected)
    assert (layout.shape(kept), layout.numel(kept)) == (tuple(expected.shape), expected.numel())
    assert layout.is_whole(kept) == (expected.numel() == weight.numel())


@pytest.mark.parametrize("seed", CASES)
def test_what_is_added_reaches_the_kept_elements_alone(seed: int) -> None:
    layout, kept = random_layout(random.Random(seed))
    weight = torch.zeros(layout.shape())
    values = torch.randn(layout.shape(kept), generator=torch.Generator().manual_seed(seed))
    layout.add(weight, kept, values)
    assert torch.equal(layout.join(layout.views(weight, kept)), values)
    assert weight.count_nonzero() == values.count_nonzero()


@pytest.mark.parametrize("seed", CASES)
def test_a_mask_of_zeros_and_ones_marks_the_positions_that_indices_keep(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {name: rng.randint(1, 4) for name in NAMES}
    (run,) = dim = random_dim(rng, sizes, runs=1, sides=4)
    kept = {side.name: rng.randint(1, side.size) for side in run if rng.random() < 0.7} or {run[0].name: 1}
    soft = {name: (torch.arange(sizes[name]) < entries).float() for name, entries in kept.items()}
    found = indices(dim, prefixes(kept))
    assert found is not None and found.tolist() == mask(run, {}, soft).nonzero().flatten().tolist()


@pytest.mark.parametrize("seed", CASES)
def test_a_soft_mask_is_the_product_of_those_of_its_sides_over_what_is_kept(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {name: rng.randint(1, 4) for name in NAMES}
    (run,) = dim = random_dim(rng, sizes, runs=1, sides=4)
    kept = {name: rng.randint(1, whole) for name, whole in sizes.items()}
    masked = rng.sample([side.name for side in run], rng.randint(1, len(run)))
    soft = {name: torch.rand(kept[name], generator=torch.Generator().manual_seed(seed)).double() for name in masked}
    places = [place for place in coordinates(dim) if is_kept(place, kept)]
    expected = [math.prod(float(soft[name][i]) for name, i in place.items() if name in soft) for place in places]
    assert mask(run, kept, soft).tolist() == pytest.approx(expected, rel=1e-14)  # factors in another order


def test_indices_of_a_side_may_differ_from_one_outer_entry_to_the_next() -> None:
    dim = (grid(group=2, head=3, channel=2), grid(state=2), grid(group=2, head=3))
    heads, channels = torch.tensor([[2, 0], [1, 2]]), torch.tensor([1, 0])
    found = indices(dim, {"head": heads, "channel": channels})
    z = [group * 6 + head * 2 + channel for group in range(2) for head in heads[group].tolist() for channel in (1, 0)]
    dt = [14 + group * 3 + head for group in range(2) for head in heads[group].tolist()]
    assert found is not None and found.tolist() == [*z, 12, 13, *dt]


def test_a_dimension_of_which_no_side_is_indexed_stays_as_it_is() -> None:
    assert indices((grid(group=2, head=3),), {"channel": torch.arange(2)}) is None
