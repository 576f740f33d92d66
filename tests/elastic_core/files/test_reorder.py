import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import NemotronHForCausalLM

from elastic_core.files import shards
from elastic_core.files.checkpoint import (
    ORDER_FILE,
    CheckpointError,
    disk_name,
    load_weights,
    open_checkpoint,
    read_config,
)
from elastic_core.files.reorder import (
    Order,
    check_order,
    identity_order,
    random_order,
    read_order,
    reorder_checkpoint,
    reorder_in_place,
    reorder_weights,
    write_order,
)
from elastic_core.files.shards import read_tensors, write_tensors
from elastic_core.geometry import ModelConfig

TOKENS = torch.arange(26).view(2, 13) * 7 % 64

# Permuting the terms of float32 sums of at most 72 terms, in 8 layers; a wrong permutation gives differences near 1.
PERMUTED_SUMS = 2e-5


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    return NemotronHForCausalLM.from_pretrained(directory).eval()(TOKENS).logits


def inverse(order: Order) -> Order:
    return dataclasses.replace(
        order,
        hidden=order.hidden.argsort(),
        **{
            name: tuple(entry.argsort() for entry in getattr(order, name))
            for name in ("ffn", "mamba_heads", "mamba_head_dim", "attention_heads")
        },
    )


def random_of(config: ModelConfig, seed: int = 0) -> Order:
    return random_order(config, torch.Generator().manual_seed(seed))


def turned(config: ModelConfig) -> Order:
    """The order in which every component moves by one place, heads inside their group."""

    def turn(entry: Tensor, groups: int = 1) -> Tensor:
        return entry.view(groups, -1).roll(1, dims=1).flatten()

    order = identity_order(config)
    return dataclasses.replace(
        order,
        hidden=turn(order.hidden),
        ffn=tuple(map(turn, order.ffn)),
        mamba_heads=tuple(turn(entry, config.n_groups) for entry in order.mamba_heads),
        mamba_head_dim=tuple(map(turn, order.mamba_head_dim)),
        attention_heads=tuple(turn(entry, config.num_key_value_heads) for entry in order.attention_heads),
    )


@pytest.mark.parametrize("seed", range(3))
def test_reordering_leaves_the_logits_of_stock_transformers(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, seed: int
) -> None:
    order = random_of(tiny_config, seed)
    reorder_checkpoint(tiny_checkpoint, order, tmp_path / "reordered")
    before, after = logits(tiny_checkpoint), logits(tmp_path / "reordered")
    assert (before - after).abs().max() <= PERMUTED_SUMS * before.abs().max()


def test_every_tensor_moves_when_every_component_does(tiny_checkpoint: Path, tiny_config: ModelConfig) -> None:
    weights = load_weights(tiny_checkpoint)
    moved = reorder_weights(weights, turned(tiny_config), tiny_config)
    assert [name for name in weights if torch.equal(weights[name], moved[name])] == []


def test_each_axis_alone_leaves_the_function_and_moves_only_its_tensors(
    tiny_checkpoint: Path, tiny_config: ModelConfig, stock_model: Callable[..., NemotronHForCausalLM]
) -> None:
    identity, shuffled = identity_order(tiny_config), turned(tiny_config)
    touched = {
        "ffn": ("up_proj", "down_proj"),
        "mamba_heads": ("in_proj", "conv1d", "dt_bias", "A_log", ".D", "mixer.norm", "out_proj"),
        "mamba_head_dim": ("in_proj", "conv1d", "mixer.norm", "out_proj"),
        "attention_heads": ("q_proj", "o_proj"),
    }
    model, weights = stock_model(), load_weights(tiny_checkpoint)
    with torch.no_grad():
        before = model(TOKENS).logits
    for axis, parts in touched.items():
        order = dataclasses.replace(identity, **{axis: getattr(shuffled, axis)})
        moved = reorder_weights(weights, order, tiny_config)
        for name in weights:
            expected = any(part in name for part in parts)
            assert torch.equal(weights[name], moved[name]) != expected, (axis, name)
        model.load_state_dict({f"model.{n}" if n != "lm_head.weight" else n: t for n, t in moved.items()})
        with torch.no_grad():
            after = model(TOKENS).logits
        assert (before - after).abs().max() <= PERMUTED_SUMS * before.abs().max(), axis


