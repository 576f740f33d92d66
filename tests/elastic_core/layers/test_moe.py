"""Mixtures of experts: transformers' function, and every form of a subnet of them the same at its own cost."""

import dataclasses
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from nano import NANO_30B
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, NemotronHConfig, NemotronHForCausalLM

from elastic_core import cost
from elastic_core.files import checkpoint
from elastic_core.files.reorder import (
    check_order,
    random_order,
    read_order,
    reorder_checkpoint,
    reorder_in_place,
    reorder_weights,
    write_order,
)
from elastic_core.files.shards import CheckpointError, read_json, read_tensors, write_json, write_tensors
from elastic_core.files.shells import assemble, write_shell
from elastic_core.files.slicing import slice_checkpoint, slice_weights, target_config
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.importance import importance_order, width_scores
from elastic_core.layers.kernels import TORCH
from elastic_core.layers.kind import Cache
from elastic_core.layers.kinds import KINDS
from elastic_core.layers.moe import Mixture
from elastic_core.model import ElasticNemotronH
from elastic_core.planning.flops import forward_flops
from elastic_core.rotation import rotate_weights
from elastic_core.schema import build, to_dict
from elastic_core.subnet import Masks, Subnet, check_subnet, full_subnet, is_nested, within
from elastic_core.training.curriculum import generator
from elastic_core.training.tokens import TokenBatch
from tasks.teacher import left_out_text

FLOAT32_AGAINST_STOCK = 1e-5  # transformers routes, norms and scans in float32, whatever the dtype
FLOAT64 = 1e-12  # the same sums in another order

EXPERTS = {
    "hybrid_override_pattern": "ME*EM-E",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "routed_scaling_factor": 2.5,
}
CASES = {
    "one expert a token": {"num_experts_per_tok": 1},
    "two": {"num_experts_per_tok": 2},
    "three, latent": {"moe_latent_size": 16},
    "four, two groups": {"num_experts_per_tok": 4, "n_group": 2, "topk_group": 1},
    "two shared experts": {"n_shared_experts": 2},
    "two groups of two, latent, gates as they are": {
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "moe_latent_size": 16,
        "norm_topk_prob": False,
    },
}

Maker = Callable[..., NemotronHForCausalLM]


def stock(stock_model: Maker, **changes: object) -> NemotronHForCausalLM:
    """Calm weights, and selection biases that overrule the scores and make some of s + b negative."""
    model = stock_model(**EXPERTS, **changes) if not changes.keys() & EXPERTS else stock_model(**{**EXPERTS, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim >= 2 else 1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.8 * torch.randn(buffer.shape) - 0.5)
    return model


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def saved(request, tmp_path_factory, stock_model: Maker) -> Path:
    directory = tmp_path_factory.mktemp("experts") / "stock"
    stock(stock_model, **request.param).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def grouped(tmp_path_factory, stock_model: Maker) -> Path:
    """The hardest case: groups of experts of which a token chooses one, and a latent."""
    directory = tmp_path_factory.mktemp("experts") / "grouped"
    stock(stock_model, n_group=2, topk_group=1, num_experts_per_tok=2, moe_latent_size=16).save_pretrained(directory)
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float64) -> ElasticNemotronH:
    model = ElasticNemotronH(checkpoint.read_config(directory), backend="torch")
    model.load_state_dict(checkpoint.load_weights(directory))
    return model.to(dtype)


def tokens(config: ModelConfig, length: int = 19) -> Tensor:
    return torch.randint(config.vocab_size, (2, length), generator=generator("tokens"))


def logits(model: ElasticNemotronH, subnet: Subnet | None = None, masks: Masks | None = None) -> Tensor:
    with torch.no_grad():
        return model.logits(model(tokens(model.config), subnet or full_subnet(model.config), masks))


