"""Whatever a user gets wrong ends in one line that says what to do, a non-zero exit, and nothing half made."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from elastic_core.config import ModelConfig
from flows.cli import main
from tasks.settings import Settings
from tasks.teacher import write_fresh_model
from tasks.tokenizer import train_tokenizer

MODEL = ModelConfig(
    hybrid_override_pattern="M-*-",
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    vocab_size=280,
    chunk_size=16,
)

RECIPE: dict[str, Any] = {
    "family": "bad",
    "dtype": "float32",
    "teacher": {"path": "teacher"},
    "data": {"sources": [{"path": "stories.jsonl"}], "heldout_fraction": 0.2},
    "axes": {"hidden": [32, 16], "ffn": [48, 24], "mamba_heads": [4, 2], "attention_heads": [4, 2]},
    "budgets": [{"name": "l"}, {"name": "s", "params": 18000}],
    "importance": {"samples": 4, "sequence_length": 32, "batch_size": 4, "depth_samples": 4},
    "router": {"hidden_size": 8},
    "stages": [
        {
            "name": "stage1",
            "sequence_length": 32,
            "batch_size": 2,
            "steps": 4,
            "budgets": {"l": 1, "s": 1},
            "optimizer": {"learning_rate": 1e-3},
        },
    ],
    "evaluation": {"heldout_tokens": 256, "sequence_length": 32},
}


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all, and nothing of it in anyone's home."""
    with (
        temporary_settings({PREFECT_HOME: tmp_path_factory.mktemp("prefect")}),
        prefect_test_harness(server_startup_timeout=180),
    ):
        yield PREFECT_API_URL.value()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its documents and its teacher, all of them good. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("inputs")
    choose = random.Random(0)
    words = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "it", "saw", "red", "blue", "bird"]
    stories = [" ".join(choose.choices(words, k=30)) for _ in range(40)]
    (directory / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    train_tokenizer(stories, directory / "tokenizer", vocab_size=MODEL.vocab_size)
    write_fresh_model(directory / "teacher", MODEL, directory / "tokenizer", seed=0)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return directory


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Elastic = Callable[..., Ended]


@pytest.fixture
def elastic(
    settings: Settings, prefect_api: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Elastic:
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["elastic", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return Ended(code, *capfd.readouterr())

    return run


def test_good(elastic, inputs):
    import time

    t = time.time()
    ended = elastic("run", str(inputs / "recipe.yaml"))
    print(ended.code, ended.out, ended.err, time.time() - t)
    t = time.time()
    ended = elastic("run", str(inputs / "recipe.yaml"), "axes.mamba_heads=[4,3]")
    print(ended, time.time() - t)