def test_b_and_c_and_keys_and_values_keep_their_rows(tiny_checkpoint: Path, tiny_config: ModelConfig) -> None:
    order = dataclasses.replace(random_of(tiny_config), hidden=torch.arange(48))
    weights = load_weights(tiny_checkpoint)
    moved = reorder_weights(weights, order, tiny_config)
    state = slice(2 * 72, 2 * 72 + 2 * 2 * 8)
    assert torch.equal(moved["layers.0.mixer.in_proj.weight"][state], weights["layers.0.mixer.in_proj.weight"][state])
    assert torch.equal(moved["layers.0.mixer.conv1d.weight"][72:], weights["layers.0.mixer.conv1d.weight"][72:])
    for name in ("k_proj", "v_proj"):
        assert torch.equal(moved[f"layers.3.mixer.{name}.weight"], weights[f"layers.3.mixer.{name}.weight"])


def test_the_most_important_come_first(tiny_checkpoint: Path, tiny_config: ModelConfig) -> None:
    order = random_of(tiny_config)
    weights = load_weights(tiny_checkpoint)
    moved = reorder_weights(weights, order, tiny_config)
    best = int(order.hidden[0])
    assert torch.equal(moved["embeddings.weight"][:, 0], weights["embeddings.weight"][:, best])
    best_neuron = int(order.ffn[0][0])
    assert torch.equal(
        moved["layers.1.mixer.up_proj.weight"][0], weights["layers.1.mixer.up_proj.weight"][best_neuron][order.hidden]
    )
    heads_in_group, head_dim = 6, 6
    for group in range(2):
        best_head = int(order.mamba_heads[0][group * heads_in_group])
        assert best_head // heads_in_group == group
        assert moved["layers.0.mixer.D"][group * heads_in_group] == weights["layers.0.mixer.D"][best_head]
        best_channel = best_head * head_dim + int(order.mamba_head_dim[0][0])
        assert (
            moved["layers.0.mixer.norm.weight"][group * heads_in_group * head_dim]
            == weights["layers.0.mixer.norm.weight"][best_channel]
        )