def of_weights(weights: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    model = ElasticNemotronH(config, "torch").double()
    model.load_state_dict(dict(weights))
    return logits(model)


def of_stock(directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    model = NemotronHForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()
    with torch.no_grad():
        found: Tensor = model(tokens(config)).logits
    return found


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def random_subnet(config: ModelConfig, rng: random.Random) -> Subnet:
    """Any subnet whose slice an engine loads: transformers' cache needs an attention layer."""
    top_k = rng.randint(1, config.num_experts_per_tok)
    least = max(2, -(-top_k // config.topk_group))
    depth = rng.choice([3, 5, config.num_layers])
    return Subnet(
        hidden=rng.randint(9, config.hidden_size),
        ffn=tuple(rng.randint(1, size) for size in config.ffn_sizes),
        mamba_heads=(config.n_groups * rng.randint(1, 6),) * len(config.layers_of("M")),
        mamba_head_dim=rng.randint(1, config.mamba_head_dim),
        attention_heads=(config.num_key_value_heads * rng.randint(1, 3),) * len(config.layers_of("*")),
        layers=tuple(sorted({*rng.sample(range(config.num_layers), depth), *config.layers_of("*")})),
        expert_ffn=tuple(rng.randint(1, size) for size in config.full_sizes("expert_ffn")),
        experts=config.n_group * rng.randint(least, config.n_routed_experts // config.n_group),
        shared_ffn=rng.randint(1, config.moe_shared_expert_intermediate_size),
        top_k=top_k,
        latent=rng.randint(1, config.moe_latent_size) if config.moe_latent_size else 0,
    )


def one_hot_masks(config: ModelConfig, subnet: Subnet) -> Masks:
    """Masks over the full model that are one on what `subnet` keeps and zero on the rest."""

    def prefix(kept: int, full: int) -> Tensor:
        return (torch.arange(full) < kept).double()

    def in_groups(kept: int, full: int, groups: int) -> Tensor:
        return prefix(kept // groups, full // groups)

    full = full_subnet(config)
    return Masks(
        hidden=prefix(subnet.hidden, full.hidden),
        ffn=tuple(map(prefix, subnet.ffn, full.ffn)),
        mamba_heads=tuple(
            in_groups(k, f, config.n_groups) for k, f in zip(subnet.mamba_heads, full.mamba_heads, strict=True)
        ),
        mamba_head_dim=prefix(subnet.mamba_head_dim, full.mamba_head_dim),
        attention_heads=tuple(
            in_groups(k, f, config.num_key_value_heads)
            for k, f in zip(subnet.attention_heads, full.attention_heads, strict=True)
        ),
        layers=torch.tensor([float(layer in subnet.layers) for layer in full.layers]).double(),
        expert_ffn=tuple(map(prefix, subnet.expert_ffn, full.expert_ffn)),
        experts=in_groups(subnet.experts, full.experts, config.n_group),
        shared_ffn=prefix(subnet.shared_ffn, full.shared_ffn),
        top_k=prefix(subnet.top_k, full.top_k),
        latent=prefix(subnet.latent, full.latent) if full.latent else None,
    )


# Counts


def test_nano_30b_has_its_published_parameters_in_all_and_for_a_token():
    full = full_subnet(NANO_30B)
    assert cost.subnet_params(NANO_30B, full) == 31_577_940_288
    assert cost.active_params(NANO_30B, full) == 3_580_076_352
    assert len(checkpoint.tensor_places(NANO_30B)) == 6243


def test_active_parameters_are_those_that_a_token_passes_through(saved):
    """A cache holds the weights that a token's pass reads; embedding, output head and norms are read beside them."""
    model, rng = load(saved), random.Random(0)
    for subnet in (full_subnet(model.config), *(random_subnet(model.config, rng) for _ in range(8))):
        cache = Cache()
        with torch.no_grad():
            model(tokens(model.config, 1)[:1], subnet, cache=cache)
        read = sum(weight.numel() for of_layer in cache.weights.values() for weight in of_layer.values())
        norms = (len(subnet.layers) + 1) * subnet.hidden
        outside = 2 * model.config.vocab_size * subnet.hidden
        assert cost.active_params(model.config, subnet) == read + norms + outside


# Files


def test_a_stock_config_with_experts_is_read_and_written_as_transformers_reads_it(saved, tmp_path):
    found = checkpoint.read_config(saved)
    checkpoint.write_config(found, tmp_path, torch.float32)
    written, theirs = AutoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(saved)
    assert checkpoint.read_config(tmp_path) == found
    assert written.n_shared_experts == 1  # by which vLLM multiplies the width
    for name in ("layers_block_type", "moe_shared_expert_intermediate_size", *dataclasses.asdict(found)):
        if name.startswith(("layers", "moe", "n_", "num_experts", "topk", "norm_topk", "routed")):
            assert getattr(written, name) == getattr(theirs, name), name


def test_layers_that_predict_several_tokens_are_left_out_and_named(grouped, tmp_path):
    """As in Nemotron 3 Super, whose config.json and weights have them beside the model's own."""
    teacher = tmp_path / "teacher"
    shutil.copytree(grouped, teacher)
    stated = {"num_nextn_predict_layers": 1, "mtp_layers_block_type": ["full_attention", "moe"]}
    write_json(teacher / "config.json", read_json(teacher / "config.json") | stated)
    own = read_tensors(teacher / "model.safetensors")
    ahead = {"mtp.layers.0.eh_proj.weight": torch.ones(4, 8), "mtp.layers.0.norm.weight": torch.ones(4)}
    write_tensors(teacher / "model.safetensors", own | ahead)
    opened = checkpoint.open_checkpoint(teacher)
    assert set(opened.left_out) == ahead.keys()
    assert left_out_text(opened).startswith("its 2 tensors mtp.*, which predict several tokens at once, are left out")
    slice_checkpoint(teacher, full_subnet(opened.config), tmp_path / "full")
    assert AutoConfig.from_pretrained(tmp_path / "full").num_nextn_predict_layers == 0
    assert checkpoint.open_checkpoint(tmp_path / "full").left_out == ()
    assert difference(of_stock(tmp_path / "full", opened.config), logits(load(grouped))) < FLOAT32_AGAINST_STOCK


def test_the_settings_of_experts_of_a_model_without_any_are_not_read_and_not_written(tiny_checkpoint, tmp_path):
    stated = read_json(tiny_checkpoint / "config.json")
    assert stated["n_routed_experts"] > 0, "transformers writes them"
    config = checkpoint.read_config(tiny_checkpoint)
    assert config.n_routed_experts == config.num_experts_per_tok == 0
    checkpoint.write_config(config, tmp_path, torch.float32, stated)
    assert not [name for name in read_json(tmp_path / "config.json") if "expert" in name or "moe" in name]
    assert "n_routed_experts" not in to_dict(config)
    assert build(ModelConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_routed_experts": 1}, "n_routed_experts=1 is below 3, the least that 3 experts a token can be chosen from"),
        ({"n_group": 3}, "n_routed_experts=8 is not a multiple of n_group=3"),
        ({"topk_group": 2}, "topk_group=2 is above n_group=1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be greater than 0"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0; expected at least 1"),
        ({"moe_latent_size": 0}, "moe_latent_size=0 must be greater than 0"),
    ],
)
def test_settings_of_experts_that_are_no_model_are_refused_in_one_line(stock_model, tmp_path, changes, message):
    stock(stock_model).config.save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), **changes})
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_config(tmp_path)


# One function


def test_logits_are_those_of_transformers(saved):
    config = checkpoint.read_config(saved)
    assert difference(logits(load(saved, torch.float32)), of_stock(saved, config)) < FLOAT32_AGAINST_STOCK


def test_decoding_with_caches_gives_what_one_pass_gives(saved):
    model = load(saved)
    subnet = dataclasses.replace(
        full_subnet(model.config), hidden=40, expert_ffn=(12,) * 3, shared_ffn=20, experts=model.config.n_group * 3
    )
    text, cache = tokens(model.config), Cache()
    with torch.no_grad():
        pieces = [model.logits(model(piece, subnet, cache=cache)) for piece in text.split([7, 1, 1, 3, 1, 6], dim=1)]
    assert difference(torch.cat(pieces, dim=1), logits(model, subnet)) < FLOAT64


def test_random_subnets_are_their_masks_their_slices_and_what_transformers_makes_of_these(saved, tmp_path):
    model, rng = load(saved), random.Random(str(checkpoint.read_config(saved)))
    config, weights = model.config, model.state_dict()
    for number in range(7):  # of each case: 42 in all
        subnet = random_subnet(config, rng)
        sliced_config = target_config(config, subnet)
        prefix, sliced = logits(model, subnet), slice_weights(weights, subnet, config)
        masked = logits(model, full_subnet(config), one_hot_masks(config, subnet))
        assert difference(masked, prefix) < FLOAT64, subnet
        assert difference(of_weights(sliced, sliced_config), prefix) < FLOAT64, subnet
        assert cost.subnet_params(config, subnet) == sum(
            weight.numel() for weight in slice_weights(weights, subnet, config, ffn_layout="list").values()
        )
        slice_checkpoint(saved, subnet, tmp_path / f"{number}")
        found = of_stock(tmp_path / f"{number}", config, torch.float64)
        assert difference(found, prefix) < FLOAT32_AGAINST_STOCK, subnet


def test_widths_of_experts_that_differ_are_written_as_they_are_in_puzzles_form(saved, tmp_path):
    model = load(saved)
    config, full = model.config, full_subnet(model.config)
    subnet = dataclasses.replace(full, hidden=30, expert_ffn=(8, 20, 13), layers=(0, 1, 2, 3, 4, 6), shared_ffn=9)
    slice_checkpoint(saved, subnet, tmp_path / "slice", ffn_layout="list")
    assert difference(logits(load(tmp_path / "slice")), logits(model, subnet)) < FLOAT64
    written = read_json(tmp_path / "slice" / "config.json")
    assert written["architectures"] == ["NemotronHPuzzleForCausalLM"]
    assert written["model_type"] == "nemotron_h_puzzle"
    assert "llama.cpp's converter where experts have latent channels" in (tmp_path / "slice/README.md").read_text()
    blocks = written["block_configs"]
    assert [block["block_type"] for block in blocks] == ["mamba", "moe", "attention", "moe", "mamba", "moe"]
    of_experts = [block for block in blocks if block["block_type"] == "moe"]
    assert [block["moe_intermediate_size"] for block in of_experts] == [8, 20, 13]
    for block in of_experts:
        assert block["n_routed_experts"] == config.n_routed_experts
        assert block["num_experts_per_tok"] == config.num_experts_per_tok
        assert block["moe_shared_expert_intermediate_size"] == 9
        assert block["moe_latent_size"] == config.moe_latent_size
    again = tmp_path / "again"  # a slice of one width is a stock one, whatever it was cut from
    of_slice = full_subnet(checkpoint.read_config(tmp_path / "slice"))
    slice_checkpoint(tmp_path / "slice", dataclasses.replace(of_slice, expert_ffn=(8, 8, 8)), again)
    narrow = dataclasses.replace(subnet, expert_ffn=(8, 8, 8))
    assert difference(of_stock(again, config), logits(model, narrow)) < FLOAT32_AGAINST_STOCK


def puzzle_of(config: dict[str, Any], **changes: object) -> dict[str, Any]:
    """A stock config as NVIDIA writes Puzzle's: what blocks say is nowhere else."""
    fields = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_latent_size")
    of_experts = {name: config[name] for name in (*fields, "moe_shared_expert_intermediate_size")}
    types = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    blocks = [
        {"block_type": types[letter]} | (of_experts if letter == "E" else {})
        for letter in config["hybrid_override_pattern"]
    ]
    blocks[-1] |= changes
    left = {name: value for name, value in config.items() if name not in of_experts and name != "layers_block_type"}
    return left | {"model_type": "nemotron_h_puzzle", "block_configs": blocks, "mtp_block_configs": []}


def test_puzzles_form_is_read_where_only_widths_differ(grouped, tmp_path):
    config = checkpoint.read_config(grouped)
    checkpoint.write_config(config, tmp_path, torch.float32)
    stock_form = read_json(tmp_path / "config.json")

    def read(**changes: object) -> ModelConfig:
        write_json(tmp_path / "config.json", puzzle_of(stock_form, **changes))
        return checkpoint.read_config(tmp_path)

    assert read() == config
    assert read(moe_intermediate_size=12) == dataclasses.replace(config, moe_intermediate_size=(20, 20, 12))
    blocks = puzzle_of(stock_form)["block_configs"]
    del blocks[1]["moe_intermediate_size"]
    write_json(tmp_path / "config.json", puzzle_of(stock_form) | {"block_configs": blocks, "moe_intermediate_size": 8})
    assert checkpoint.read_config(tmp_path).moe_intermediate_size == (8, 20, 20)
    with pytest.raises(CheckpointError, match=r"num_experts_per_tok differs by layer, \[2, 2, 1\]; .* only inter"):
        read(num_experts_per_tok=1)
    with pytest.raises(CheckpointError, match=r"layers_block_type is .*'linear_moe'.*; expected a list of"):
        read(block_type="linear_moe")
    for blocks in (None, [1, 2]):
        write_json(tmp_path / "config.json", puzzle_of(stock_form) | {"block_configs": blocks})
        with pytest.raises(CheckpointError, match=r"block_configs is .*; expected a list with the settings of each"):
            checkpoint.read_config(tmp_path)


def test_a_dropped_expert_is_never_chosen_over_a_kept_one_of_negative_score():
    """Where s + b < 0 for every kept expert, a dropped one with s + b set to 0 would be chosen."""
    config = dataclasses.replace(NANO_30B, hidden_size=6, n_routed_experts=4, num_experts_per_tok=2)
    mixture = Mixture(config, 1).double()
    torch.nn.init.normal_(mixture.gate.weight)
    with torch.no_grad():
        mixture.gate.e_score_correction_bias.fill_(-3.0)
    masks = {"experts": torch.tensor([1.0, 1.0, 0.0, 0.0]).double()}
    chosen, _ = mixture.route(torch.randn(20, 6, generator=generator("x")).double(), {}, None, masks)
    assert set(chosen.flatten().tolist()) == {0, 1}


def test_a_mask_between_zero_and_one_reaches_the_router_by_the_gates(grouped):
    model = load(grouped)
    config = model.config
    weighed = {
        "experts": torch.tensor([1.0, 0.6, 0.3, 0.05]).double().requires_grad_(),
        "top_k": torch.tensor([1.0, 0.6]).double().requires_grad_(),
        "latent": torch.linspace(1.0, 0.5, 16).double().requires_grad_(),
    }
    masks = dataclasses.replace(one_hot_masks(config, full_subnet(config)), **weighed)
    model.logits(model(tokens(config), full_subnet(config), masks)).square().sum().backward()
    for axis, mask in weighed.items():
        assert mask.grad is not None and bool((mask.grad != 0).all()), axis


def test_a_subnet_of_fewer_experts_a_token_chooses_the_best_of_those_that_the_model_chooses(saved):
    model = load(saved)
    x_ND = torch.randn(30, model.config.hidden_size, generator=generator("x")).double()
    for layer in model.config.layers_of("E"):
        mixer, whole = model.layers[layer].mixer, model.config.num_experts_per_tok
        chosen_NS, scores_NS = mixer.route(x_ND, {})
        for top_k in range(1, whole + 1):
            fewer_NS, own_NS = mixer.route(x_ND, {"top_k": top_k})
            assert torch.equal(fewer_NS, chosen_NS[:, :top_k]) and torch.equal(own_NS, scores_NS[:, :top_k])


# Cost


def test_experts_that_no_token_chose_are_not_read(saved):
    model = load(saved)
    one = torch.zeros(1, 1, dtype=torch.long)
    model.logits(model(one, full_subnet(model.config))).sum().backward()
    chosen = model.config.num_experts_per_tok
    for layer in model.config.layers_of("E"):
        experts = model.layers[layer].mixer.experts
        assert sum(expert.up_proj.weight.grad is not None for expert in experts) == chosen


def test_operations_are_those_of_the_chosen_experts(saved):
    model = load(saved, torch.float32)
    config, batch = model.config, tokens(model.config)
    only = dataclasses.replace(full_subnet(config), layers=config.layers_of("E"))
    none = dataclasses.replace(only, layers=())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch, only)
    counted = forward_flops(config, only, batch.numel()).total - forward_flops(config, none, batch.numel()).total
    # The weighted sum of the outputs is not planned for; of one output it is no product.
    added = config.num_experts_per_tok if config.num_experts_per_tok > 1 else 0
    gates = 3 * 2 * batch.numel() * added * (config.moe_latent_size or config.hidden_size)
    assert counter.get_total_flops() == counted + gates


# Order


def test_a_reorder_keeps_the_function_in_memory_in_place_and_on_disk(saved, tmp_path):
    model = load(saved)
    config, before, weights = model.config, logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    order = random_order(config, generator("order"))
    reordered = reorder_weights(weights, order, config)
    assert difference(of_weights(reordered, config), before) < FLOAT64
    reorder_in_place(model.state_dict(), order, config)
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in reordered.items())
    reorder_checkpoint(saved, order, tmp_path / "reordered", beside=lambda staging: write_order(staging, order))
    on_disk = checkpoint.load_weights(tmp_path / "reordered", torch.float64)
    assert all(torch.equal(on_disk[name], weight) for name, weight in reordered.items())
    found = read_order(tmp_path / "reordered", config)
    assert all(map(torch.equal, found.expert_ffn, order.expert_ffn))
    assert all(map(torch.equal, found.experts, order.experts))


def test_a_rotation_of_the_residual_stream_keeps_the_function(grouped):
    model = load(grouped)
    config = model.config
    basis, _ = torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size, generator=generator("q")).double())
    rotated = rotate_weights(model.state_dict(), basis, config)
    assert difference(of_weights(rotated, config), logits(model)) < FLOAT64


