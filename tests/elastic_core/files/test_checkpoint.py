import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from latency import random_table
from nano import NANO_9B, NANO_12B
from torch import Tensor
from transformers import NemotronHForCausalLM

from elastic_core.budget import Budget, LatencyTarget, MemoryTarget, Serving
from elastic_core.cost import subnet_params
from elastic_core.files.checkpoint import (
    FAMILY_FILE,
    ORDER_FILE,
    ROUTER_FILE,
    CheckpointError,
    Family,
    ResolvedBudget,
    disk_name,
    load_weights,
    memory_name,
    open_checkpoint,
    read_config,
    read_family,
    tensor_shapes,
    write_family,
    write_weights,
)
from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import read_header, write_tensors
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.subnet import Subnet, full_subnet, keep_layers

TOKENS = torch.arange(26).view(2, 13) * 7 % 64


@torch.no_grad()
def logits(model: NemotronHForCausalLM) -> Tensor:
    return model(TOKENS).logits


def load_stock(directory: Path) -> NemotronHForCausalLM:
    """The directory in stock transformers, which must find every tensor and know every tensor."""
    model, report = NemotronHForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# The table of tensors


@pytest.mark.parametrize("config, params", [(NANO_12B, 12_310_001_152), (NANO_9B, 8_888_227_328)], ids=["12B", "9B"])
def test_shapes_of_the_published_models_hold_their_parameters(config: ModelConfig, params: int) -> None:
    assert sum(math.prod(shape) for shape in tensor_shapes(config).values()) == params


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_are_those_that_transformers_writes(
    stock_model: Callable[..., NemotronHForCausalLM], tiny_config: ModelConfig, tmp_path: Path, bias: bool
) -> None:
    stock_model(use_conv_bias=bias).save_pretrained(tmp_path)
    written = {key: tensor.shape for key, tensor in read_header(tmp_path / "model.safetensors").items()}
    shapes = tensor_shapes(dataclasses.replace(tiny_config, use_conv_bias=bias))
    assert written == {disk_name(name): shape for name, shape in shapes.items()}


def test_names_map_back(tiny_config: ModelConfig) -> None:
    for name in tensor_shapes(tiny_config):
        assert memory_name(disk_name(name)) == name


# Reading and writing


def test_loaded_weights_are_those_of_the_stock_model(
    tiny_checkpoint: Path, stock_model: Callable[..., NemotronHForCausalLM]
) -> None:
    state = stock_model().state_dict()
    weights = load_weights(tiny_checkpoint)
    assert {name.removeprefix("model.") for name in state} == set(weights)
    for name, tensor in state.items():
        assert torch.equal(weights[name.removeprefix("model.")], tensor), name


def test_shards_load_as_the_single_file_does(tiny_checkpoint: Path, sharded_checkpoint: Path) -> None:
    single, sharded = load_weights(tiny_checkpoint), load_weights(sharded_checkpoint)
    assert len(list(sharded_checkpoint.glob("*.safetensors"))) > 2
    assert list(single) == list(sharded)
    assert all(torch.equal(single[name], sharded[name]) for name in single)


def test_the_spelling_of_transformers_in_memory_loads_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = safetensors.torch.load_file(tiny_checkpoint / "model.safetensors")
    renamed = {key.replace("backbone.", "model."): tensor for key, tensor in tensors.items()}
    write_tensors(tmp_path / "model.safetensors", renamed)
    weights = load_weights(tmp_path)
    assert all(torch.equal(weights[memory_name(key)], tensor) for key, tensor in tensors.items())


def test_weights_load_as_the_asked_type(tiny_checkpoint: Path) -> None:
    stored = load_weights(tiny_checkpoint)
    for dtype in (torch.bfloat16, torch.float64):
        weights = load_weights(tiny_checkpoint, dtype)
        assert all(torch.equal(weights[name], tensor.to(dtype)) for name, tensor in stored.items())


