"""config.json of a stock Nemotron-H checkpoint: read strictly, written so that transformers and vLLM both load it."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from elastic_core.files import puzzle
from elastic_core.files.shards import CheckpointError, read_json, regular_file, write_json
from elastic_core.geometry import ATTENTION, BLOCK_TYPES, MAMBA, MOE, ModelConfig
from elastic_core.schema import build, to_dict

logger = logging.getLogger(__name__)

# The only values that we compute with; a config that says otherwise is another model.
_SUPPORTED = {
    "model_type": "nemotron_h",
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "mamba_proj_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": None,
    "quantization_config": None,
}

# Other spellings that NemotronHConfig or NVIDIA's own configs accept.
_ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_head": "mamba_head_dim",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "attention_head_dim": "head_dim",
}

# What a time_step_limit without an upper end says there: NVIDIA's files, those that transformers 5 writes, and others.
_UNLIMITED = (math.inf, {"__float__": "Infinity"}, "Infinity", "inf")

_GENERATION = "generation_config.json"

# Where a written config keeps the time_step_min that fresh weights begin at; see write_config.
_INITIAL_MIN = "initial_time_step_min"

# The settings of experts. Those of a model without `E` layers say nothing, though transformers writes them.
_OF_EXPERTS = tuple(field.name for field in dataclasses.fields(ModelConfig) if "optional" in field.metadata)

# Keys that are not copied from another config.json: spellings that we do not write, code that we do not copy, and
# settings of layers that this model may lack, by which an engine could take it for a mixture of experts.
_NOT_COPIED = {
    *_ALIASES,
    *_OF_EXPERTS,
    *("layers_block_type", "layer_types", "auto_map", "_name_or_path"),
    *("num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "n_shared_experts"),
    *("moe_shared_expert_overlap", "output_router_logits", puzzle.BLOCKS, "mtp_block_configs"),
}

# transformers 5 has other names for two kinds.
_LETTERS = {"linear_attention": MAMBA, "full_attention": ATTENTION} | {
    name: letter for letter, name in BLOCK_TYPES.items()
}


def read_config(directory: Path) -> ModelConfig:
    """The geometry in a stock checkpoint's config.json; CheckpointError for a model that is not supported.

    The eos is that of generation_config.json where it names one, because that ends generation in every engine.
    """
    path = regular_file(directory, "config.json")
    found = read_json(path)
    if "model_type" not in found:
        raise CheckpointError(f"{path}: model_type is missing; expected 'nemotron_h'")
    if found["model_type"] == puzzle.MODEL_TYPE:
        found = puzzle.without_blocks(path, found)
    for name, value in _SUPPORTED.items():
        if found.get(name, value) != value:
            raise CheckpointError(f"{path}: {name} is {found[name]!r}; only {value!r} is supported")
    values = _unaliased(path, found)
    values["hybrid_override_pattern"] = pattern = _pattern(path, found)
    if MOE not in pattern:
        values = {name: value for name, value in values.items() if name not in _OF_EXPERTS}
    elif type(shared := values.get("n_shared_experts", 1)) is not int or shared < 1:
        raise CheckpointError(f"{path}: n_shared_experts is {shared!r}; expected at least 1")
    for name in ("intermediate_size", "moe_intermediate_size"):
        widths = values.get(name)
        if isinstance(widths, list) and widths and all(width == widths[0] for width in widths):
            values[name] = widths[0]
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    try:
        config = build(ModelConfig, {name: value for name, value in values.items() if name in names})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_numbers(path, config)
    return _with_generations_eos(directory, config)


def stored_dtype(directory: Path) -> str | None:
    """What a stock checkpoint's config.json calls the type of its weights, such as float32."""
    found = read_json(regular_file(directory, "config.json"))
    name = found.get("dtype", found.get("torch_dtype"))
    return name if isinstance(name, str) else None


def _with_generations_eos(directory: Path, config: ModelConfig) -> ModelConfig:
    if not (directory / _GENERATION).exists():
        return config
    path = regular_file(directory, _GENERATION)
    eos = read_json(path).get("eos_token_id")
    if eos is None or eos == []:
        return config
    if not all(type(token) is int for token in (eos if isinstance(eos, list) else [eos])):
        raise CheckpointError(f"{path}: eos_token_id is {eos!r}; expected a token or a list of them")
    changed = dataclasses.replace(config, eos_token_id=tuple(eos) if isinstance(eos, list) else eos)
    _check_numbers(path, changed)
    return changed