def test_an_order_that_takes_experts_out_of_their_group_is_refused(grouped):
    config = checkpoint.read_config(grouped)
    order = random_order(config, generator("order"))
    moved = tuple(entry.roll(1) for entry in order.experts)
    with pytest.raises(ValueError, match=r"order\.experts.0. moves heads from one group"):
        check_order(dataclasses.replace(order, experts=moved), config)
    with pytest.raises(ValueError, match=r"order\.expert_ffn.0. is .*one row each of experts"):
        check_order(dataclasses.replace(order, expert_ffn=tuple(e[:-1] for e in order.expert_ffn)), config)


def test_experts_are_ranked_by_what_they_add_and_neurons_inside_each_of_them(grouped):
    model = load(grouped)
    config = model.config
    with torch.no_grad():
        for layer in config.layers_of("E"):
            mixer = model.layers[layer].mixer
            mixer.experts[1].down_proj.weight.zero_()
            mixer.experts[6].down_proj.weight.mul_(100)
            mixer.experts[2].up_proj.weight[3] = 0.0
            mixer.experts[5].up_proj.weight[7] = 0.0
            mixer.shared_experts.up_proj.weight[11] = 0.0
            mixer.fc1_latent_proj.weight[9] *= 10
            mixer.fc2_latent_proj.weight[:, 9] *= 10
            mixer.fc1_latent_proj.weight[4] = 0.0
            mixer.fc2_latent_proj.weight[:, 4] = 0.0
            mixer.gate.e_score_correction_bias.zero_()
    inputs = torch.randint(config.vocab_size, (3, 200), generator=generator("calibration"))
    batches = [TokenBatch(inputs_BT=row[None], targets_BT=row[None], packing=None, learned=200) for row in inputs]
    axes = Axes(experts=(8, 4), expert_ffn=(20, 8)).bind(config)
    order = importance_order(config, width_scores(model, batches), range(config.num_layers), axes)
    check_order(order, config)
    for layer, entry in enumerate(order.experts):
        assert int(entry[3]) == 1 and int(entry[4]) == 6, "the last of the first group, the first of the second"
        assert int(order.expert_ffn[layer][2][-1]) == 3 and int(order.expert_ffn[layer][5][-1]) == 7
        assert int(order.shared_ffn[layer][-1]) == 11
        assert int(order.latent[layer][0]) == 9 and int(order.latent[layer][-1]) == 4


