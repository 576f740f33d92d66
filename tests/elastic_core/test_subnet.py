"""Laws of subnets: what they keep, when one lies within another, and what they are cut out to."""

import dataclasses
import itertools
import random

import pytest

from elastic_core.geometry import ATTENTION, FFN, MAMBA, Axes, ModelConfig
from elastic_core.layers.kinds import KINDS
from elastic_core.layout import indices, prefixes
from elastic_core.subnet import (
    Subnet,
    check_subnet,
    full_subnet,
    is_nested,
    keep_layers,
    kept_at,
    sliced_config,
    smallest_subnet,
)

PATTERN = "M-M*-*M-"
RANKING = (0, 7, 3, 1, 6, 4, 2, 5)


def model_config(pattern: str = PATTERN) -> ModelConfig:
    return ModelConfig(
        hybrid_override_pattern=pattern,
        hidden_size=24,
        intermediate_size=20,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=5,
        mamba_num_heads=12,
        mamba_head_dim=4,
        ssm_state_size=3,
        n_groups=3,
        vocab_size=31,
    )


MODEL = model_config()


def random_subnet(rng: random.Random, uniform_heads: bool = False) -> Subnet:
    def per_layer(kind: str, choices: tuple[int, ...], same: bool) -> tuple[int, ...]:
        count = len(MODEL.layers_of(kind))
        return (rng.choice(choices),) * count if same else tuple(rng.choice(choices) for _ in range(count))

    return Subnet(
        hidden=rng.choice((24, 16, 7)),
        ffn=per_layer(FFN, (20, 13, 4), same=False),
        mamba_heads=per_layer(MAMBA, (12, 9, 3), same=uniform_heads),
        mamba_head_dim=rng.choice((4, 3, 1)),
        attention_heads=per_layer(ATTENTION, (6, 4, 2), same=uniform_heads),
        layers=tuple(sorted(rng.sample(range(MODEL.num_layers), rng.randint(1, MODEL.num_layers)))),
    )


def kept_pairs(groups: int, per_group: int, channels: int, kept_in_group: int, kept_channels: int) -> list[int]:
    """Flat indices of a [group, unit in group, channel] layout, by walking over all of it."""
    walk = enumerate(itertools.product(range(groups), range(per_group), range(channels)))
    return [flat for flat, (_, unit, channel) in walk if unit < kept_in_group and channel < kept_channels]


def kept_entries(layer: int, name: str, dim: int = 0, **widths: int) -> list[int]:
    """What the full subnet, with other widths, keeps along a dimension of a tensor of a layer's mixer."""
    full = full_subnet(MODEL)
    sizes = {axis: (w,) * len(getattr(full, axis)) if axis in Axes.WIDTHS else w for axis, w in widths.items()}
    kept = kept_at(dataclasses.replace(full, **sizes), MODEL, layer)
    found = indices(KINDS[PATTERN[layer]].mixer.lay_out(MODEL, layer)[name].dims[dim], prefixes(kept))
    assert found is not None
    entries: list[int] = found.tolist()
    return entries


