"""What stands beside the weights: the files that a checkpoint takes over from the one it was made of."""

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_core.files.shards import regular_file, write_json
from elastic_core.geometry import ModelConfig

logger = logging.getLogger(__name__)

GENERATION_CONFIG, CARD_FILE = "generation_config.json", "README.md"
# Written anew.
_OWN = {"config.json", CARD_FILE, "elastic.json", "order.safetensors", "router.safetensors", "shapes.json"}
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".zip"}
_CODE = re.compile(r"(modeling|configuration|tokenization|processing|modular)_.*\.py")


def copy_side_files(source: Path, target: Path, config: Mapping[str, Any]) -> None:
    """Copy every file of the checkpoint `source` that is not weights and is not written anew; say what is left behind.

    Left behind are folders, hidden files, weights in other formats, and model code, by its usual names or those in
    `config` (its config.json): no engine needs it, and it would describe another model.
    """
    named = {str(entry).partition(".")[0] + ".py" for entry in dict(config.get("auto_map") or {}).values()}
    left = []
    for path in sorted(source.iterdir()):
        if path.name in _OWN or path.name.startswith(".") or _is_converted(path.name):
            continue
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_dir() or weights or path.name in named or _CODE.fullmatch(path.name):
            left.append(path.name + "/" * path.is_dir())
        else:
            shutil.copyfile(regular_file(source, path.name), target / path.name)
    if left:
        logger.warning("%s: left behind, for they are no part of the checkpoint: %s", source, ", ".join(left))


def _is_converted(name: str) -> bool:
    return name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))


def write_generation_config(directory: Path, config: ModelConfig) -> None:
    """Write the generation_config.json that `config` implies, where the directory has none."""
    if not (directory / GENERATION_CONFIG).exists():
        tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(
            directory / GENERATION_CONFIG,
            {"_from_model_config": True, **{name: token for name, token in tokens.items() if token is not None}},
        )