def test_an_expert_counts_what_it_adds_to_all_tokens(saved):
    model = load(saved).requires_grad_(False)
    config, layer = model.config, model.config.layers_of("E")[0]
    mixer, x_BTD = model.layers[layer].mixer, torch.randn(2, 30, config.hidden_size, generator=generator("x")).double()
    scores, _ = KINDS["E"].added(mixer, x_BTD, TORCH)
    sums = torch.zeros(8).double()
    for x_D in x_BTD.flatten(0, 1):
        chosen, own_scores = mixer.route(x_D[None], {})
        gates = config.routed_scaling_factor * own_scores[0] / (own_scores.sum() if config.norm_topk_prob else 1)
        for expert, gate in zip(chosen[0].tolist(), gates.tolist(), strict=True):
            z_W = x_D if config.moe_latent_size is None else mixer.fc1_latent_proj(x_D)
            own = mixer.experts[expert]
            f_D = own.down_proj(own.up_proj(z_W).relu().square())
            f_D = f_D if config.moe_latent_size is None else mixer.fc2_latent_proj(f_D)
            sums[expert] += gate * float(f_D.norm())
    assert difference(scores[:8], sums) < FLOAT64


# Subnets


@pytest.mark.parametrize("ffn_layout", ["padded", "list"])
@pytest.mark.parametrize("widths", [(20, 20, 20), (20, 9, 14)], ids=str)
def test_shells_give_back_the_slice_byte_for_byte(grouped, tmp_path, widths, ffn_layout):
    config = checkpoint.read_config(grouped)
    full = full_subnet(config)
    large = dataclasses.replace(full, expert_ffn=widths)
    small = dataclasses.replace(
        full, hidden=30, experts=4, expert_ffn=(9,) * 3, shared_ffn=11, layers=(0, 1, 2, 4, 6), mamba_heads=(6, 6)
    )
    slice_checkpoint(grouped, large, tmp_path / "large", ffn_layout=ffn_layout)
    slice_checkpoint(grouped, small, tmp_path / "small")
    write_shell(
        tmp_path / "large",
        tmp_path / "shell",
        own=within(large, large, config),
        below=within(small, large, config),
    )
    again = tmp_path / "again"
    again.mkdir()
    shutil.copyfile(tmp_path / "large" / "config.json", again / "config.json")
    assemble(again, [tmp_path / "small", tmp_path / "shell"])
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "large" / "model.safetensors").read_bytes()


