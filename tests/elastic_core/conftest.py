"""Tiny stock Nemotron-H checkpoints, made by transformers itself, with weights that no permutation leaves alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic_core.geometry import ModelConfig

GEOMETRY = {
    "hybrid_override_pattern": "M-M*-M*-",
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 12,
    "mamba_head_dim": 6,
    "ssm_state_size": 8,
    "n_groups": 2,
    "vocab_size": 64,
    "chunk_size": 8,
}


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return ModelConfig(**GEOMETRY)


@pytest.fixture(scope="session")
def stock_model() -> Callable[..., NemotronHForCausalLM]:
    """Makes a stock model in float32 with random weights, also where a fresh model has constants.

    It computes NVIDIA's function, and so does what is loaded from its files: transformers 5.23 clamps time steps at
    time_step_min when it reads a text, and that is set to 0 once it has served to draw the weights.
    """

    def make(**changes: object) -> NemotronHForCausalLM:
        torch.manual_seed(0)
        model = NemotronHForCausalLM(NemotronHConfig(**{**GEOMETRY, **changes})).eval()
        model.config.time_step_min = 0.0
        for mixer in (module for module in model.modules() if hasattr(module, "time_step_limit")):
            mixer.time_step_limit = (0.0, float("inf"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.3 if parameter.ndim == 2 else 0.5
                parameter.copy_(scale * torch.randn(parameter.shape) + float(name.endswith("norm.weight")))
        return model

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, stock_model: Callable[..., NemotronHForCausalLM]) -> Path:
    """A stock checkpoint directory in one file, with a few of a tokenizer's files. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("stock") / "tiny"
    stock_model().save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.fixture(scope="session")
def sharded_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, stock_model: Callable[..., NemotronHForCausalLM]
) -> Path:
    """The model of `tiny_checkpoint` in several shards with an index. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("stock") / "sharded"
    stock_model().save_pretrained(directory, max_shard_size="40KB")
    return directory
