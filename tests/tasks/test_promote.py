"""The gate to champion: one scale for models of different tokenizers."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from elastic_core.checkpoint import write_weights
from elastic_core.config import DataConfig, DataSource, Evaluation, ModelConfig
from elastic_core.curriculum import generator
from elastic_core.job import load_model
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import full_subnet
from tasks.data import HELDOUT_FILE, prepare_data
from tasks.evaluate import heldout_batches, heldout_loss
from tasks.promote import loss_on
from tasks.tokenizer import load_tokenizer, train_tokenizer

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "it", "saw", "red", "blue"]
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(2, 60)) for i in range(1, 80)]
MEASURED = Evaluation(heldout_tokens=400, sequence_length=40, batch_size=3)
SAME = 1e-5  # float32: sums of the same terms in another order


def write_model(directory: Path, vocab_size: int) -> Path:
    """A checkpoint with random weights and a tokenizer of its own."""
    config = ModelConfig(
        hybrid_override_pattern="M*-",
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mamba_num_heads=2,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        vocab_size=vocab_size,
        chunk_size=16,
    )
    model = ElasticNemotronH(config)
    model.initialise(generator(vocab_size))
    write_weights(directory, config, model.state_dict(), torch.float32)
    train_tokenizer(TEXTS, directory, vocab_size=vocab_size)
    return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher") / "model", 290)


@pytest.fixture(scope="module")
def corpus(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    file = directory / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(sources=(DataSource(path=str(file)),), heldout_fraction=0.3)
    prepare_data(config, teacher, directory / "out", fetch=lambda uri, to: to)
    return directory / "out"


def test_a_model_of_the_corpuss_tokenizer_is_measured_on_its_tokens(teacher: Path, corpus: Path) -> None:
    batches = heldout_batches(corpus / HELDOUT_FILE, MEASURED, 290)
    model = load_model(teacher, torch.device("cpu"), torch.float32)
    expected, _ = heldout_loss(model, full_subnet(model.config), batches)
    assert loss_on(teacher, teacher, corpus, MEASURED) == expected


@pytest.mark.parametrize("vocab_size", [264, 278])
def test_a_model_of_another_tokenizer_reads_the_same_text(
    vocab_size: int, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """What it loses on its own tokens of each sequence, token by token, over the number of the teacher's."""
    other = write_model(tmp_path / "other", vocab_size)
    batches = heldout_batches(corpus / HELDOUT_FILE, MEASURED, 290)
    rows = [row for batch in batches for row in batch]
    model = load_model(other, torch.device("cpu"), torch.float32)
    nats, theirs, its = 0.0, load_tokenizer(teacher), load_tokenizer(other)
    for row in rows:
        ids = its(theirs.decode(row), add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model.logits(model(torch.tensor([ids]), full_subnet(model.config)))[0]
        nats -= sum(float(F.log_softmax(logits[t], -1)[ids[t + 1]]) for t in range(len(ids) - 1))
        assert len(ids) > len(row)
    assert loss_on(other, teacher, corpus, MEASURED) == pytest.approx(nats / (40 * len(rows)), rel=SAME)