@pytest.mark.parametrize("pieces", [False, True])
def test_the_inverse_order_restores_every_bit(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
        monkeypatch.setattr(shards, "BLOCK_BYTES", 3000)
    order = random_of(tiny_config)
    reorder_checkpoint(tiny_checkpoint, order, tmp_path / "there")
    reorder_checkpoint(tmp_path / "there", inverse(order), tmp_path / "back")
    before, after = load_weights(tiny_checkpoint), load_weights(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_streaming_and_memory_give_the_same(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = random_of(tiny_config)
    expected = reorder_weights(load_weights(tiny_checkpoint), order, tiny_config)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 3000)
    reorder_checkpoint(tiny_checkpoint, order, tmp_path / "streamed")
    found = load_weights(tmp_path / "streamed")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_in_place_gives_the_same_bits(tiny_checkpoint: Path, tiny_config: ModelConfig) -> None:
    order, weights = random_of(tiny_config), load_weights(tiny_checkpoint)
    expected = reorder_weights(load_weights(tiny_checkpoint), order, tiny_config)
    where = {name: weight.data_ptr() for name, weight in weights.items()}
    reorder_in_place(weights, order, tiny_config)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert where == {name: weight.data_ptr() for name, weight in weights.items()}


def test_the_identity_changes_nothing(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    reorder_checkpoint(tiny_checkpoint, identity_order(tiny_config), tmp_path / "same")
    stored = open_checkpoint(tiny_checkpoint).tensors
    written = open_checkpoint(tmp_path / "same").tensors
    assert read_config(tmp_path / "same") == tiny_config
    assert all(torch.equal(stored[name].read(), written[name].read()) for name in stored)
    assert (tmp_path / "same" / "tokenizer.json").exists()


def test_progress_ends_at_the_size_of_the_weights(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    reorder_checkpoint(
        tiny_checkpoint,
        identity_order(tiny_config),
        tmp_path / "same",
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(tensor.nbytes for tensor in open_checkpoint(tiny_checkpoint).tensors.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)


def test_a_nan_stops_the_reorder_and_leaves_nothing(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    weights = load_weights(tiny_checkpoint)
    weights["lm_head.weight"][5, 5] = torch.nan
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    write_tensors(source / "model.safetensors", {disk_name(name): tensor for name, tensor in weights.items()})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: holds NaN"):
        reorder_checkpoint(source, random_of(tiny_config), tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# Orders


def test_random_orders_are_valid_and_given_by_their_generator(tiny_config: ModelConfig) -> None:
    for seed in range(20):
        check_order(random_of(tiny_config, seed), tiny_config)
    assert torch.equal(random_of(tiny_config, 3).hidden, random_of(tiny_config, 3).hidden)
    assert not torch.equal(random_of(tiny_config, 3).hidden, random_of(tiny_config, 4).hidden)


def test_an_order_reads_back(tiny_config: ModelConfig, tmp_path: Path) -> None:
    order = random_of(tiny_config)
    write_order(tmp_path, order)
    found = read_order(tmp_path, tiny_config)
    assert torch.equal(found.hidden, order.hidden)
    assert found.layers == order.layers
    for name in ("ffn", "mamba_heads", "mamba_head_dim", "attention_heads"):
        for one, other in zip(getattr(found, name), getattr(order, name), strict=True):
            assert torch.equal(one, other)


BAD_ORDERS: dict[str, tuple[str, Callable[[Order], object], str]] = {
    "hidden short": (
        "hidden",
        lambda o: torch.arange(47),
        r"order\.hidden is torch\.int64 \[47\]; expected int64 \[48\]",
    ),
    "hidden twice": ("hidden", lambda o: torch.zeros(48, dtype=torch.int64), "is not a permutation of 0..47"),
    "hidden outside": ("hidden", lambda o: torch.arange(1, 49), "is not a permutation of 0..47"),
    "hidden floats": ("hidden", lambda o: torch.arange(48.0), r"order\.hidden is torch\.float32"),
    "layers twice": ("layers", lambda o: (0,) * 8, r"order\.layers is not a permutation of 0\.\.7"),
    "heads over groups": ("mamba_heads", lambda o: (torch.arange(12).flip(0),) * 3, r"mamba_heads\[0\] moves heads"),
    "queries over groups": (
        "attention_heads",
        lambda o: (torch.arange(6).roll(1),) * 2,
        r"attention_heads\[0\] moves heads",
    ),
    "too few layers": ("ffn", lambda o: o.ffn[:2], r"order\.ffn has 2 layers; the model has 3"),
    "channels of all heads": (
        "mamba_head_dim",
        lambda o: (torch.arange(72),) * 3,
        r"mamba_head_dim\[0\] is torch\.int64",
    ),
}


@pytest.mark.parametrize("case", BAD_ORDERS)
def test_a_bad_order_is_refused(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, case: str) -> None:
    name, change, message = BAD_ORDERS[case]
    order = random_of(tiny_config)
    order = dataclasses.replace(order, **{name: change(order)})
    with pytest.raises(ValueError, match=message):
        check_order(order, tiny_config)
    with pytest.raises(ValueError, match=message):
        reorder_weights(load_weights(tiny_checkpoint), order, tiny_config)
    with pytest.raises(ValueError, match=message):
        reorder_checkpoint(tiny_checkpoint, order, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


BAD_ORDER_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("ffn.1"), r"missing or unexpected: ffn\.1; it belongs to another model"),
    "unexpected": (lambda t: t.update({"ffn.7": torch.arange(3)}), r"missing or unexpected: ffn\.7"),
    "layers a scalar": (
        lambda t: t.update(layers=torch.tensor(3)),
        r"layers: is torch\.int64 \[\]; expected int64 \[8\]",
    ),
    "wrong size": (
        lambda t: t.update(hidden=torch.arange(40)),
        r"hidden: is torch\.int64 \[40\]; expected int64 \[48\]",
    ),
    "wrong type": (lambda t: t.update(hidden=torch.arange(48.0)), r"hidden: is torch\.float32 \[48\]"),
    "wrong values": (lambda t: t["hidden"].fill_(0), r"order\.hidden is not a permutation of 0\.\.47"),
}


@pytest.mark.parametrize("case", BAD_ORDER_FILES)
def test_a_bad_order_file_is_refused_in_one_line_that_names_it(
    tiny_config: ModelConfig, tmp_path: Path, case: str
) -> None:
    change, message = BAD_ORDER_FILES[case]
    write_order(tmp_path, random_of(tiny_config))
    tensors = read_tensors(tmp_path / ORDER_FILE)
    change(tensors)
    write_tensors(tmp_path / ORDER_FILE, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_order(tmp_path, tiny_config)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / ORDER_FILE) in str(caught.value)


def test_other_keys_of_the_config_survive(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    reorder_checkpoint(tiny_checkpoint, identity_order(tiny_config), tmp_path / "same")
    before = json.loads((tiny_checkpoint / "config.json").read_text())
    after = json.loads((tmp_path / "same" / "config.json").read_text())
    assert after["residual_in_fp32"] == before["residual_in_fp32"]
