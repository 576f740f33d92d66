"""NVIDIA's Puzzle form of config.json, for experts whose widths differ by layer: each layer has a block of settings.

SGLang and llama.cpp's converter read it. vLLM computes it, but wants a class to read it by, which comes with NVIDIA's
own checkpoints; none comes with ours (C8).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_core.files.shards import CheckpointError
from elastic_core.geometry import BLOCK_TYPES, BY_LAYER, FFN, FULL_SIZES, LAYER_AXES, MOE, ModelConfig

MODEL_TYPE = "nemotron_h_puzzle"
BLOCKS = "block_configs"

_FIELDS = {kind: tuple(FULL_SIZES[axis] for axis in LAYER_AXES[kind]) for kind in (FFN, MOE)}
_WIDTHS = tuple(FULL_SIZES[axis] for axis in BY_LAYER)


def is_puzzle(config: ModelConfig) -> bool:
    """Whether the form of a stock config cannot say this geometry."""
    return len(set(config.full_sizes("expert_ffn"))) > 1


def to_blocks(config: ModelConfig) -> dict[str, Any]:
    """The keys by which the Puzzle form differs from a stock config; outside of blocks stands the largest width."""
    blocks: list[dict[str, Any]] = []
    for layer, kind in enumerate(config.hybrid_override_pattern):
        block = {name: getattr(config, name) for name in _FIELDS.get(kind, ())}
        if block:
            width = LAYER_AXES[kind][0]
            block[FULL_SIZES[width]] = config.full_sizes(width)[config.ordinal(layer)]
        blocks.append({"block_type": BLOCK_TYPES[kind]} | block)
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["NemotronHPuzzleForCausalLM"],
        FULL_SIZES["expert_ffn"]: max(config.full_sizes("expert_ffn")),
        BLOCKS: blocks,
    }


def without_blocks(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the Puzzle config at `path` in the form of a stock one: widths are lists, all else is told once.

    What a block leaves out is as outside of blocks. CheckpointError where layers differ in more than their widths.
    """
    blocks = found.get(BLOCKS)
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise CheckpointError(f"{path}: {BLOCKS} is {blocks!r}; expected a list with the settings of each layer")
    types = [block.get("block_type") for block in blocks]
    values = {name: value for name, value in found.items() if name != BLOCKS}
    values |= {"model_type": "nemotron_h", "layers_block_type": types}
    for name in sorted({name for block in blocks for name in block} - {"block_type"}):
        having = {block.get("block_type") for block in blocks if name in block}
        told = [block.get(name, found.get(name)) for block in blocks if block.get("block_type") in having]
        if name in _WIDTHS:
            values[name] = told
        elif all(value == told[0] for value in told):
            values[name] = told[0]
        else:
            raise CheckpointError(
                f"{path}: {name} differs by layer, {told}; of what {BLOCKS} may say, only {' and '.join(_WIDTHS)} may"
            )
    return values