def test_a_slice_without_a_layer_of_experts_has_no_settings_of_them(grouped, tmp_path):
    config = checkpoint.read_config(grouped)
    subnet = dataclasses.replace(full_subnet(config), layers=(0, 2, 4, 5))
    slice_checkpoint(grouped, subnet, tmp_path / "dense")
    sliced = checkpoint.read_config(tmp_path / "dense")
    assert sliced == target_config(config, subnet)
    assert full_subnet(sliced) == within(subnet, subnet, config)
    assert difference(of_stock(tmp_path / "dense", config), logits(load(grouped), subnet)) < FLOAT32_AGAINST_STOCK


def test_subnets_that_cannot_route_or_that_no_engine_loads_are_refused(grouped, tiny_config):
    config = checkpoint.read_config(grouped)
    full = full_subnet(config)
    with pytest.raises(ValueError, match=r"subnet\.experts=2 is below 4, the least"):
        check_subnet(dataclasses.replace(full, experts=2), config)
    with pytest.raises(ValueError, match=r"subnet\.experts=5 is not a multiple of n_group=2"):
        check_subnet(dataclasses.replace(full, experts=5), config)
    with pytest.raises(ValueError, match=r"teacher's moe_intermediate_size differs by layer"):
        Axes().bind(dataclasses.replace(config, moe_intermediate_size=(20, 20, 10)))
    with pytest.raises(ValueError, match=r"axes\.experts=2 is below 4"):
        Axes(experts=(8, 2)).bind(config)
    with pytest.raises(ValueError, match=r"axes\.experts is given, but the teacher has no layers with experts"):
        Axes(experts=(8, 4)).bind(tiny_config)
    with pytest.raises(ValueError, match=r"axes\.latent is given, but the teacher has no layers with latent channels"):
        Axes(latent=(16, 8)).bind(dataclasses.replace(config, moe_latent_size=None))
    with pytest.raises(ValueError, match=r"axes\.latent=12 is not a multiple of .*=8; nearest valid: 8 or 16"):
        Axes(latent=(16, 12)).bind(config)
    with pytest.raises(ValueError, match=r"axes\.top_k begins with 1; it must begin with the teacher's 2"):
        Axes(top_k=(1,)).bind(config)
    three = dataclasses.replace(config, num_experts_per_tok=3)
    with pytest.raises(ValueError, match=r"subnet\.experts=4 is below 6, the least that 3 experts a token"):
        check_subnet(dataclasses.replace(full_subnet(three), experts=4), three)
    check_subnet(dataclasses.replace(full_subnet(three), experts=4, top_k=2), three)
    assert is_nested(dataclasses.replace(full, experts=4), full)
    assert not is_nested(full, dataclasses.replace(full, experts=4))


def test_the_axes_of_experts_are_those_of_a_model_that_has_them(grouped, tiny_config):
    assert Axes().bind(tiny_config).names == Axes.NAMES
    latent, of_experts = checkpoint.read_config(grouped), ("expert_ffn", "experts", "shared_ffn", "top_k", "latent")
    assert Axes().bind(latent).names == (*Axes.NAMES, *of_experts)
    hidden = dataclasses.replace(latent, moe_latent_size=None)
    assert Axes().bind(hidden).names == (*Axes.NAMES, *of_experts[:-1])
    assert (full_subnet(hidden).latent, full_subnet(tiny_config).top_k) == (0, 0)
    assert to_dict(Axes().bind(tiny_config)).keys() == {*Axes.NAMES, "per_layer"}
    assert NemotronHConfig().n_routed_experts > 0
