"""An endpoint of `elastic serve`, with a stand-in for the engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from endpoint import WEIGHTS, Stage
from micro import MICRO

from elastic_core.files.stock_config import write_config
from elastic_core.geometry import ModelConfig
from tasks.corpus.tokenizer import train_tokenizer

CONTEXT = 100  # the stand-in's too


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the endpoint itself reads of a checkpoint: tokenizer, configuration, and how large its weights are."""
    directory = tmp_path_factory.mktemp("checkpoint")
    train_tokenizer([Path(standin.__file__).read_text()], directory, vocab_size=300, max_length=CONTEXT)
    model: dict[str, Any] = MICRO["teacher"]["pretrain"]["model"]
    write_config(ModelConfig(**model, max_position_embeddings=CONTEXT), directory, torch.float32)
    (directory / "model.safetensors").write_bytes(bytes(WEIGHTS))
    return directory


@pytest.fixture
def serve(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setenv("STANDIN", str(tmp_path))
    for budget in "lms":
        said = {"pieces": [f"said by {budget}", " in", " pieces"]}
        (tmp_path / f"tiny-{budget}.json").write_text(json.dumps(said))
    return Stage(tmp_path, checkpoint)
