import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHConfig

from elastic_core.files.shards import CheckpointError
from elastic_core.files.stock_config import read_config, write_config
from elastic_core.geometry import ModelConfig
from elastic_core.schema import to_dict

Change = Callable[[dict[str, Any]], object]


def stored(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def copy_with(source: Path, target: Path, change: Change) -> None:
    values = stored(source)
    change(values)
    (target / "config.json").write_text(json.dumps(values))


def original_form(values: dict[str, Any]) -> None:
    """The spelling of NVIDIA's first Nemotron-H configs."""
    del values["layers_block_type"]
    values["hybrid_override_pattern"] = "M-M*-M*-"
    values["num_hidden_layers"] = 8
    values["attention_head_dim"] = values.pop("head_dim")
    values["auto_map"] = {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}
    values["time_step_limit"] = [0.0, float("inf")]


def aliased_form(values: dict[str, Any]) -> None:
    values["mamba_n_groups"] = values.pop("n_groups")
    values["mamba_d_conv"] = values.pop("conv_kernel")
    values["mamba_chunk_size"] = values.pop("chunk_size")
    values["mamba_conv_bias"] = values.pop("use_conv_bias")
    values["mamba_dt_min"] = values.pop("time_step_min")


def legacy_layer_names(values: dict[str, Any]) -> None:
    values["layers_block_type"] = ["mamba", "mlp", "mamba", "attention", "mlp", "mamba", "attention", "mlp"]


def without_defaults(values: dict[str, Any]) -> None:
    for name in ("conv_kernel", "use_conv_bias", "layer_norm_epsilon", "time_step_min", "eos_token_id", "use_bias"):
        del values[name]


def uniform_list(values: dict[str, Any]) -> None:
    values["intermediate_size"] = [40, 40, 40]


@pytest.mark.parametrize(
    ("spelling", "limit"),
    [
        ([0.0, float("inf")], (0.0, None)),
        ([0.0, {"__float__": "Infinity"}], (0.0, None)),
        ([0.0, "Infinity"], (0.0, None)),
        (["0", "inf"], (0.0, None)),
        ([0.0, None], (0.0, None)),
        (None, (0.0, None)),
        ([0.001, 0.5], (0.001, 0.5)),
        ([1e-3, float("inf")], (0.001, None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["time_step_limit", "mamba_dt_limit"])
def test_every_spelling_of_the_limit_of_time_steps_is_read(
    tiny_checkpoint: Path, tmp_path: Path, spelling: object, limit: tuple[float, float | None], key: str
) -> None:
    def change(values: dict[str, Any]) -> None:
        del values["time_step_limit"]
        values[key] = spelling

    copy_with(tiny_checkpoint, tmp_path, change)
    assert read_config(tmp_path).time_step_limit == limit
    copy_with(tiny_checkpoint, tmp_path, lambda values: values.pop("time_step_limit"))
    assert read_config(tmp_path).time_step_limit == (0.0, None)


@pytest.mark.parametrize(
    "spelling",
    [lambda values: None, original_form, aliased_form, legacy_layer_names, without_defaults, uniform_list],
    ids=["transformers 5", "original", "aliased", "legacy names", "defaults", "uniform list"],
)
def test_every_spelling_of_a_config_reads_as_the_same_model(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path, spelling: Change
) -> None:
    copy_with(tiny_checkpoint, tmp_path, spelling)
    assert read_config(tmp_path) == tiny_config


def test_defaults_are_those_of_transformers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy_with(tiny_checkpoint, tmp_path, without_defaults)
    config, stock = read_config(tmp_path), NemotronHConfig.from_pretrained(tmp_path)
    for field in dataclasses.fields(ModelConfig):
        is_size_of_experts = field.default == 0 and "optional" in field.metadata  # a model with experts has to say it
        if field.name not in ("hybrid_override_pattern", "time_step_limit") and not is_size_of_experts:
            assert getattr(config, field.name) == getattr(stock, field.name), field.name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"intermediate_size": (40, 24, 8)},
        {"use_conv_bias": False, "eos_token_id": (2, 11), "pad_token_id": None, "layer_norm_epsilon": 1e-6},
        {"hybrid_override_pattern": "MM*", "head_dim": 16, "max_position_embeddings": 131072},
    ],
)
def test_a_written_config_reads_back(tiny_config: ModelConfig, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(tiny_config, **changes)
    write_config(config, tmp_path, torch.bfloat16)
    assert read_config(tmp_path) == config


def test_a_written_config_has_transformers_compute_the_limit_that_it_states(
    tiny_config: ModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers clamps at time_step_min; mlx-lm and NVIDIA's code at time_step_limit; vLLM and llama.cpp nowhere."""
    for limit, warned in (((0.0, None), False), ((0.002, None), True)):
        caplog.clear()
        config = dataclasses.replace(tiny_config, time_step_limit=limit, time_step_min=0.01)
        for _ in range(2):  # a slice of a slice
            write_config(
                config, tmp_path, torch.float32, base=stored(tmp_path) if (tmp_path / "config.json").exists() else None
            )
            assert read_config(tmp_path) == config
        assert stored(tmp_path)["time_step_limit"] == [limit[0], float("inf")]
        stock = NemotronHConfig.from_pretrained(tmp_path)
        assert (stock.time_step_min, list(stock.time_step_limit)) == (limit[0], [limit[0], float("inf")])
        assert any("vLLM" in record.getMessage() for record in caplog.records) == warned


def test_a_config_whose_time_step_min_is_only_a_lower_limit_says_nothing_of_fresh_weights(
    tiny_checkpoint: Path, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    copy_with(tiny_checkpoint, tmp_path, set_to(time_step_min=0.0))
    assert read_config(tmp_path).time_step_min == tiny_config.time_step_min


def test_transformers_reads_a_written_config(tiny_config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, layer_norm_epsilon=1e-6, eos_token_id=(2, 11))
    write_config(config, tmp_path, torch.bfloat16)
    stock = NemotronHConfig.from_pretrained(tmp_path)
    for name, value in to_dict(config).items():
        if not name.startswith("time_step"):
            assert getattr(stock, name) == value, name
    assert stock.dtype == torch.bfloat16
    assert stock.num_hidden_layers == config.num_layers


def test_vllm_finds_its_own_form_in_a_written_config(tiny_config: ModelConfig, tmp_path: Path) -> None:
    """The keys that vLLM's nemotron_h reads, a list for FFN widths that differ, and nothing that names experts."""
    write_config(dataclasses.replace(tiny_config, intermediate_size=(40, 24, 8)), tmp_path, torch.bfloat16)
    values = stored(tmp_path)
    assert values["architectures"] == ["NemotronHForCausalLM"]
    assert values["model_type"] == "nemotron_h"
    assert values["hybrid_override_pattern"] == "M-M*-M*-"
    assert values["num_hidden_layers"] == 8
    assert values["intermediate_size"] == [40, 24, 8]
    assert (values["mlp_hidden_act"], values["mamba_hidden_act"]) == ("relu2", "silu")
    assert values["torch_dtype"] == "bfloat16"
    assert not values["mlp_bias"] and not values["use_bias"] and not values["tie_word_embeddings"]


def test_other_keys_of_the_source_are_kept_where_they_do_no_harm(tiny_config: ModelConfig, tmp_path: Path) -> None:
    base = {
        "residual_in_fp32": True,
        "expand": 2,
        "a_new_key": {"x": 1},
        "hidden_size": 9999,
        "layers_block_type": ["moe"],
        "mamba_n_groups": 77,
        "n_routed_experts": 8,
        "auto_map": {"AutoConfig": "configuration.Config"},
    }
    write_config(tiny_config, tmp_path, torch.float32, base)
    values = stored(tmp_path)
    assert values["residual_in_fp32"] is True
    assert values["expand"] == 2
    assert values["a_new_key"] == {"x": 1}
    assert values["hidden_size"] == tiny_config.hidden_size
    assert values["mamba_n_groups"] == tiny_config.n_groups
    assert not {"layers_block_type", "n_routed_experts", "auto_map"} & values.keys()
    assert read_config(tmp_path) == tiny_config


def set_to(**values: object) -> Change:
    return lambda config: config.update(values)


def pattern(value: object) -> Change:
    def change(values: dict[str, Any]) -> None:
        del values["layers_block_type"]
        values["hybrid_override_pattern"] = value

    return change


BAD_CONFIGS: dict[str, tuple[Change, str]] = {
    "no model type": (lambda v: v.pop("model_type"), "model_type is missing"),
    "another model": (set_to(model_type="llama"), "model_type is 'llama'; only 'nemotron_h' is supported"),
    "gated activation": (set_to(mlp_hidden_act="swiglu"), "mlp_hidden_act is 'swiglu'; only 'relu2'"),
    "mamba activation": (set_to(mamba_hidden_act="gelu"), "mamba_hidden_act is 'gelu'; only 'silu'"),
    "use_bias": (set_to(use_bias=True), "use_bias is True; only False"),
    "mlp_bias": (set_to(mlp_bias=True), "mlp_bias is True; only False"),
    "attention_bias": (set_to(attention_bias=True), "attention_bias is True; only False"),
    "mamba_proj_bias": (set_to(mamba_proj_bias=True), "mamba_proj_bias is True; only False"),
    "tied": (set_to(tie_word_embeddings=True), "tie_word_embeddings is True; only False"),
    "sliding window": (set_to(sliding_window=128), "sliding_window is 128; only None"),
    "quantised": (set_to(quantization_config={"bits": 4}), "quantization_config is .*; only None"),
    "unknown letter": (pattern("M-X"), "must be made of M .* found X"),
    "pattern a number": (pattern(7), "hybrid_override_pattern is 7; expected a text"),
    "empty pattern": (pattern(""), "found nothing"),
    "no pattern": (lambda v: v.pop("layers_block_type"), "hybrid_override_pattern is missing"),
    "unknown layer name": (set_to(layers_block_type=["rnn"]), "layers_block_type is .* expected a list of"),
    "two patterns": (set_to(hybrid_override_pattern="M-M-"), "name different layers"),
    "layer count": (set_to(num_hidden_layers=9), "num_hidden_layers is 9; layers_block_type has 8 layers"),
    "two aliases": (set_to(mamba_n_groups=4), "mamba_n_groups is 4 and n_groups is 2; expected one value"),
    "no hidden size": (lambda v: v.pop("hidden_size"), "hidden_size is missing"),
    "hidden size zero": (set_to(hidden_size=0), "hidden_size=0 must be greater than 0"),
    "hidden size a fraction": (set_to(hidden_size=4.5), "hidden_size is 4.5; expected a whole number"),
    "hidden size true": (set_to(hidden_size=True), "hidden_size is True"),
    "hidden size infinite": (set_to(hidden_size=float("inf")), "hidden_size is inf"),
    "heads and groups": (set_to(mamba_num_heads=11), "mamba_num_heads=11 is not a multiple of n_groups=2"),
    "queries and keys": (set_to(num_key_value_heads=4), "num_attention_heads=6 is not a multiple"),
    "FFN widths": (set_to(intermediate_size=[40, 24]), "lists 2 widths; the pattern has 3 FFN layers"),
    "FFN width zero": (set_to(intermediate_size=[40, 0, 8]), "must be greater than 0"),
    "epsilon zero": (set_to(layer_norm_epsilon=0), "layer_norm_epsilon=0.0 must be greater than 0"),
    "epsilon NaN": (set_to(layer_norm_epsilon=float("nan")), "layer_norm_epsilon is nan; expected a finite"),
    "time step infinite": (set_to(time_step_min=float("inf")), "time_step_min is inf; expected a finite"),
    "time step limit a number": (set_to(time_step_limit=0.1), "time_step_limit is 0.1; expected a list"),
    "time step limit of one": (set_to(time_step_limit=[0.1]), "time_step_limit has 1 entries; expected 2"),
    "time step limit NaN": (set_to(time_step_limit=[float("nan"), None]), r"time_step_limit\[0\] is nan"),
    "time step limit infinite": (set_to(time_step_limit=["inf", None]), r"time_step_limit\[0\] is 'inf'"),
    "time step limit words": (
        set_to(time_step_limit=[0, "much"]),
        r"time_step_limit\[1\] is 'much'; expected a number",
    ),
    "time step limit below 0": (set_to(time_step_limit=[-1, None]), "time_step_limit=.* must rise from at least 0"),
    "time step limit falls": (set_to(time_step_limit=[0.2, 0.1]), "time_step_limit=.* must rise from at least 0"),
    "context": (set_to(max_position_embeddings=0), "max_position_embeddings is 0; expected at least 1"),
    "token outside": (set_to(eos_token_id=[2, 64]), "eos_token_id is 64; expected a token below vocab_size=64"),
    "token negative": (set_to(pad_token_id=-1), "pad_token_id is -1; expected a token below"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused_in_one_line_that_names_file_and_field(
    tiny_checkpoint: Path, tmp_path: Path, case: str
) -> None:
    change, message = BAD_CONFIGS[case]
    copy_with(tiny_checkpoint, tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("written", "eos"), [({"eos_token_id": [2, 11]}, (2, 11)), ({"eos_token_id": 11}, 11), ({"max_length": 9}, 7)]
)
def test_the_eos_of_generation_config_goes_before_that_of_config(
    tiny_config: ModelConfig, tmp_path: Path, written: dict[str, object], eos: object
) -> None:
    write_config(dataclasses.replace(tiny_config, eos_token_id=7), tmp_path, torch.float32)
    assert read_config(tmp_path).eos_token_id == 7
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    assert read_config(tmp_path).eos_token_id == eos


@pytest.mark.parametrize(
    ("eos", "fault"),
    [("</s>", "eos_token_id is '</s>'; expected a token or a list of them"), ([2, 10**6], "expected a token below")],
)
def test_an_eos_that_is_no_token_is_refused_with_its_file(
    tiny_config: ModelConfig, tmp_path: Path, eos: object, fault: str
) -> None:
    write_config(tiny_config, tmp_path, torch.float32)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{fault}"):
        read_config(tmp_path)
