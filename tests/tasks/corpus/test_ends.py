"""What ends a text: the several files of a checkpoint that name it, and what is said where they differ."""

import json
from pathlib import Path

import pytest
from templates import write_tokenizer

from tasks.corpus.ends import end_tokens, end_warnings

START, END = 0, 1  # <|im_start|> and <|im_end|>, as write_tokenizer numbers them


def write(directory: Path, name: str, eos: object) -> None:
    (directory / name).write_text(json.dumps({"eos_token_id": eos}))


def test_generation_config_goes_before_config(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == frozenset()
    write(tmp_path, "config.json", 7)
    assert end_tokens(tmp_path) == {7}
    write(tmp_path, "generation_config.json", [END, 7])
    assert end_tokens(tmp_path) == {END, 7}
    write(tmp_path, "generation_config.json", None)
    assert end_tokens(tmp_path) == {7}


def test_files_that_agree_are_not_mentioned(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "chatml")
    assert end_warnings(tmp_path) == []
    write(tmp_path, "config.json", END)
    write(tmp_path, "generation_config.json", [END])
    assert end_warnings(tmp_path) == []


def test_files_that_differ_are_named_with_their_values(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "chatml")
    write(tmp_path, "config.json", 7)
    write(tmp_path, "generation_config.json", [7, END])
    assert end_warnings(tmp_path) == [
        f"{tmp_path}: the eos differs (the tokenizer's {END}, config.json's 7, generation_config.json's {END} and 7); "
        f"generation ends at {END} and 7, and a document at {END} unless its chat template ends it in one of these"
    ]


def test_a_turn_that_ends_where_generation_does_not_is_said(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "chatml", eos="<|im_start|>")
    assert end_warnings(tmp_path) == [
        f"{tmp_path}: the chat template ends a turn in '<|im_end|>' ({END}), at which generation does not end; "
        "add it to eos_token_id in generation_config.json"
    ]


@pytest.mark.parametrize("name", ["nano2", "nemotron3", "qwen3", "r1", "words", "bare"])
def test_thoughts_do_not_hide_where_a_turn_ends(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path, name)
    assert end_warnings(tmp_path) == []
    write(tmp_path, "generation_config.json", 30)
    assert len(end_warnings(tmp_path)) == (1 if name == "words" else 2)


def test_an_eos_that_the_tokenizers_file_does_not_hold_is_said(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "chatml")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|stop|>"}))
    first = end_warnings(tmp_path)[0]
    assert first.startswith(
        f"{tmp_path}/tokenizer.json does not hold the eos token '<|stop|>', which therefore has the"
    )
    assert "\n" not in first
