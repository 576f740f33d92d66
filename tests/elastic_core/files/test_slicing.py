import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic_core.cost import subnet_params
from elastic_core.files import shards
from elastic_core.files.checkpoint import (
    CheckpointError,
    disk_name,
    load_weights,
    open_checkpoint,
    read_config,
    tensor_shapes,
    write_weights,
)
from elastic_core.files.reorder import Order, identity_order, random_order, reorder_checkpoint, write_order
from elastic_core.files.shards import write_tensors
from elastic_core.files.slicing import slice_checkpoint, slice_weights, target_config
from elastic_core.geometry import FfnLayout, ModelConfig
from elastic_core.layers.norm import Energy
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training.job import load_model

TOKENS = torch.arange(26).view(2, 13) * 7 % 64

SUBNETS: dict[str, dict[str, Any]] = {
    "full": {},
    "hidden": {"hidden": 32},
    "ffn": {"ffn": (24, 24, 24)},
    "mamba_heads": {"mamba_heads": (8, 8, 8)},
    "mamba_head_dim": {"mamba_head_dim": 3},
    "attention_heads": {"attention_heads": (2, 2)},
    "depth": {"layers": (0, 2, 3, 4, 7)},
    "no attention": {"layers": (0, 1, 2, 4)},
    "no mamba": {"layers": (3, 4, 7)},
    "heads differ in a dropped layer": {"mamba_heads": (4, 12, 4), "layers": (0, 1, 3, 4, 5)},
    "all": {
        "hidden": 30,
        "ffn": (16, 16, 16),
        "mamba_heads": (4, 4, 4),
        "mamba_head_dim": 5,
        "attention_heads": (4, 4),
        "layers": (0, 1, 3, 4, 5, 7),
    },
}

PER_LAYER = {"hidden": 32, "ffn": (16, 40, 24), "mamba_heads": (8, 8, 8)}

# Zero neurons add terms that are exactly zero, but may change how a float32 sum of 40 terms is grouped.
ZERO_NEURONS = 1e-5


def subnet_of(config: ModelConfig, changes: dict[str, Any]) -> Subnet:
    return dataclasses.replace(full_subnet(config), **changes)


@torch.no_grad()
def logits(model: NemotronHForCausalLM) -> Tensor:
    return model.eval()(TOKENS, use_cache=False).logits


def load_stock(directory: Path) -> NemotronHForCausalLM:
    """The directory in stock transformers, which must find every tensor and know every tensor."""
    model, report = NemotronHForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model