def _unaliased(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in found.items() if name not in _ALIASES}
    for alias, name in _ALIASES.items():
        if alias in found and values.setdefault(name, found[alias]) != found[alias]:
            raise CheckpointError(
                f"{path}: {alias} is {found[alias]!r} and {name} is {values[name]!r}; expected one value"
            )
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    return _time_steps(values)


def _time_steps(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with time_step_limit and time_step_min as ModelConfig has them; left out where they say nothing."""
    limit = values.pop("time_step_limit", None)
    if isinstance(limit, list) and len(limit) == 2 and limit[1] in _UNLIMITED:
        limit = [limit[0], None]
    if limit is not None:
        values["time_step_limit"] = limit
    written_min = values.pop("time_step_min", None)
    initial_min = values.pop(_INITIAL_MIN, None if written_min == 0 else written_min)
    if initial_min is not None:
        values["time_step_min"] = initial_min
    return values


def _pattern(path: Path, found: Mapping[str, Any]) -> str:
    patterns = {}
    if "hybrid_override_pattern" in found:
        patterns["hybrid_override_pattern"] = found["hybrid_override_pattern"]
    for name in ("layers_block_type", "layer_types"):
        if (kinds := found.get(name)) is not None:
            if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in _LETTERS for kind in kinds):
                raise CheckpointError(f"{path}: {name} is {kinds!r}; expected a list of {', '.join(_LETTERS)}")
            patterns[name] = "".join(_LETTERS[kind] for kind in kinds)
    if not patterns:
        raise CheckpointError(
            f"{path}: hybrid_override_pattern is missing; expected the layers' kinds, such as 'M-M*-'"
        )
    if len(set(map(str, patterns.values()))) > 1:
        raise CheckpointError(f"{path}: {' and '.join(patterns)} name different layers: {patterns}")
    name, pattern = next(iter(patterns.items()))
    if not isinstance(pattern, str):
        raise CheckpointError(f"{path}: {name} is {pattern!r}; expected a text such as 'M-M*-'")
    if found.get("num_hidden_layers", len(pattern)) != len(pattern):
        raise CheckpointError(
            f"{path}: num_hidden_layers is {found['num_hidden_layers']!r}; {name} has {len(pattern)} layers"
        )
    return pattern


def _check_numbers(path: Path, config: ModelConfig) -> None:
    if config.max_position_embeddings < 1:
        raise CheckpointError(
            f"{path}: max_position_embeddings is {config.max_position_embeddings}; expected at least 1"
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name)
        for token in value if isinstance(value, tuple) else (value,):
            if token is not None and not 0 <= token < config.vocab_size:
                raise CheckpointError(
                    f"{path}: {name} is {token}; expected a token below vocab_size={config.vocab_size}"
                )


def write_config(
    config: ModelConfig, directory: Path, dtype: torch.dtype, base: Mapping[str, Any] | None = None
) -> None:
    """Write config.json in NVIDIA's original form, which transformers and vLLM both read, or where it must in Puzzle's.

    `base` is the config.json that the model came from; its other keys are kept where they do no harm.

    transformers up to 5.23 takes time_step_min for the lower end of time_step_limit when it reads a text, and not when
    it decodes with a cache. The written time_step_min is that lower end, so that both compute the model's function.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    lowest, highest = config.time_step_limit
    if config.time_step_limit != (0.0, None):
        logger.warning(
            "%s: time_step_limit is %s; vLLM and llama.cpp do not read it and compute another function",
            directory,
            list(config.time_step_limit),
        )
    values = {
        **{name: value for name, value in (base or {}).items() if name not in _NOT_COPIED},
        **{name: value for name, value in _SUPPORTED.items() if value is not None},
        **to_dict(config),
        **_experts(config),
        "time_step_limit": [lowest, math.inf if highest is None else highest],
        "time_step_min": lowest,
        _INITIAL_MIN: config.time_step_min,
        "mamba_n_groups": config.n_groups,  # SGLang reads this spelling, and takes 8 without it
        "mamba_d_head": config.mamba_head_dim,  # and this one llama.cpp's converter, which takes 64
        "architectures": ["NemotronHForCausalLM"],
        "num_hidden_layers": config.num_layers,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        **(puzzle.to_blocks(config) if puzzle.is_puzzle(config) else {}),
    }
    write_json(directory / "config.json", dict(sorted(values.items())))


def _experts(config: ModelConfig) -> dict[str, Any]:
    """All settings of experts, where the model has any.

    Several shared experts are one of their common width: transformers reads moe_shared_expert_intermediate_size as that
    width, vLLM multiplies it by n_shared_experts, and they agree where that is 1.
    """
    if MOE not in config.hybrid_override_pattern:
        return {}
    return {name: getattr(config, name) for name in _OF_EXPERTS} | {"n_shared_experts": 1}