@pytest.mark.parametrize("heads", [3, 6, 9, 12])
@pytest.mark.parametrize("head_dim", [1, 3, 4])
def test_mamba_keeps_the_first_heads_of_each_group_and_their_first_channels(heads: int, head_dim: int) -> None:
    widths = {"mamba_heads": heads, "mamba_head_dim": head_dim}
    assert kept_entries(0, "norm.weight", **widths) == kept_pairs(3, 4, 4, heads // 3, head_dim)
    assert kept_entries(0, "D", **widths) == kept_pairs(3, 4, 1, heads // 3, 1)


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_attention_keeps_the_first_queries_of_each_kv_head(heads: int) -> None:
    assert kept_entries(3, "q_proj.weight", attention_heads=heads) == kept_pairs(2, 3, 5, heads // 2, 5)
    assert kept_entries(3, "o_proj.weight", 1, attention_heads=heads) == kept_pairs(2, 3, 5, heads // 2, 5)


@pytest.mark.parametrize(("heads", "head_dim"), [(12, 4), (9, 2), (3, 1)])
def test_in_proj_and_conv_keep_every_state_row_and_the_kept_channels_of_each_part(heads: int, head_dim: int) -> None:
    channels, kept_heads = kept_pairs(3, 4, 4, heads // 3, head_dim), kept_pairs(3, 4, 1, heads // 3, 1)
    parts = {"z": 12 * 4, "x": 12 * 4, "B": 3 * 3, "C": 3 * 3, "dt": 12}
    kept = {"z": channels, "x": channels, "dt": kept_heads}
    rows = [(part, i) for part, size in parts.items() for i in range(size)]
    expected = [row for row, (part, i) in enumerate(rows) if i in kept.get(part, range(9))]
    assert kept_entries(0, "in_proj.weight", mamba_heads=heads, mamba_head_dim=head_dim) == expected

    conv_rows = [(part, i) for part, i in rows if part in ("x", "B", "C")]
    expected = [row for row, (part, i) in enumerate(conv_rows) if i in kept.get(part, range(9))]
    assert kept_entries(0, "conv1d.weight", mamba_heads=heads, mamba_head_dim=head_dim) == expected
    assert kept_entries(0, "conv1d.bias", mamba_heads=heads, mamba_head_dim=head_dim) == expected


def test_the_full_subnet_keeps_every_row() -> None:
    assert kept_entries(0, "in_proj.weight") == list(range(2 * 48 + 18 + 12))
    assert kept_entries(0, "conv1d.weight") == list(range(48 + 18))
    assert sliced_config(MODEL, full_subnet(MODEL)) == MODEL


def test_layers_are_kept_by_rank_and_listed_in_model_order() -> None:
    for depth in range(1, 9):
        kept = keep_layers(RANKING, depth)
        assert set(kept) == set(RANKING[:depth])
        assert list(kept) == sorted(kept)
        assert set(keep_layers(RANKING, depth - 1)) <= set(kept)


def test_nesting_is_a_partial_order() -> None:
    rng = random.Random(0)
    subnets = [random_subnet(rng) for _ in range(60)]
    subnets += [dataclasses.replace(s, hidden=24, layers=tuple(range(8))) for s in subnets[:20]]
    pairs = {(i, j) for i, a in enumerate(subnets) for j, b in enumerate(subnets) if is_nested(a, b)}
    assert all((i, i) in pairs for i in range(len(subnets)))
    assert all(subnets[i] == subnets[j] for i, j in pairs if (j, i) in pairs)
    assert all((i, k) in pairs for i, j in pairs for m, k in pairs if j == m)
    proper = [(i, j) for i, j in pairs if subnets[i] != subnets[j]]
    assert proper, "the sample must hold subnets within one another"


def test_nesting_means_within_on_every_axis() -> None:
    inner = Subnet(
        hidden=16,
        ffn=(13, 13, 13),
        mamba_heads=(9, 9, 9),
        mamba_head_dim=3,
        attention_heads=(4, 4),
        layers=(0, 3, 7),
    )
    assert is_nested(inner, full_subnet(MODEL))
    outside: list[dict[str, object]] = [
        {"hidden": 17},
        {"mamba_head_dim": 4},
        {"ffn": (13, 14, 13)},
        {"mamba_heads": (9, 9, 12)},
        {"attention_heads": (6, 4)},
        {"layers": (0, 3, 6)},
    ]
    for change in outside:
        assert not is_nested(dataclasses.replace(inner, **change), inner), change  # type: ignore[arg-type]


def test_the_smallest_and_the_full_subnet_enclose_every_choice() -> None:
    axes = Axes(
        hidden=(24, 16, 7),
        ffn=(20, 13, 4),
        mamba_heads=(12, 9, 3),
        mamba_head_dim=(4, 3, 1),
        attention_heads=(6, 4, 2),
        depth=(8, 6, 3),
    ).bind(MODEL)
    smallest, full = smallest_subnet(MODEL, axes, RANKING), full_subnet(MODEL)
    check_subnet(smallest, MODEL)
    rng = random.Random(1)
    for _ in range(50):
        subnet = dataclasses.replace(random_subnet(rng), layers=keep_layers(RANKING, rng.choice(axes.depth)))
        assert is_nested(smallest, subnet)
        assert is_nested(subnet, full)
    assert (smallest.depth, full.depth) == (3, 8)


def test_the_smallest_subnet_never_exceeds_a_layer() -> None:
    narrow = dataclasses.replace(MODEL, intermediate_size=(20, 2, 20))
    axes = Axes(ffn=(20, 4)).bind(MODEL)
    assert smallest_subnet(narrow, axes, RANKING).ffn == (4, 2, 4)


def test_a_slice_has_the_geometry_of_its_kept_layers() -> None:
    rng = random.Random(2)
    for _ in range(100):
        subnet = random_subnet(rng, uniform_heads=True)
        sliced = sliced_config(MODEL, subnet)
        assert sliced.hybrid_override_pattern == "".join(PATTERN[i] for i in subnet.layers)
        assert sliced.hidden_size == subnet.hidden
        assert sliced.mamba_head_dim == subnet.mamba_head_dim
        ffn_layers = [i for i, kind in enumerate(PATTERN) if kind == "-"]
        assert sliced.ffn_sizes == tuple(subnet.ffn[ffn_layers.index(i)] for i in subnet.layers if i in ffn_layers)
        if MAMBA in sliced.hybrid_override_pattern:
            assert sliced.mamba_num_heads == subnet.mamba_heads[0]
        if ATTENTION in sliced.hybrid_override_pattern:
            assert sliced.num_attention_heads == subnet.attention_heads[0]
        untouched = ("num_key_value_heads", "head_dim", "n_groups", "ssm_state_size", "vocab_size", "conv_kernel")
        assert all(getattr(sliced, name) == getattr(MODEL, name) for name in untouched)


def test_equal_ffn_widths_become_one_number_and_different_ones_a_list() -> None:
    full = full_subnet(MODEL)
    assert sliced_config(MODEL, dataclasses.replace(full, ffn=(13, 13, 13))).intermediate_size == 13
    assert sliced_config(MODEL, dataclasses.replace(full, ffn=(13, 20, 13))).intermediate_size == (13, 20, 13)
    dropped = dataclasses.replace(full, ffn=(13, 20, 13), layers=(0, 1, 2, 3, 5, 6, 7))
    assert sliced_config(MODEL, dropped).intermediate_size == 13


def test_heads_that_differ_between_kept_layers_are_refused_with_the_layer() -> None:
    full = full_subnet(MODEL)
    mixed = dataclasses.replace(full, mamba_heads=(12, 12, 9))
    with pytest.raises(ValueError, match="layer 6 keeps 9 Mamba heads and layer 0 keeps 12; no engine loads"):
        sliced_config(MODEL, mixed)
    with pytest.raises(ValueError, match="layer 5 keeps 4 attention heads and layer 3 keeps 6; no engine loads"):
        sliced_config(MODEL, dataclasses.replace(full, attention_heads=(6, 4)))
    without_layer_6 = dataclasses.replace(mixed, layers=(0, 1, 2, 3, 4, 5, 7))
    assert sliced_config(MODEL, without_layer_6).mamba_num_heads == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn": (20, 20)}, "subnet.ffn has 2 entries; the model has 3 such layers"),
        ({"mamba_heads": (12,) * 4}, "subnet.mamba_heads has 4 entries; the model has 3 such layers"),
        ({"attention_heads": ()}, "subnet.attention_heads has 0 entries; the model has 2 such layers"),
        ({"hidden": 0}, "a size below 1"),
        ({"ffn": (20, 0, 20)}, "a size below 1"),
        ({"mamba_head_dim": -1}, "a size below 1"),
        ({"layers": ()}, "layers out of order"),
        ({"layers": (1, 0)}, "layers out of order"),
        ({"layers": (0, 0, 1)}, "layers out of order"),
        ({"layers": (0, 8)}, "larger than the model"),
        ({"layers": (-1, 0)}, "larger than the model"),
        ({"hidden": 25}, "larger than the model"),
        ({"ffn": (20, 20, 21)}, "larger than the model"),
        ({"mamba_heads": (12, 15, 12)}, "larger than the model"),
        ({"mamba_heads": (12, 10, 12)}, "subnet.mamba_heads=10 is not a multiple of n_groups=3"),
        ({"attention_heads": (6, 3)}, "subnet.attention_heads=3 is not a multiple of num_key_value_heads=2"),
    ],
)
def test_a_shape_that_does_not_fit_the_model_is_refused(change: dict[str, object], message: str) -> None:
    subnet = dataclasses.replace(full_subnet(MODEL), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message) as caught:
        check_subnet(subnet, MODEL)
    assert "\n" not in str(caught.value)


def test_valid_shapes_are_accepted() -> None:
    rng = random.Random(3)
    for _ in range(50):
        check_subnet(random_subnet(rng), MODEL)
    no_attention = model_config("M-M-")
    check_subnet(full_subnet(no_attention), no_attention)
    assert sliced_config(no_attention, full_subnet(no_attention)) == no_attention
