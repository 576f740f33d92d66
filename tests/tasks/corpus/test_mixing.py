"""Laws of what a stage draws from each source: as often as its weight says, and never from one too short."""

import json
import logging
from pathlib import Path

import pytest

from elastic_core.recipe import DataConfig, DataSource, Optimizer, Stage
from elastic_core.training.curriculum import DataOrder
from elastic_core.training.tokens import TokenRows
from tasks.corpus.build import build_corpus
from tasks.corpus.mixing import check_portions, portions
from tasks.corpus.record import TRAIN_FILE, read_record
from tasks.corpus.sources import source_identity
from tasks.corpus.tokenizer import load_tokenizer, train_tokenizer

TEXTS = {name: [f"{name} {i}: {name * 9}\n" for i in range(60)] for name in ("web", "book", "rare")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Path, Path]:
    """Three sources in shards, with weights, of which one is for a stage alone; their tokens; the tokenizer."""
    directory = tmp_path_factory.mktemp("mixing")
    train_tokenizer([text for texts in TEXTS.values() for text in texts], directory / "tokenizer", vocab_size=270)
    for name, texts in TEXTS.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    weights = {"web": 3.0, "book": 0.0, "rare": 1.0}
    sources = tuple(
        DataSource(path=str(directory / f"{name}.jsonl"), name=name, weight=weight) for name, weight in weights.items()
    )
    config = DataConfig(sources=sources, heldout_fraction=0.1, shard_bytes=1000)
    build_corpus(config.unweighted(), directory / "tokenizer", directory / "out")
    return config, directory / "out", directory / "tokenizer"


def stage(sources: dict[str, float] | None = None, sequence_length: int = 16) -> Stage:
    return Stage(
        name="stage2",
        sequence_length=sequence_length,
        batch_size=8,
        steps=25,
        budgets={"full": 1},
        optimizer=Optimizer(learning_rate=1e-3),
        sources=sources,
    )


@pytest.mark.parametrize(
    ("own", "shares"),
    [
        (None, {"web": 0.75, "rare": 0.25}),
        ({"book": 1.0}, {"book": 1.0}),
        ({"book": 9, "web": 1}, {"book": 0.9, "web": 0.1}),
    ],
)
def test_a_stage_reads_its_sources_by_their_weights(
    own: dict[str, float] | None, shares: dict[str, float], prepared: tuple[DataConfig, Path, Path]
) -> None:
    config, corpus, tokenizer_dir = prepared
    trained = stage(own)
    rows = TokenRows(corpus / TRAIN_FILE, 16, portions(corpus, config.weights(trained.sources)))
    order = DataOrder(rows.num_rows, trained, 0, rows.drawn)
    tokenizer = load_tokenizer(tokenizer_dir)
    found = dict.fromkeys(TEXTS, 0)
    for step in range(trained.steps):
        for text in tokenizer.batch_decode(rows.batch(order.rows(step)).inputs_BT):
            (name,) = {name for name in TEXTS if name in text}
            found[name] += 1
    count = trained.steps * trained.batch_size
    assert {name: number / count for name, number in found.items() if number} == pytest.approx(shares, abs=2 / count)


def test_without_weights_the_stream_is_one(prepared: tuple[DataConfig, Path, Path]) -> None:
    config, corpus, _ = prepared
    assert config.unweighted().weights() is None and portions(corpus, None) == ()


def test_tokens_depend_on_no_weight_and_no_name(prepared: tuple[DataConfig, Path, Path]) -> None:
    config, _, _ = prepared
    assert {source_identity(source) for source in config.sources} == {
        source_identity(source) for source in config.unweighted().sources
    }


def test_how_often_a_source_is_read_is_said(
    prepared: tuple[DataConfig, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    config, corpus, _ = prepared
    record = read_record(corpus)
    with caplog.at_level(logging.INFO):
        check_portions(config, record, stage({"book": 1.0}))
    assert caplog.messages == [f"stage2 reads book {16 * 8 * 25 / record.sources[1].train_tokens:.2f} times"]


def test_a_source_too_short_for_a_sequence_is_refused_where_it_is_drawn_from(
    prepared: tuple[DataConfig, Path, Path],
) -> None:
    config, corpus, _ = prepared
    record = read_record(corpus)
    tokens = record.sources[0].train_tokens
    with pytest.raises(ValueError, match=f"web holds {tokens} tokens, too few for a sequence of {tokens} "):
        check_portions(config, record, stage(sequence_length=tokens))
    check_portions(config, record, stage({"rare": 1.0}))
