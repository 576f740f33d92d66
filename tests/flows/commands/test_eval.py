"""`elastic eval`: a checkpoint's loss on the held-out tokens of a corpus."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from templates import write_tokenizer
from trainee import BUDGETS, CONFIG, write_family
from typer.testing import CliRunner

from elastic_core.recipe import DataConfig, DataSource
from flows.cli import app
from tasks.corpus.build import build_corpus
from tasks.corpus.record import HELDOUT_FILE

TEXTS = [f"{number} and {number + 1} and {number + 2}" for number in range(200)]


@pytest.mark.parametrize("other", [False, True], ids=["its own", "another"])
def test_tokens_of_another_tokenizer_are_warned_of(tmp_path: Path, other: bool) -> None:
    family = write_family(tmp_path / "family", replace(CONFIG, vocab_size=400), budgets=BUDGETS[:1])
    write_tokenizer(family, "ours")
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    write_tokenizer(encoder, "qwen3" if other else "ours")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(sources=(DataSource(path=str(rows)),), heldout_fraction=0.3)
    build_corpus(config, encoder, tmp_path / "corpus")
    asked = ["eval", str(family), "--heldout", str(tmp_path / "corpus" / HELDOUT_FILE), "--sequence-length", "32"]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.stderr.startswith("warning: ") == other, result.stderr
    assert json.loads(result.stdout)["cross_entropy"] > 0