def cut_by_hand(weights: dict[str, Tensor], subnet: Subnet, order: Order) -> dict[str, Tensor]:
    """The slice of the tiny model in `order`, tensor by tensor, with every index written out."""
    groups, heads_in_group, head_dim, states, kv_heads, query_dim = 2, 6, 6, 2 * 2 * 8, 2, 8
    mamba = 2 * heads_in_group * head_dim
    hidden = order.hidden.tolist()[: subnet.hidden]
    cut = {
        "embeddings.weight": weights["embeddings.weight"][:, hidden],
        "norm_f.weight": weights["norm_f.weight"][hidden],
        "lm_head.weight": weights["lm_head.weight"][:, hidden],
    }
    for new, old in enumerate(subnet.layers):
        kind, ordinal = "M-M*-M*-"[old], "M-M*-M*-"[:old].count("M-M*-M*-"[old])
        part = {
            name.removeprefix(f"layers.{old}."): t for name, t in weights.items() if name.startswith(f"layers.{old}.")
        }
        new_part = {"norm.weight": part["norm.weight"][hidden]}
        if kind == "-":
            neurons = order.ffn[ordinal].tolist()[: subnet.ffn[ordinal]]
            new_part["mixer.up_proj.weight"] = part["mixer.up_proj.weight"][neurons][:, hidden]
            new_part["mixer.down_proj.weight"] = part["mixer.down_proj.weight"][hidden][:, neurons]
        elif kind == "*":
            kept = subnet.attention_heads[ordinal] // kv_heads
            queries = [int(order.attention_heads[ordinal][3 * kv + i]) for kv in range(kv_heads) for i in range(kept)]
            rows = [query_dim * query + channel for query in queries for channel in range(query_dim)]
            new_part["mixer.q_proj.weight"] = part["mixer.q_proj.weight"][rows][:, hidden]
            new_part["mixer.k_proj.weight"] = part["mixer.k_proj.weight"][:, hidden]
            new_part["mixer.v_proj.weight"] = part["mixer.v_proj.weight"][:, hidden]
            new_part["mixer.o_proj.weight"] = part["mixer.o_proj.weight"][hidden][:, rows]
        else:
            kept = subnet.mamba_heads[ordinal] // groups
            heads = [int(order.mamba_heads[ordinal][6 * group + i]) for group in range(groups) for i in range(kept)]
            in_head = order.mamba_head_dim[ordinal].tolist()[: subnet.mamba_head_dim]
            channels = [head * head_dim + channel for head in heads for channel in in_head]
            rows = channels + [mamba + channel for channel in channels]
            rows += [2 * mamba + state for state in range(states)] + [2 * mamba + states + head for head in heads]
            conv = channels + [mamba + state for state in range(states)]
            new_part["mixer.in_proj.weight"] = part["mixer.in_proj.weight"][rows][:, hidden]
            new_part["mixer.conv1d.weight"] = part["mixer.conv1d.weight"][conv]
            new_part["mixer.conv1d.bias"] = part["mixer.conv1d.bias"][conv]
            new_part["mixer.norm.weight"] = part["mixer.norm.weight"][channels]
            new_part["mixer.out_proj.weight"] = part["mixer.out_proj.weight"][hidden][:, channels]
            for name in ("dt_bias", "A_log", "D"):
                new_part[f"mixer.{name}"] = part[f"mixer.{name}"][heads]
        cut |= {f"layers.{new}.{name}": tensor for name, tensor in new_part.items()}
    return cut


def stock_of(weights: dict[str, Tensor], config: ModelConfig) -> NemotronHForCausalLM:
    """A stock model of this geometry with these weights put into it."""
    stock = NemotronHConfig(**{**dataclasses.asdict(config), "time_step_limit": (0.0, math.inf)})
    model = NemotronHForCausalLM(stock)
    for mixer in (module for module in model.modules() if hasattr(module, "time_step_limit")):
        mixer.time_step_limit = stock.time_step_limit  # transformers 5.23 takes its time_step_min instead
    model.load_state_dict({f"model.{n}" if n != "lm_head.weight" else n: t for n, t in weights.items()})
    return model