def test_writing_what_was_read_writes_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, options = read_config(tiny_checkpoint), {"max_shard_bytes": 50_000}
    write_weights(tmp_path / "one", config, load_weights(tiny_checkpoint), source=tiny_checkpoint, **options)
    write_weights(tmp_path / "two", config, load_weights(tmp_path / "one"), source=tmp_path / "one", **options)
    assert len(contents(tmp_path / "one")) > 5
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 50_000])
def test_stock_transformers_loads_what_is_written_and_computes_the_same(
    tiny_checkpoint: Path, tmp_path: Path, max_shard_bytes: int
) -> None:
    config, weights = read_config(tiny_checkpoint), load_weights(tiny_checkpoint)
    write_weights(tmp_path / "new", config, weights, max_shard_bytes=max_shard_bytes)
    assert torch.equal(logits(load_stock(tmp_path / "new")), logits(load_stock(tiny_checkpoint)))


def test_single_tensors_may_keep_a_wider_type(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, weights = read_config(tiny_checkpoint), load_weights(tiny_checkpoint, torch.bfloat16)
    weights = {name: tensor.float() if name.endswith("A_log") else tensor for name, tensor in weights.items()}
    write_weights(tmp_path / "mixed", config, weights)
    found = load_weights(tmp_path / "mixed")
    assert all(found[name].dtype == tensor.dtype for name, tensor in weights.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_files_beside_the_weights_come_along(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    (source / "modeling_nemotron_h.py").write_text("import os")
    (source / "training_args.bin").write_bytes(b"pickle")

    def beside(staging: Path) -> None:
        assert read_config(staging) == read_config(source)
        (staging / "README.md").write_text("card")

    write_weights(
        tmp_path / "new", read_config(source), load_weights(source), torch.bfloat16, source=source, beside=beside
    )
    found = contents(tmp_path / "new")
    copied = ("tokenizer.json", "chat_template.jinja", "generation_config.json")
    assert all(found[name] == (source / name).read_bytes() for name in copied)
    assert set(found) == {"config.json", "model.safetensors", "README.md", *copied}


def test_a_tokenizer_that_links_outside_is_not_copied(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: links to"):
        write_weights(tmp_path / "new", read_config(source), load_weights(source), source=source)
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_midway_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, weights = read_config(tiny_checkpoint), load_weights(tiny_checkpoint)
    weights["norm_f.weight"][3] = math.nan
    with pytest.raises(ValueError, match=r"norm_f\.weight holds NaN or infinity"):
        write_weights(tmp_path / "new", config, weights, max_shard_bytes=50_000)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_contradict_the_config_are_not_written(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, weights = read_config(tiny_checkpoint), load_weights(tiny_checkpoint)
    with pytest.raises(ValueError, match=r"weights contradict the config: .*norm_f"):
        write_weights(tmp_path / "new", config, {**weights, "norm_f.weight": torch.ones(3)})


def test_a_type_that_cannot_hold_the_weights_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config, weights = read_config(tiny_checkpoint), load_weights(tiny_checkpoint)
    weights["norm_f.weight"][3] = 1e9
    write_weights(tmp_path / "large", config, weights)
    with pytest.raises(CheckpointError, match=r"norm_f\.weight: is too large for torch\.float16"):
        load_weights(tmp_path / "large", torch.float16)


# Directories that lie

SHARD = "model-00002-of-00009.safetensors"
INDEX = "model.safetensors.index.json"


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = safetensors.torch.load((directory / SHARD).read_bytes())
        change(tensors)
        write_tensors(directory / SHARD, tensors)

    return edit


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        index = change(index) or index
        (directory / INDEX).write_text(json.dumps(index))

    return edit


def edit_config(**values: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | values))

    return edit


def without_index(directory: Path) -> None:
    for path in directory.glob("model*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"pickle")


def first_key(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


def to_shard(name: str) -> Callable[[Path], None]:
    return edit_index(lambda index: index["weight_map"].update({"backbone.norm_f.weight": name}))


def both_spellings(directory: Path) -> None:
    edit_tensors(lambda t: t.update({first_key(t).replace("backbone", "model"): t[first_key(t)]}))(directory)
    key = first_key(safetensors.torch.load((directory / SHARD).read_bytes())).replace("backbone", "model")
    edit_index(lambda index: index["weight_map"].update({key: SHARD}))(directory)


def extra_key(directory: Path) -> None:
    edit_tensors(lambda t: t.update({"backbone.layers.0.mixer.gate.weight": torch.ones(2, 3)}))(directory)
    edit_index(lambda index: index["weight_map"].update({"backbone.layers.0.mixer.gate.weight": SHARD}))(directory)


def missing_key(directory: Path) -> None:
    key = first_key(safetensors.torch.load((directory / SHARD).read_bytes()))
    edit_tensors(lambda t: t.pop(key))(directory)
    edit_index(lambda index: index["weight_map"].pop(key) and None)(directory)


def bare_key(directory: Path) -> None:
    key = first_key(safetensors.torch.load((directory / SHARD).read_bytes()))
    bare = key.removeprefix("backbone.")
    edit_tensors(lambda t: t.update({bare: t.pop(key)}))(directory)
    edit_index(lambda index: index["weight_map"].update({bare: index["weight_map"].pop(key)}))(directory)


def poison(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[first_key(tensors)].view(-1)[-1] = value

    return edit_tensors(change)


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: there is no such file"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json: is not valid JSON"),
    "no weights": (without_index, "holds no model.safetensors and no index .* only safetensors load"),
    "missing shard": (lambda d: (d / SHARD).unlink(), f"{SHARD}: there is no such file; copy or download"),
    "truncated shard": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-9]), f"{SHARD}: is truncated"),
    "truncated header": (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:30]), f"{SHARD}: is truncated"),
    "shard no safetensors": (lambda d: (d / SHARD).write_text("<html>404 not found"), f"{SHARD}: claims a header"),
    "index no JSON": (lambda d: (d / INDEX).write_text(""), f"{INDEX}: is not valid JSON"),
    "index without a map": (edit_index(lambda i: {"metadata": {}}), "weight_map is not an object"),
    "index maps to a number": (edit_index(lambda i: {"weight_map": {"x": 3}}), "weight_map is not an object"),
    "index climbs out": (to_shard("../model.safetensors"), "is not a plain file name"),
    "index absolute": (to_shard("/etc/passwd"), "is not a plain file name"),
    "index names another shard": (to_shard(SHARD), "holds backbone.norm_f.weight, which the index places in"),
    "index names a tensor in no shard": (
        edit_index(lambda i: i["weight_map"].update({"backbone.extra": SHARD})),
        "places backbone.extra in .* which does not hold it",
    ),
    "index lacks a tensor": (
        edit_index(lambda i: i["weight_map"].pop("backbone.norm_f.weight") and None),
        "holds backbone.norm_f.weight, which the index places in None",
    ),
    "missing key": (missing_key, r"missing: backbone\.layers\.\S+ \[[0-9, ]+\]; unexpected: none"),
    "extra key": (extra_key, r"missing: none; unexpected: backbone\.layers\.0\.mixer\.gate\.weight \[2, 3\]"),
    "key without a prefix": (bare_key, r"missing: backbone\.layers\S+ \[.*; unexpected: layers\.0"),
    "both spellings": (both_spellings, "are the same tensor; expected one of them"),
    "wrong shape": (
        edit_tensors(lambda t: t.update({first_key(t): t[first_key(t)][:-1].clone()})),
        r"has shape \[[0-9, ]+\]; config.json implies \[[0-9, ]+\]",
    ),
    "integer weights": (
        edit_tensors(lambda t: t.update({first_key(t): t[first_key(t)].long()})),
        "has dtype torch.int64; expected a float type",
    ),
    "config with other widths": (edit_config(intermediate_size=32), r"has shape .*40.* config.json implies .*32"),
    "config with other layers": (
        edit_config(layers_block_type=None, hybrid_override_pattern="M-M*-M-"),
        "config.json contradicts the weights; missing: .*; unexpected: ",
    ),
    "config with huge layers": (edit_config(hidden_size=10**15), "config.json implies"),
    "NaN": (poison(math.nan), f"{SHARD}: backbone.*: holds NaN or infinity"),
    "infinity": (poison(-math.inf), f"{SHARD}: backbone.*: holds NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_in_one_line_that_says_where(
    sharded_checkpoint: Path, tmp_path: Path, case: str
) -> None:
    shutil.copytree(sharded_checkpoint, tmp_path, dirs_exist_ok=True)
    break_it, message = BAD_CHECKPOINTS[case]
    break_it(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_opening_reads_no_weights(sharded_checkpoint: Path, tmp_path: Path) -> None:
    """So that a checkpoint of any size is checked at once: NaNs are found when the weights are read."""
    shutil.copytree(sharded_checkpoint, tmp_path, dirs_exist_ok=True)
    poison(math.nan)(tmp_path)
    assert open_checkpoint(tmp_path).config == read_config(sharded_checkpoint)


# elastic.json

RANKING = (0, 3, 1, 2, 7, 5, 4, 6)


def subnet_of(config: ModelConfig, **changes: Any) -> Subnet:
    return dataclasses.replace(full_subnet(config), **changes)


def family_of(config: ModelConfig) -> Family:
    middle = subnet_of(config, hidden=32, ffn=(40, 24, 24), layers=keep_layers(RANKING, 6))
    small = subnet_of(config, hidden=32, ffn=(24, 24, 24), mamba_heads=(4, 4, 4), layers=keep_layers(RANKING, 5))
    subnets = (full_subnet(config), middle, small)
    axes = Axes(hidden=(48, 32), ffn=(40, 24), mamba_heads=(12, 4), depth=(8, 6, 5), per_layer=("ffn",))
    budgets = (
        Budget(name="l"),
        Budget(name="m", memory=MemoryTarget(bytes=400_000, serving=Serving(context=64))),
        Budget(name="s", latency=LatencyTarget(seconds=1e-3)),
    )
    return Family(
        axes=axes,
        budgets=tuple(
            ResolvedBudget(budget=budget, subnet=subnet, params=subnet_params(config, subnet))
            for budget, subnet in zip(budgets, subnets, strict=True)
        ),
        layer_ranking=RANKING,
        latency_table=random_table(config, axes.bind(config)),
        lineage={"teacher": "sha256:0a1b", "datasets": ["sha256:2c", "sha256:3d"], "step": 17, "recipe": {"seed": 0}},
    )


@pytest.fixture
def elastic_checkpoint(tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path) -> Path:
    with staged_directory(tmp_path / "elastic") as staging:
        shutil.copytree(tiny_checkpoint, staging, dirs_exist_ok=True)
        write_tensors(staging / ORDER_FILE, {"hidden": torch.arange(48)})
        write_tensors(staging / ROUTER_FILE, {"weight": torch.ones(3)})
        write_family(staging, family_of(tiny_config))
    return tmp_path / "elastic"


def test_a_family_reads_back(elastic_checkpoint: Path, tiny_config: ModelConfig) -> None:
    family = read_family(elastic_checkpoint)
    assert family == family_of(tiny_config)
    assert family.budget("m").subnet.hidden == 32
    with pytest.raises(ValueError, match="there is no budget 'xl'; known: l, m, s"):
        family.budget("xl")


def test_an_elastic_checkpoint_is_still_a_stock_one(elastic_checkpoint: Path, tiny_checkpoint: Path) -> None:
    assert torch.equal(logits(load_stock(elastic_checkpoint)), logits(load_stock(tiny_checkpoint)))


def edit_family(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        values = json.loads((directory / FAMILY_FILE).read_text())
        change(values)
        (directory / FAMILY_FILE).write_text(json.dumps(values))

    return edit


def edit_budget(index: int, **fields: object) -> Callable[[Path], None]:
    return edit_family(lambda values: values["budgets"][index].update(fields))


def edit_target(index: int, **fields: object) -> Callable[[Path], None]:
    return edit_family(lambda values: values["budgets"][index]["budget"].update(fields))


def edit_subnet(index: int, **fields: object) -> Callable[[Path], None]:
    return edit_family(lambda values: values["budgets"][index]["subnet"].update(fields))


BAD_FAMILIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda d: (d / FAMILY_FILE).unlink(), "there is no such file"),
    "no JSON": (lambda d: (d / FAMILY_FILE).write_text("no"), "is not valid JSON"),
    "no order": (lambda d: (d / ORDER_FILE).unlink(), "order.safetensors: there is no such file"),
    "no router": (lambda d: (d / ROUTER_FILE).unlink(), "router.safetensors: there is no such file"),
    "bad router": (lambda d: (d / ROUTER_FILE).write_bytes(b"x"), "router.safetensors: is truncated"),
    "version": (edit_family(lambda v: v.update(format_version=3)), "format_version is 3; expected one of: 1, 2"),
    "no energy": (
        edit_family(lambda v: v.update(format_version=2)),
        r"order\.safetensors: holds no hidden_energy, by which elastic\.json has norms scaled",
    ),
    "unknown key": (edit_family(lambda v: v.update(budget=1)), "budget is not a known setting; did you mean 'budgets'"),
    "missing key": (edit_family(lambda v: v.pop("axes")), "axes is missing"),
    "no budgets": (edit_family(lambda v: v.update(budgets=[])), "must be at least one"),
    "budget twice": (edit_target(1, name="l"), "each name once"),
    "ranking short": (edit_family(lambda v: v["layer_ranking"].pop()), "must name each of the 8 layers once"),
    "ranking twice": (edit_family(lambda v: v.update(layer_ranking=[0] * 8)), "must name each of the 8 layers once"),
    "axes of another model": (edit_family(lambda v: v["axes"].update(hidden=[64])), "must begin with the teacher's 48"),
    "params wrong": (edit_budget(2, params=1), r"budgets\[2\] \(s\): params is 1; its subnet has"),
    "params a text": (edit_budget(2, params="many"), r"budgets\[2\]\.params is 'many'; expected a number"),
    "memory target below": (
        edit_target(1, memory={"bytes": 5000, "serving": {"context": 64}}),
        r"budgets\[1\] \(m\): its subnet takes [0-9.]+ KiB, more than its target 4\.8828 KiB",
    ),
    "latency target below": (
        edit_target(2, latency="1us"),
        r"budgets\[2\] \(s\): its subnet takes 0\.[0-9]+ ms, more than its target 0\.001 ms",
    ),
    "params target below": (
        edit_target(2, latency=None, params=5),
        r"budgets\[2\] \(s\): its subnet takes [0-9,]+ parameters, more than its target 5 parameters",
    ),
    "two targets": (edit_target(2, params=10**6), r"budgets\[2\]\.budget: budget s has params and latency; give"),
    "latency without a table": (
        edit_family(lambda v: v.update(latency_table=None)),
        r"budgets\[2\] \(s\): budget s: a latency needs a latency table",
    ),
    "latency table of other axes": (
        edit_family(lambda v: v["axes"].update(hidden=[48, 24])),
        r"latency table: [0-9]+ choices of the axes are missing, such as 24",
    ),
    "latency table with a zero": (
        edit_family(lambda v: v["latency_table"]["fixed"].update({"48": 0})),
        r"latency_table: nanoseconds=0 must be greater than 0",
    ),
    "subnet too large": (edit_subnet(1, hidden=64), r"budgets\[1\] \(m\): subnet is larger than the model"),
    "subnet zero": (edit_subnet(1, hidden=0), r"budgets\[1\] \(m\): subnet has a size below 1"),
    "subnet short": (edit_subnet(1, ffn=[24]), r"subnet\.ffn has 1 entries; the model has 3"),
    "subnet heads": (edit_subnet(2, mamba_heads=[4, 4, 3]), "mamba_heads=3 is not a multiple of n_groups=2"),
    "subnet layers": (edit_subnet(2, layers=[0, 1, 2, 3, 4]), "are not the first of layer_ranking"),
    "order of budgets": (edit_family(lambda v: v["budgets"].reverse()), r"budgets\[1\] \(m\) is not nested in s"),
}


@pytest.mark.parametrize("case", BAD_FAMILIES)
def test_a_bad_family_is_refused_in_one_line_that_names_the_file(elastic_checkpoint: Path, case: str) -> None:
    break_it, message = BAD_FAMILIES[case]
    break_it(elastic_checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_family(elastic_checkpoint)
    assert "\n" not in str(caught.value)
    assert str(elastic_checkpoint) in str(caught.value)


def test_a_bad_family_is_not_written(elastic_checkpoint: Path, tiny_config: ModelConfig) -> None:
    family = dataclasses.replace(family_of(tiny_config), layer_ranking=(0, 1))
    before = (elastic_checkpoint / FAMILY_FILE).read_bytes()
    with pytest.raises(ValueError, match="must name each of the 8 layers once"):
        write_family(elastic_checkpoint, family)
    assert (elastic_checkpoint / FAMILY_FILE).read_bytes() == before
