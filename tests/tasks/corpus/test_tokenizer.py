"""Laws of the tokenizer that a recipe trains for itself."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tasks.corpus.documents import digest_files
from tasks.corpus.tokenizer import SPECIAL_TOKENS, check_tokenizer, load_tokenizer, tokenizer_files, train_tokenizer

VOCAB_SIZE = 320
SENTENCES = [
    f"The {a} {b} of {c} is {i} + {i * 7}.\n"
    for i, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("small", "large", "elastic", "nested")
        for b in ("model", "teacher", "student", "budget")
        for c in ("layers", "heads", "channels", "neurons")
    )
]
UNICODE = [
    "",
    " leading and trailing  ",
    "tabs\tand\r\nreturns\r and \n\n\nlines",
    "naïve café, Ελληνικά, русский, עברית, 中文, हिन्दी, \U0001f469‍\U0001f4bb\U0001f3fd",
    "á combining, ­ soft hyphen, ﻿ mark, � replacement, \x00\x01\x7f control",
    "1234567890 -12.5e+3 0x1F ٣٤٥",
    "".join(chr(code) for code in range(1, 0x3000, 17)),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(SENTENCES, path, vocab_size=VOCAB_SIZE, max_length=512)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def test_stock_auto_tokenizer_loads_what_was_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.is_fast
    assert len(tokenizer) == VOCAB_SIZE
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))


def test_a_batch_is_padded_on_the_left_and_the_longest_sequence_is_the_models(tokenizer: PreTrainedTokenizerFast):
    assert tokenizer.model_max_length == 512
    assert tokenizer(["a", "a a a"], padding=True)["input_ids"][0][0] == tokenizer.pad_token_id


@pytest.mark.parametrize("text", UNICODE + SENTENCES[:1], ids=ascii)
def test_every_text_comes_back_exactly(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_nothing_is_added_to_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("The small model")["input_ids"]
    assert ids and not set(ids) & set(range(len(SPECIAL_TOKENS)))


def test_each_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("is 4096") == [*tokenizer.tokenize("is "), "4", "0", "9", "6"]


def test_frequent_words_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer.tokenize(" of")) == len(tokenizer.tokenize(" is")) == 1


def test_chat_template_marks_every_turn_and_ends_only_the_assistants(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": " 2+2 "},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 3?"},
    ]
    expected = "<|system|>Be exact.<|user|> 2+2 <|assistant|>4</s><|user|>and 3?"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == expected + "<|assistant|>"
    assert tokenizer(prompt)["input_ids"][-1] == SPECIAL_TOKENS.index("<|assistant|>")


def test_generation_prompt_and_answer_make_the_whole_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    question, reply = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, reply], tokenize=False)
    assert tokenizer(prompt)["input_ids"] + tokenizer("2</s>")["input_ids"] == tokenizer(whole)["input_ids"]


def test_chat_template_refuses_an_unknown_role(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="role critic is not system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "critic", "content": "no"}], tokenize=False)


def test_same_texts_give_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(SENTENCES), tmp_path, vocab_size=VOCAB_SIZE, max_length=512)
    names = sorted(file.name for file in directory.iterdir())
    assert names == sorted(file.name for file in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes(), name


def test_texts_beyond_max_bytes_change_nothing(tmp_path: Path) -> None:
    enough = sum(len(sentence.encode()) for sentence in SENTENCES)
    train_tokenizer(SENTENCES, tmp_path / "a", vocab_size=VOCAB_SIZE, max_bytes=enough)
    train_tokenizer([*SENTENCES, "zq" * 500], tmp_path / "b", vocab_size=VOCAB_SIZE, max_bytes=enough)
    assert digest_files(tokenizer_files(tmp_path / "a")) == digest_files(tokenizer_files(tmp_path / "b"))


def test_texts_are_read_no_further_than_max_bytes(tmp_path: Path) -> None:
    read: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            for sentence in SENTENCES:
                read.append(len(sentence.encode()))
                yield sentence

    train_tokenizer(endless(), tmp_path, vocab_size=VOCAB_SIZE, max_bytes=10_000)
    assert sum(read[:-1]) < 10_000 <= sum(read)


def test_a_cut_inside_a_character_leaves_the_character_out(tmp_path: Path) -> None:
    train_tokenizer(["é" * 1000], tmp_path / "cut", vocab_size=263, max_bytes=1001)
    train_tokenizer(["é" * 500], tmp_path / "whole", vocab_size=263)
    assert digest_files(tokenizer_files(tmp_path / "cut")) == digest_files(tokenizer_files(tmp_path / "whole"))


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fill a vocabulary of \d+ tokens, not vocab_size=320; give more text"):
        train_tokenizer(["too little"], tmp_path, vocab_size=VOCAB_SIZE)


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=256 is below 262"):
        train_tokenizer(SENTENCES, tmp_path, vocab_size=256)


# --- loading and checking ---


def test_tokenizer_fits_a_vocabulary_of_its_size_and_no_less(directory: Path) -> None:
    check_tokenizer(directory, VOCAB_SIZE)
    with pytest.raises(
        ValueError, match=f"has {VOCAB_SIZE} tokens but the model's vocab_size is {VOCAB_SIZE - 1}; use"
    ):
        check_tokenizer(directory, VOCAB_SIZE - 1)


def test_tokenizer_without_eos_is_refused(directory: Path, tmp_path: Path) -> None:
    for file in tokenizer_files(directory):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no eos token; set eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, '{"version": "1.0", "model"', "{}"])
def test_missing_or_broken_tokenizer_is_one_line_that_names_the_directory(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="no tokenizer can be loaded") as failure:
        load_tokenizer(tmp_path)
    assert str(failure.value).startswith(str(tmp_path))
    assert "\n" not in str(failure.value)


def test_digest_of_the_tokenizer_changes_with_its_template(directory: Path, tmp_path: Path) -> None:
    for file in tokenizer_files(directory):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert digest_files(tokenizer_files(tmp_path)) == digest_files(tokenizer_files(directory))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert digest_files(tokenizer_files(tmp_path)) != digest_files(tokenizer_files(directory))
