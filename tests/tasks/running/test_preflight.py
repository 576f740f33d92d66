"""What preflight refuses before hours are spent."""

import dataclasses
import re
from pathlib import Path

import pytest
from micro import MICRO

from elastic_core.files.shards import write_json
from elastic_core.geometry import ModelConfig
from elastic_core.recipe import Recipe
from elastic_core.schema import build, to_dict
from tasks.corpus.record import RECORD_FILE, DataRecord, SourceRecord, SplitRecord
from tasks.running.digests import artifact
from tasks.running.preflight import check_corpus, check_model

FOUND = build(ModelConfig, MICRO["teacher"]["pretrain"]["model"])


def recipe(expected: ModelConfig | None) -> Recipe:
    return build(Recipe, {**MICRO, "teacher": {"path": "org/teacher", "model": expected}})


def test_a_teacher_of_the_expected_geometry_passes_whatever_does_not_shape_it() -> None:
    check_model(recipe(None), FOUND)
    check_model(recipe(dataclasses.replace(FOUND, max_position_embeddings=1 << 20, eos_token_id=7)), FOUND)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, "teacher.model.hidden_size is 48, but the checkpoint at org/teacher has 32"),
        ({"hybrid_override_pattern": "M-M-*"}, "teacher.model.hybrid_override_pattern is M-M-., but .* has M-M.-"),
        ({"conv_kernel": 3}, "teacher.model.conv_kernel is 3, but .* has 4"),
    ],
)
def test_a_teacher_of_another_geometry_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        check_model(recipe(dataclasses.replace(FOUND, **change)), FOUND)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("asked", "is_told"), [(4000, False), (8000, False), (8002, True), (1_000_000, True)])
def test_far_fewer_held_out_tokens_than_asked_for_are_told_once(
    asked: int, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = SplitRecord(file="train.safetensors", documents=9, tokens=9000, learned=9000, sha256="")
    heldout = dataclasses.replace(train, file="heldout.safetensors", tokens=4000)
    sources = (SourceRecord(tokens=6500, train_tokens=4500),) * 2
    record = DataRecord(sources=sources, tokenizer_sha256="", train=train, heldout=heldout)
    write_json(tmp_path / RECORD_FILE, to_dict(record))
    asking = build(Recipe, {**MICRO, "evaluation": {**MICRO["evaluation"], "heldout_tokens": asked}})
    check_corpus(asking, artifact(tmp_path))
    said = f"heldout_tokens asks for {asked:,} tokens, and the corpus holds out 4,000, .*raise data.heldout_fraction"
    assert [bool(re.search(said, message)) for message in caplog.messages] == [True] * is_told