@pytest.fixture(params=["identity", "reordered"])
def elastic(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> tuple[Path, Order]:
    """A checkpoint to cut, and the order that it is in."""
    if request.param == "identity":
        return tiny_checkpoint, identity_order(tiny_config)
    order = random_order(tiny_config, torch.Generator().manual_seed(0))
    reorder_checkpoint(tiny_checkpoint, order, tmp_path / "reordered")
    return tmp_path / "reordered", order


@pytest.fixture(params=["one piece", "many pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many pieces":
        monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
        monkeypatch.setattr(shards, "BLOCK_BYTES", 3000)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("name", SUBNETS)
def test_a_slice_is_the_chosen_part_of_every_tensor(
    tiny_checkpoint: Path, elastic: tuple[Path, Order], tiny_config: ModelConfig, tmp_path: Path, name: str
) -> None:
    """The prefix of the reordered checkpoint is what the order chose from the original one (C2)."""
    subnet, (source, order) = subnet_of(tiny_config, SUBNETS[name]), elastic
    slice_checkpoint(source, subnet, tmp_path / "slice")
    found, expected = load_weights(tmp_path / "slice"), cut_by_hand(load_weights(tiny_checkpoint), subnet, order)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", SUBNETS)
def test_stock_transformers_loads_a_slice_and_computes_the_hand_cut_model(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, name: str
) -> None:
    subnet = subnet_of(tiny_config, SUBNETS[name])
    slice_checkpoint(tiny_checkpoint, subnet, tmp_path / "slice")
    by_hand = cut_by_hand(load_weights(tiny_checkpoint), subnet, identity_order(tiny_config))
    expected = stock_of(by_hand, read_config(tmp_path / "slice"))
    assert torch.equal(logits(load_stock(tmp_path / "slice")), logits(expected))


@pytest.mark.parametrize("name", SUBNETS)
def test_elements_of_a_slice_are_its_cost(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, name: str
) -> None:
    subnet = subnet_of(tiny_config, SUBNETS[name])
    slice_checkpoint(tiny_checkpoint, subnet, tmp_path / "slice")
    written = safetensors.torch.load_file(tmp_path / "slice" / "model.safetensors")
    elements = sum(tensor.numel() for tensor in written.values())
    assert elements == subnet_params(tiny_config, subnet)
    assert elements == sum(math.prod(shape) for shape in tensor_shapes(target_config(tiny_config, subnet)).values())


def test_the_full_subnet_is_the_checkpoint_itself(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    slice_checkpoint(tiny_checkpoint, full_subnet(tiny_config), tmp_path / "slice")
    assert read_config(tmp_path / "slice") == tiny_config
    original = safetensors.torch.load_file(tiny_checkpoint / "model.safetensors")
    written = safetensors.torch.load_file(tmp_path / "slice" / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key].view(torch.uint8), original[key].view(torch.uint8)) for key in original)


def test_a_slice_of_shards_is_the_slice_of_one_file(
    tiny_checkpoint: Path, sharded_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    subnet = subnet_of(tiny_config, SUBNETS["all"])
    assert slice_checkpoint(tiny_checkpoint, subnet, tmp_path / "a") == slice_checkpoint(
        sharded_checkpoint, subnet, tmp_path / "b"
    )


@pytest.mark.parametrize("ffn_layout", ["list", "padded"])
@pytest.mark.parametrize("changes", [*SUBNETS.values(), PER_LAYER], ids=[*SUBNETS, "per layer"])
def test_streaming_and_memory_give_the_same(
    tiny_checkpoint: Path,
    tiny_config: ModelConfig,
    tmp_path: Path,
    changes: dict[str, Any],
    ffn_layout: FfnLayout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subnet = subnet_of(tiny_config, changes)
    expected = slice_weights(load_weights(tiny_checkpoint), subnet, tiny_config, ffn_layout=ffn_layout)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 500)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 900)
    slice_checkpoint(tiny_checkpoint, subnet, tmp_path / "slice", ffn_layout=ffn_layout)
    found = load_weights(tmp_path / "slice")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("read_as", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_slice_has_its_hidden_sizes_gain_in_the_streams_norms_and_the_logits_of_the_subnet_to_the_bit(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, dtype: torch.dtype, read_as: torch.dtype
) -> None:
    energy_D = torch.linspace(2.0, 0.1, tiny_config.hidden_size)
    order, weights = dataclasses.replace(identity_order(tiny_config), energy=energy_D), load_weights(tiny_checkpoint)
    write_weights(tmp_path / "elastic", tiny_config, weights, dtype, beside=lambda staging: write_order(staging, order))
    subnet = subnet_of(tiny_config, SUBNETS["all"])
    slice_checkpoint(tmp_path / "elastic", subnet, tmp_path / "slice")
    written = load_weights(tmp_path / "elastic")
    plain, scaled = slice_weights(written, subnet, tiny_config), load_weights(tmp_path / "slice")
    gain = Energy(energy_D).gain(subnet.hidden)
    of_stream = {"norm_f.weight", *(f"layers.{i}.norm.weight" for i in range(len(subnet.layers)))}
    for name, weight in scaled.items():
        assert torch.equal(weight, plain[name].float() * gain if name in of_stream else plain[name]), name
    cpu, tokens_BT = torch.device("cpu"), torch.arange(12).view(2, 6)
    elastic, alone = (load_model(tmp_path / name, cpu, read_as) for name in ("elastic", "slice"))
    with torch.no_grad():
        expected = alone.logits(alone(tokens_BT, full_subnet(alone.config)))
        assert torch.equal(elastic.logits(elastic(tokens_BT, subnet)), expected)


def test_ffn_widths_that_differ_may_be_written_as_a_list(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    subnet = subnet_of(tiny_config, PER_LAYER)
    slice_checkpoint(tiny_checkpoint, subnet, tmp_path / "slice", ffn_layout="list")
    assert json.loads((tmp_path / "slice" / "config.json").read_text())["intermediate_size"] == [16, 40, 24]
    found = load_weights(tmp_path / "slice")
    assert [found[f"layers.{i}.mixer.up_proj.weight"].shape[0] for i in (1, 4, 7)] == [16, 40, 24]
    assert sum(tensor.numel() for tensor in found.values()) == subnet_params(tiny_config, subnet)


def test_the_list_counts_only_kept_layers(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    for layers, widths in (((0, 1, 2, 7), [16, 24]), ((0, 2, 4), 40)):
        subnet = subnet_of(tiny_config, {**PER_LAYER, "layers": layers})
        slice_checkpoint(tiny_checkpoint, subnet, tmp_path / str(len(layers)), ffn_layout="list")
        config = json.loads((tmp_path / str(len(layers)) / "config.json").read_text())
        assert config["intermediate_size"] == widths


def test_padding_makes_one_width_and_the_same_function(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """Stock transformers cannot hold the unpadded model, so its FFN layers are narrowed by hand."""
    subnet = subnet_of(tiny_config, PER_LAYER)
    slice_checkpoint(tiny_checkpoint, subnet, tmp_path / "padded")
    padded = load_stock(tmp_path / "padded")
    assert padded.config.intermediate_size == 40
    slice_checkpoint(tiny_checkpoint, subnet, tmp_path / "ragged", ffn_layout="list")
    ragged_weights, ragged = load_weights(tmp_path / "ragged"), load_stock(tmp_path / "padded")
    for layer in (1, 4, 7):
        mixer = ragged.model.layers[layer].mixer
        mixer.up_proj.weight = torch.nn.Parameter(ragged_weights[f"layers.{layer}.mixer.up_proj.weight"])
        mixer.down_proj.weight = torch.nn.Parameter(ragged_weights[f"layers.{layer}.mixer.down_proj.weight"])
    expected = logits(ragged)
    assert (logits(padded) - expected).abs().max() <= ZERO_NEURONS * expected.abs().max()
    for name, tensor in load_weights(tmp_path / "padded").items():
        kept = ragged_weights[name]
        inside = tuple(slice(size) for size in kept.shape)
        assert torch.equal(tensor[inside], kept)
        assert tensor.count_nonzero() == kept.count_nonzero()


def test_a_slice_can_be_sliced(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> None:
    """Nested storage rests on this: the smaller slice is a slice of the larger one, also of one with a list."""
    large = subnet_of(tiny_config, {**PER_LAYER, "layers": (0, 1, 2, 3, 4, 7)})
    small = subnet_of(
        tiny_config, {"hidden": 20, "ffn": (8, 32, 24), "mamba_heads": (4, 4, 4), "layers": (0, 2, 3, 4, 7)}
    )
    slice_checkpoint(tiny_checkpoint, large, tmp_path / "large")
    slice_checkpoint(tiny_checkpoint, small, tmp_path / "small")
    inner = dataclasses.replace(
        full_subnet(read_config(tmp_path / "large")),
        hidden=20,
        ffn=(8, 32, 24),
        mamba_heads=(4, 4),
        layers=(0, 2, 3, 4, 5),
    )
    slice_checkpoint(tmp_path / "large", inner, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "small" / "model.safetensors"
    ).read_bytes()


def test_the_tokenizer_comes_along_and_other_files_do_not(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    slice_checkpoint(
        tiny_checkpoint,
        subnet_of(tiny_config, SUBNETS["all"]),
        tmp_path / "slice",
        beside=lambda staging: (staging / "README.md").write_text("card"),
    )
    assert {path.name for path in (tmp_path / "slice").iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba heads by layer": ({"mamba_heads": (12, 8, 12)}, "layer 2 keeps 8 Mamba heads and layer 0 keeps 12"),
    "attention heads by layer": ({"attention_heads": (6, 4)}, "layer 6 keeps 4 attention heads and layer 3 keeps 6"),
    "larger": ({"hidden": 49}, "subnet is larger than the model"),
    "groups": ({"mamba_heads": (7, 7, 7)}, "mamba_heads=7 is not a multiple of n_groups=2"),
    "no layers": ({"layers": ()}, "layers out of order"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_subnet_that_no_engine_loads_is_refused(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, case: str
) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        slice_checkpoint(tiny_checkpoint, subnet_of(tiny_config, changes), tmp_path / "slice")
    assert list(tmp_path.iterdir()) == []


def test_a_nan_in_a_kept_part_stops_the_slice_and_leaves_nothing(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    weights = load_weights(tiny_checkpoint)
    weights["layers.4.mixer.down_proj.weight"][1, 1] = torch.inf
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((tiny_checkpoint / "config.json").read_text())
    write_tensors(source / "model.safetensors", {disk_name(name): tensor for name, tensor in weights.items()})
    with pytest.raises(CheckpointError, match=r"layers\.4\.mixer\.down_proj\.weight: holds NaN or infinity"):
        slice_checkpoint(source, subnet_of(tiny_config, SUBNETS["all"]), tmp_path / "slice")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_types_are_kept_tensor_by_tensor(
    stock_model: Callable[..., NemotronHForCausalLM], tiny_config: ModelConfig, tmp_path: Path
) -> None:
    stock_model().bfloat16().save_pretrained(tmp_path / "half")
    slice_checkpoint(tmp_path / "half", subnet_of(tiny_config, SUBNETS["all"]), tmp_path / "slice")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "slice").tensors.values()} == {torch.bfloat16}
    assert load_stock(tmp_path / "slice").dtype == torch.bfloat16


# Interruption

SLICE = """
import dataclasses, sys
from pathlib import Path
from elastic_core.files.checkpoint import read_config
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.subnet import full_subnet

source, target = map(Path, sys.argv[1:])
subnet = dataclasses.replace(full_subnet(read_config(source)), hidden=768)
slice_checkpoint(source, subnet, target, progress=lambda done, total: print(done / total, flush=True))
"""


@pytest.mark.services
def test_a_slice_killed_at_any_point_is_never_loadable_and_a_rerun_completes(
    tiny_config: ModelConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, hidden_size=1024, intermediate_size=4096, vocab_size=32768)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in tensor_shapes(config).items()
    }
    write_weights(tmp_path / "source", config, weights)
    subnet = dataclasses.replace(full_subnet(config), hidden=768)
    expected = slice_checkpoint(tmp_path / "source", subnet, tmp_path / "uninterrupted")
    target, staging = tmp_path / "target", tmp_path / ".target.partial"

    points = random.Random(0)
    for _ in range(3):
        point = points.uniform(0, 0.7)  # later, the child could end before the signal comes
        command = [sys.executable, "-c", SLICE, str(tmp_path / "source"), str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while float(process.stdout.readline()) < point:
                pass
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not target.exists()
        with pytest.raises(CheckpointError, match="is truncated"):
            open_checkpoint(staging)

    assert slice_checkpoint(tmp_path / "source", subnet, target) == expected
    assert not staging.exists()
