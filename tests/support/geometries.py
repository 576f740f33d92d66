"""Teachers of many geometries: NVIDIA's own, and ten that are as odd as a Nemotron-H may be."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
from nano import NANO_9B, NANO_12B, NANO_30B

from elastic_core.files.checkpoint import disk_name, tensor_shapes
from elastic_core.files.stock_config import write_config
from elastic_core.geometry import ModelConfig


def random_model(seed: int) -> ModelConfig:
    """A geometry as odd as a Nemotron-H may be."""
    choose = random.Random(seed)
    groups, kv_heads = choose.choice([1, 2, 4, 8]), choose.choice([1, 2, 8])
    return ModelConfig(
        hybrid_override_pattern="M-" + "".join(choose.choices("M-M-*", k=choose.randint(4, 40))),
        hidden_size=choose.choice([96, 200, 768, 1000, 2688]),
        intermediate_size=choose.choice([250, 1024, 3000, 7680]),
        num_attention_heads=kv_heads * choose.choice([1, 2, 5]),
        num_key_value_heads=kv_heads,
        head_dim=choose.choice([16, 64, 128]),
        mamba_num_heads=groups * choose.choice([2, 3, 12]),
        mamba_head_dim=choose.choice([16, 64]),
        ssm_state_size=choose.choice([16, 128]),
        n_groups=groups,
        vocab_size=choose.choice([300, 32768]),
        max_position_embeddings=choose.choice([512, 4096, 131072]),
    )


MODELS = {
    "12b": replace(NANO_12B, max_position_embeddings=131072),
    "9b": replace(NANO_9B, max_position_embeddings=131072),
    "30b": replace(NANO_30B, max_position_embeddings=131072),
    **{f"random-{seed}": random_model(seed) for seed in range(10)},
}


def write_hollow(directory: Path, model: ModelConfig) -> None:
    """A checkpoint whose weights are a hole in a file: all of its header is there, and it takes no room."""
    directory.mkdir(parents=True)
    write_config(model, directory, torch.bfloat16)
    header, end = {}, 0
    for name, shape in tensor_shapes(model).items():
        start, end = end, end + 2 * math.prod(shape)
        header[disk_name(name)] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
