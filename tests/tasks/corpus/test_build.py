"""Laws of the data step: documents from any kind of source become one stream of tokens a split."""

import bz2
import gzip
import hashlib
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from elastic_core.recipe import DataConfig, DataSource
from elastic_core.training.tokens import TokenRows
from tasks.corpus import pieces, shards
from tasks.corpus.build import build_corpus, iter_texts
from tasks.corpus.chats import Chat, Unusable
from tasks.corpus.documents import Document, digest_files, documents_in, iter_documents, iter_rows, source_files
from tasks.corpus.record import HELDOUT_FILE, RECORD_FILE, TRAIN_FILE, DataRecord, check_length, read_record
from tasks.corpus.shards import is_heldout
from tasks.corpus.tokenizer import load_tokenizer, tokenizer_files, train_tokenizer
from tasks.running.digests import artifact

EOS = 2
VOCAB_SIZE = 270
HALF = 0.5
TEXTS = [f"document {i}: {'αβγ ' * (i % 3)}x = {i * i}\n" for i in range(40)]
CHATS = [[{"role": "user", "content": f"{i} + {i} ="}, {"role": "assistant", "content": str(2 * i)}] for i in range(20)]
Prepare = Callable[..., tuple[DataRecord, Path]]
Problems = dict[str, list[dict[str, Any]]]

PROBLEMS = Path(__file__).parents[3] / "flows/recipes/tiny"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, path, vocab_size=VOCAB_SIZE)
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def prepare(tokenizer_dir: Path, tmp_path: Path) -> Prepare:
    """Prepares sources in a new directory each time: the record, and where it lies."""
    runs = iter(range(1000))

    def run(*sources: DataSource, **options: Any) -> tuple[DataRecord, Path]:
        output = tmp_path / f"out-{next(runs)}"
        config = DataConfig(sources=sources, **{"heldout_fraction": HALF, **options})
        return build_corpus(config, tokenizer_dir, output), output

    return run


def write_jsonl(path: Path, rows: Iterable[Any]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataSource(path=str(path))


def text_rows(texts: Iterable[str] = TEXTS) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def read(source: DataSource, directory: Path) -> list[Document]:
    return list(iter_documents(source, directory / "work"))


def contents(source: DataSource, directory: Path) -> list[Any]:
    found = [document.content for document in read(source, directory)]
    return [content.messages if isinstance(content, Chat) else content for content in found]


def stream(directory: Path, file: str) -> list[int]:
    return load_file(directory / file)["tokens"].tolist()


def parts(tokens: list[int]) -> Iterator[list[int]]:
    """The documents of a stream, without their eos."""
    start = 0
    for i, token in enumerate(tokens):
        if token == EOS:
            yield tokens[start:i]
            start = i + 1
    assert start == len(tokens), "the stream does not end in eos"


def sides(directory: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[list[str], list[str]]:
    train, heldout = (
        [tokenizer.decode(part) for part in parts(stream(directory, file))] for file in (TRAIN_FILE, HELDOUT_FILE)
    )
    return train, heldout


# --- the stream ---


def test_streams_decode_back_to_the_documents(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    record, directory = prepare(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    train, heldout = sides(directory, tokenizer)
    assert sorted(train + heldout) == sorted(TEXTS)
    assert [text for text in TEXTS if text in train] == train
    assert (record.train.documents, record.heldout.documents) == (len(train), len(heldout))


def test_chats_and_texts_come_out_as_their_tokens(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [*text_rows(TEXTS[:10]), *({"messages": chat} for chat in CHATS)]
    _, directory = prepare(write_jsonl(tmp_path / "a.jsonl", rows))
    expected = [tokenizer(text)["input_ids"] for text in TEXTS[:10]]
    # The template ends the answer in eos; no second one follows.
    expected += [tokenizer(f"<|user|>{i} + {i} =<|assistant|>{2 * i}")["input_ids"] for i in range(len(CHATS))]
    found = [part for file in (TRAIN_FILE, HELDOUT_FILE) for part in parts(stream(directory, file))]
    assert sorted(found) == sorted(expected)


def test_a_tokenizer_that_adds_bos_adds_none_inside_the_stream(tokenizer_dir: Path, tmp_path: Path) -> None:
    adding = tmp_path / "adding"
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(adding)
    assert load_tokenizer(adding)("x")["input_ids"][0] == 1
    source = write_jsonl(tmp_path / "a.jsonl", text_rows())
    config = DataConfig(sources=(source,), heldout_fraction=HALF)
    build_corpus(config, adding, tmp_path / "out")
    assert 1 not in stream(tmp_path / "out", TRAIN_FILE)


def test_streams_are_int32_and_the_training_loop_reads_their_rows(prepare: Prepare, tmp_path: Path) -> None:
    _, directory = prepare(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    tokens = load_file(directory / TRAIN_FILE)["tokens"]
    assert tokens.dtype == torch.int32 and tokens.dim() == 1
    rows = TokenRows(directory / TRAIN_FILE, 16)
    assert rows.num_rows == (len(tokens) - 1) // 16
    assert torch.equal(rows.batch([1, 0]).inputs_BT, torch.stack([tokens[16:32], tokens[0:16]]).long())


def test_batches_of_any_size_give_the_same_stream(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", text_rows())
    whole, _ = prepare(source)
    monkeypatch.setattr("tasks.corpus.encoding.BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("tasks.corpus.encoding.BATCH_CHARACTERS", 50)
    assert prepare(source)[0] == whole


def test_sources_follow_one_another_and_stop_at_their_limits(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", text_rows())
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS]
    few = replace(source, max_documents=7)
    short = replace(source, max_tokens=sum(lengths[:5]) - 1)
    record, _ = prepare(few, short)
    assert [(s.documents, s.tokens) for s in record.sources] == [(7, sum(lengths[:7])), (5, sum(lengths[:5]) - 1)]
    assert record.train.documents + record.heldout.documents == 12
    assert record.train.tokens + record.heldout.tokens == sum(lengths[:7]) + sum(lengths[:5]) - 1


@pytest.mark.parametrize("tokens", [1, 2, 20, 33, 57])
def test_max_tokens_is_exact(prepare: Prepare, tmp_path: Path, tokens: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", text_rows())
    few, _ = prepare(replace(source, max_documents=20))
    wanted = few.sources[0].tokens + tokens
    record, directory = prepare(replace(source, max_tokens=wanted))
    assert record.sources[0].tokens == record.train.tokens + record.heldout.tokens == wanted
    _, longest = prepare(source)
    for file in (TRAIN_FILE, HELDOUT_FILE):
        found = stream(directory, file)
        assert found == stream(longest, file)[: len(found)]


def test_only_what_the_assistant_writes_is_learned(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = replace(write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS]), train_on="assistant")
    record, directory = prepare(source)
    learned = 0
    for split in (record.train, record.heldout):
        tensors = load_file(directory / split.file)
        tokens, mask = tensors["tokens"], tensors["learned"].bool()
        assert split.learned == int(mask.sum()) < split.tokens == len(tokens)
        answers = [reply["content"] for _, reply in CHATS]
        assert set(tokenizer.decode(tokens[mask]).split("</s>")) <= {*answers, ""}
        starts = tensors["document_starts"].tolist()
        assert [tokenizer.convert_ids_to_tokens(int(tokens[start])) for start in starts] == ["<|user|>"] * len(starts)
        learned += split.learned
    assert learned == record.sources[0].learned


def test_rows_that_cannot_be_used_are_skipped_up_to_a_stated_number(prepare: Prepare, tmp_path: Path) -> None:
    bad = [{"no": 1}, {"messages": [{"role": "critic", "content": "x"}]}, {"text": 7}]
    source = write_jsonl(tmp_path / "a.jsonl", [*text_rows(TEXTS[:10]), *bad, {"text": ""}, *text_rows(TEXTS[10:])])
    (taken,) = prepare(replace(source, max_skipped=3))[0].sources
    assert (taken.documents, taken.skipped, taken.empty) == (len(TEXTS), 3, 1)
    assert sorted(re.findall(r"line (\d+)", " ".join(taken.first_skipped))) == ["11", "12", "13"]
    with pytest.raises(ValueError, match=r"one more than max_skipped=2, and the first was: .* line 11 has neither"):
        prepare(replace(source, max_skipped=2))
    with pytest.raises(ValueError, match="line 11 has neither"):
        prepare(source)


def test_what_ends_the_reading_is_told_in_its_place(prepare: Prepare, tmp_path: Path) -> None:
    """Rows are read ahead, and a limit, or a fault of a row, may come before it."""
    source = write_jsonl(tmp_path / "a.jsonl", text_rows())
    whole = prepare(source)[0].sources[0]
    with Path(source.path).open("ab") as file:
        file.write(b'{"no": 1}\n\xff\n')
    assert prepare(replace(source, max_tokens=whole.tokens))[0].sources[0].documents == whole.documents
    with pytest.raises(ValueError, match="has neither"):
        prepare(source)
    with pytest.raises(ValueError, match="can't decode byte 0xff"):
        prepare(replace(source, max_skipped=5))


def test_a_fault_does_not_hold_the_row(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"no": 1}, {"text": 7}])
    found = list(documents_in(iter_rows(source, tmp_path), source))
    assert [(type(one), one.__traceback__, one.__cause__) for one in found] == [(Unusable, None, None)] * 2


def test_a_row_beyond_the_limit_of_tokens_is_neither_counted_nor_refused(prepare: Prepare, tmp_path: Path) -> None:
    """Rows are read and rendered ahead of those that are taken."""
    good = [{"text": text} for text in TEXTS]
    whole = prepare(write_jsonl(tmp_path / "a.jsonl", good))[0].sources[0]
    source = write_jsonl(tmp_path / "b.jsonl", [*good, {"no": 1}, {"text": ""}, *good])
    (taken,) = prepare(replace(source, max_tokens=whole.tokens))[0].sources
    assert (taken.documents, taken.tokens, taken.skipped, taken.empty) == (whole.documents, whole.tokens, 0, 0)
    with pytest.raises(ValueError, match="has neither"):
        prepare(replace(source, max_tokens=whole.tokens + 1))


def test_max_documents_counts_those_that_can_be_used_and_reads_no_further(prepare: Prepare, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"no": 1}, *text_rows(TEXTS[:12]), {"no": 2}, *text_rows(TEXTS[12:])])
    (taken,) = prepare(replace(source, max_skipped=1, max_documents=12))[0].sources
    assert (taken.documents, taken.skipped) == (12, 1)


def test_skipped_rows_are_no_text_for_a_tokenizer(tmp_path: Path) -> None:
    source = replace(write_jsonl(tmp_path / "a.jsonl", [{"no": 1}, *text_rows(["a", "b"])]), max_skipped=1)
    assert list(iter_texts(DataConfig(sources=(source,)))) == ["a", "b"]


def test_progress_counts_up_to_the_totals(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "TOKENS_PER_REPORT", 1)
    seen: list[tuple[int, int]] = []
    source = write_jsonl(tmp_path / "a.jsonl", text_rows())
    config = DataConfig(sources=(source, source), heldout_fraction=HALF, shard_bytes=500)
    record = build_corpus(config, tokenizer_dir, tmp_path / "out", progress=lambda *totals: seen.append(totals))
    done = [tokens for tokens, _ in seen]
    assert done == sorted(done) and len(set(done)) >= 2 * len(TEXTS)
    assert seen[-1] == (record.train.tokens + record.heldout.tokens,) * 2
    assert all(0 < tokens <= expected for tokens, expected in seen)


def test_a_failed_run_leaves_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*text_rows(), {"no": 1}])
    with pytest.raises(ValueError):
        build_corpus(DataConfig(sources=(source,)), tokenizer_dir, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_only_the_result_is_written_and_nothing_into_the_home(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    _, directory = prepare(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    assert sorted(path.name for path in directory.iterdir()) == sorted([TRAIN_FILE, HELDOUT_FILE, RECORD_FILE])
    assert not list(home.iterdir())


# --- the split ---


def test_no_document_is_on_both_sides(prepare: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    twice = write_jsonl(tmp_path / "a.jsonl", text_rows(TEXTS + TEXTS[::-1]))
    again = write_jsonl(tmp_path / "b.jsonl", text_rows(TEXTS))
    _, directory = prepare(twice, again)
    train, heldout = sides(directory, tokenizer)
    assert train and heldout and not set(train) & set(heldout)
    assert len(train) + len(heldout) == 3 * len(TEXTS)


def test_split_is_stable_when_documents_are_added(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = sides(prepare(write_jsonl(tmp_path / "a.jsonl", text_rows(TEXTS[:20])))[1], tokenizer)
    after = sides(prepare(write_jsonl(tmp_path / "b.jsonl", text_rows(TEXTS[::-1])))[1], tokenizer)
    assert set(before[0]) <= set(after[0])
    assert set(before[1]) <= set(after[1])


def test_split_changes_with_the_seed_and_nests_with_the_fraction(
    prepare: Prepare, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", text_rows())
    heldout = {
        (seed, fraction): set(sides(prepare(source, seed=seed, heldout_fraction=fraction)[1], tokenizer)[1])
        for seed in (0, 1)
        for fraction in (0.25, 0.75)
    }
    assert heldout[0, 0.75] != heldout[1, 0.75]
    assert heldout[0, 0.25] < heldout[0, 0.75]


def test_share_held_out_is_the_fraction() -> None:
    digests = [Document(str(i), "").digest() for i in range(10_000)]
    found = sum(is_heldout(digest, 0.02, seed=0) for digest in digests) / len(digests)
    # Five standard deviations of a binomial share.
    assert abs(found - 0.02) < 5 * (0.02 * 0.98 / len(digests)) ** 0.5


# --- records ---


def test_record_is_read_back(prepare: Prepare, tmp_path: Path) -> None:
    record, directory = prepare(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    assert read_record(directory) == record


def test_same_input_gives_the_same_corpus_wherever_it_lies(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    _, first = prepare(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    _, second = prepare(write_jsonl(tmp_path / "elsewhere" / "b.jsonl", text_rows()))
    assert artifact(first).digest == artifact(second).digest


@pytest.mark.parametrize("changed", [0, 17, 39])
def test_digests_change_when_any_document_changes(prepare: Prepare, tmp_path: Path, changed: int) -> None:
    texts = [text + "!" * (i == changed) for i, text in enumerate(TEXTS)]
    first, _ = prepare(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    second, _ = prepare(write_jsonl(tmp_path / "b.jsonl", text_rows(texts)))
    assert first.sources[0].sha256 != second.sources[0].sha256
    assert (first.train.sha256, first.heldout.sha256) != (second.train.sha256, second.heldout.sha256)


def test_digests_in_the_record_are_those_of_the_files(prepare: Prepare, tokenizer_dir: Path, tmp_path: Path) -> None:
    record, directory = prepare(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    for split in (record.train, record.heldout):
        assert split.sha256 == hashlib.sha256((directory / split.file).read_bytes()).hexdigest()
    assert record.tokenizer_sha256 == digest_files(tokenizer_files(tokenizer_dir))


def test_digest_of_files_is_of_content_and_order_alone(tmp_path: Path) -> None:
    files = {}
    for name, content in (("one", "1"), ("two", "2"), ("same", "1"), ("both", "12"), ("none", "")):
        files[name] = tmp_path / name
        files[name].write_text(content)
    assert digest_files([files["one"], files["two"]]) == digest_files([files["same"], files["two"]])
    lists = (["one", "two"], ["two", "one"], ["one"], ["both"], ["both", "none"], ["none", "both"], [])
    assert len({digest_files(files[name] for name in names) for names in lists}) == len(lists)


def test_digest_of_a_chat_does_not_depend_on_the_order_of_keys() -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    turned = [dict(reversed(message.items())) for message in chat]
    assert Document(Chat(chat), "here").digest() == Document(Chat(turned), "there").digest()
    assert Document(Chat(chat), "").digest() != Document(Chat(chat[::-1]), "").digest()


# --- sources ---


def test_jsonl_gzipped_jsonl_and_parquet_hold_the_same_documents(tmp_path: Path) -> None:
    rows = [*({"text": text, "messages": None, "extra": 1} for text in TEXTS), *({"messages": chat} for chat in CHATS)]
    rows.append({"messages": [{"role": "user", "content": "q", "name": "n"}, {"role": "assistant", "content": "a"}]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema_of(rows)), tmp_path / "a.parquet", row_group_size=7)
    expected = [*TEXTS, *CHATS, rows[-1]["messages"]]
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        assert contents(DataSource(path=str(tmp_path / name)), tmp_path) == expected, name


def test_every_compressed_part_of_a_directory_is_read(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, (ending, compress) in enumerate({"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}.items()):
        (parts / f"{number}.jsonl{ending}").write_bytes(compress(json.dumps({"text": TEXTS[number]}).encode()))
    (parts / "3.jsonl.xz").write_bytes(lzma.compress(json.dumps({"text": TEXTS[3]}).encode()))
    assert contents(DataSource(path=str(parts)), tmp_path) == TEXTS[:4]


def test_files_of_a_directory_that_are_not_read_are_refused_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "parts").mkdir()
    write_jsonl(tmp_path / "parts" / "a.jsonl", [{"text": TEXTS[0]}])
    (tmp_path / "parts" / "LICENSE").write_text("free")
    source = DataSource(path=str(tmp_path / "parts"))
    assert contents(source, tmp_path) == [TEXTS[0]]
    assert caplog.messages[-1].endswith("parts: 1 files there are not read, such as LICENSE")
    (tmp_path / "parts" / "b.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ValueError, match=r"parts: b\.jsonl\.zst cannot be read; make it JSONL or Parquet"):
        contents(source, tmp_path)


def test_maps_of_parquet_are_the_objects_of_jsonl(tmp_path: Path) -> None:
    calls = [{"function": {"name": "book", "arguments": {"day": "Monday"}}}]
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": calls}]}
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    called = pa.list_(pa.struct([("function", function)]))
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", called)])
    table = pa.Table.from_pylist([row], schema=pa.schema([("messages", pa.list_(message))]))
    pq.write_table(table, tmp_path / "a.parquet")
    of_jsonl = contents(write_jsonl(tmp_path / "a.jsonl", [row]), tmp_path)
    assert contents(DataSource(path=str(tmp_path / "a.parquet")), tmp_path) == of_jsonl == [row["messages"]]


def test_a_value_that_no_json_holds_and_a_turn_that_is_not_to_be_learned_are_refused_by_their_place(
    tmp_path: Path,
) -> None:
    turn = {"role": "assistant", "content": "a"}
    dated = {**turn, "tool_calls": [{"function": {"name": "book", "arguments": {"day": date(2024, 5, 1)}}}]}
    pq.write_table(pa.Table.from_pylist([{"messages": [dated]}]), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet row 1 holds a value of type date, which no JSON does; make it"):
        contents(DataSource(path=str(tmp_path / "a.parquet")), tmp_path)
    for mark in ({"weight": 0}, {"train": False}):
        source = write_jsonl(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "q"}, {**turn, **mark}]}])
        with pytest.raises(ValueError, match=r"message 2 \(assistant\) is marked as not to be learned; remove"):
            contents(source, tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"messages": [{**turn, "weight": 1, "train": True}]}])
    assert len(contents(source, tmp_path)) == 1


def test_a_row_of_jsonl_is_held_to_no_other_rows_columns_or_types(tmp_path: Path) -> None:
    rows = [{"text": "2026-01-01"}, {"text": "2026-01-02T00:00:00"}, {"n": 1, "text": "a"}, {"n": "one", "text": "b"}]
    source = write_jsonl(tmp_path / "a.jsonl", [*rows, {"messages": CHATS[0], "n": [None]}])
    assert contents(source, tmp_path) == [row["text"] for row in rows] + [CHATS[0]]


def test_byte_order_mark_carriage_returns_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    found = read(DataSource(path=str(tmp_path / "a.jsonl")), tmp_path)
    assert [(d.content, d.where[-6:]) for d in found] == [("a", "line 1"), ("b", "line 3")]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext\r\n")
    assert contents(DataSource(path=str(tmp_path / "a.txt")), tmp_path) == ["text\n"]


def schema_of(rows: list[dict[str, Any]]) -> pa.Schema:
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    return pa.schema([("text", pa.string()), ("messages", pa.list_(message)), ("extra", pa.int64())])


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "sub/c.py", ".hidden/d.txt", "ignored.bin"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"first line of {name}\n\nαβγ last")
    found = read(DataSource(path=str(tmp_path / "in")), tmp_path)
    assert [document.content for document in found] == [
        f"first line of {name}\n\nαβγ last" for name in ("a.md", "b.txt", "sub/c.py")
    ]
    assert [document.where for document in found] == [str(tmp_path / "in" / n) for n in ("a.md", "b.txt", "sub/c.py")]


def test_directories_and_globs_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    letters = "qwertyuiopasdfghjklzxcvbnm"
    for letter in letters:
        write_jsonl(tmp_path / f"part-{letter}.jsonl", text_rows([letter]))
    expected = sorted(letters)
    assert contents(DataSource(path=str(tmp_path / "part-*.jsonl")), tmp_path) == expected
    assert contents(DataSource(path=str(tmp_path)), tmp_path) == expected


def test_a_name_full_of_glob_characters_is_taken_literally(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a[1]*.jsonl", text_rows(["right"]))
    write_jsonl(tmp_path / "a1.jsonl", text_rows(["wrong"]))
    assert contents(DataSource(path=str(tmp_path / "a[1]*.jsonl")), tmp_path) == ["right"]


def test_format_and_field_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_text(json.dumps({"body": "b", "chat": CHATS[0]}) + "\n")
    source = DataSource(path=str(path), format="jsonl", field="body", messages_field="chat")
    assert contents(source, tmp_path) == [CHATS[0]]
    assert contents(replace(source, messages_field="messages"), tmp_path) == ["b"]
    assert contents(replace(source, format="text"), tmp_path) == [path.read_text()]


def test_rows_without_content_are_passed_over(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"messages": []}, {"text": "b"}])
    assert [d.where for d in read(source, tmp_path)] == [f"{source.path} line 2", f"{source.path} line 4"]


def test_standard_library_is_its_modules_without_tests(tmp_path: Path) -> None:
    source = DataSource(path="stdlib://")
    found, again = (list(islice(iter_documents(source, tmp_path), 30)) for _ in range(2))
    assert [document.where for document in found] == sorted(document.where for document in found)
    assert found == again
    names = [path.as_posix() for path in source_files(source)]
    assert any(name.endswith("/argparse.py") for name in names)
    assert not [name for name in names if re.search(r"/(tests?|idlelib|lib2to3|site-packages|__pycache__)/", name)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://org/name", ("org/name", None, None)),
        ("hf://org/name/config", ("org/name", "config", None)),
        ("hf://org/name/config@v1.0", ("org/name", "config", "v1.0")),
    ],
)
def test_hub_datasets_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: tuple[str | None, ...]
) -> None:
    def load_dataset(name: str, subset: str | None, **options: Any) -> list[dict[str, str]]:
        assert (name, subset, options.pop("revision")) == expected
        assert options == {"split": "validation", "streaming": True, "cache_dir": str(tmp_path / "work")}
        return text_rows(["x", "y"])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = DataSource(path=path, split="validation")
    assert read(source, tmp_path) == [Document("x", f"{path} row 1"), Document("y", f"{path} row 2")]


def test_texts_for_a_tokenizer_come_evenly_from_all_sources(tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "a.jsonl", text_rows(["L" * 100] * 10))
    chats = [[{"role": "user", "content": "q" * 10}, {"role": "assistant", "content": "a" * 9}]] * 10
    short = write_jsonl(tmp_path / "b.jsonl", [{"messages": chat} for chat in chats])
    texts = list(iter_texts(DataConfig(sources=(long, short))))
    assert len(texts) == 20
    read_so_far = texts[:13]
    assert [sum(len(t) for t in read_so_far if t[0] == letter) for letter in "Lq"] == [300, 200]
    assert texts[1] == "q" * 10 + "\n" + "a" * 9


# --- bad input ---

GOOD = json.dumps({"text": "good"}) + "\n"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "a.jsonl",
            GOOD + '{"text": "x"\n' + GOOD,
            "a.jsonl line 2 is not JSON (Expecting ',' delimiter, column 13); mend or remove it",
        ),
        ("a.jsonl", GOOD + GOOD + '{"text": "cut of', "a.jsonl line 3 is not JSON (Unterminated string"),
        ("a.jsonl", GOOD + "3\n", "a.jsonl line 2 is not a JSON object, of which JSONL holds one a line; mend or"),
        (
            "a.jsonl",
            GOOD.encode() + b'{"text": "\xe9"}\n',
            "a.jsonl: line 2: 'utf-8' codec can't decode byte 0xe9 in position 10: invalid continuation byte; ",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text"\n', mtime=0),  # the same id in every process of pytest-xdist
            "a.jsonl.gz line 1 is not JSON (Expecting ':' delimiter, column 8); ",
        ),
        (
            "a.jsonl.gz",
            gzip.compress(GOOD.encode() * 99, mtime=0)[:-9],
            "a.jsonl.gz: Compressed file ended before the end",
        ),
        ("a.jsonl", '{"text": "\\ud83d"}\n', "a.jsonl line 1 holds half a surrogate pair, which is no character; mend"),
        ("a.json", '[{"text": "x"}]\n', "a.json line 1 is not a JSON object, of which JSONL holds one a line; mend"),
        ("a.jsonl", "", "a.jsonl: the file is empty; mend or remove it"),
        ("a.jsonl", '{"text": "x", "text": "y"}\n', "a.jsonl line 1 cannot be read (the key 'text' occurs twice); "),
        ("a.jsonl", f'{{"text": {"[" * 100_000}', "a.jsonl line 1 cannot be read (maximum recursion depth exceeded"),
        ("a.jsonl", f'{{"text": {"9" * 5000}}}', "a.jsonl line 1 cannot be read (Exceeds the limit (4300 digits)"),
        *(
            (f"a.{kind}", POINTER, f"a.{kind}: is a Git LFS pointer, not the file")
            for kind in ("txt", "jsonl", "parquet")
        ),
        (
            "a.jsonl",
            GOOD + '{"body": "x"}\n',
            "a.jsonl line 2 has neither 'text' nor 'messages', but 'body'; mend it, or",
        ),
        ("a.jsonl", GOOD + '{"text": 7}\n', "a.jsonl line 2: 'text' holds int, not text; mend it or set field"),
        ("a.jsonl", '{"messages": "hello"}\n', "a.jsonl line 1: 'messages' is not a list of messages with roles; "),
        ("a.jsonl", '{"messages": [{"content": "x"}]}\n', "a.jsonl line 1: 'messages' is not a list of messages with"),
        ("a.jsonl.gz", b"\x1f\x8b and no more", "a.jsonl.gz: "),
        ("a.parquet", b"PAR1 not really", "a.parquet: Parquet magic bytes not found in footer."),
        ("a.txt", b"caf\xe9 noir", "a.txt: 'utf-8' codec can't decode byte 0xe9 in position 3"),
        ("a.bin", b"text", "a.bin: cannot tell one format by the names (.bin); set format or name one kind"),
    ],
)
def test_unreadable_data_is_one_line_with_its_place(tmp_path: Path, name: str, content: str | bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as failure:
        read(DataSource(path=str(tmp_path / name)), tmp_path)
    assert str(failure.value).startswith(f"{tmp_path}/{line}")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("missing.jsonl", "no such file or directory; correct the path in data.sources"),
        ("part-*.jsonl", "no file matches; correct the path in data.sources"),
        (
            "nothing",
            "the directory holds no data file (.txt, .text, .md, .rst, .py, .jsonl, .ndjson, .json, .parquet); ",
        ),
    ],
)
def test_a_source_without_files_is_refused(tmp_path: Path, path: str, problem: str) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "x.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / path}: {problem}")):
        read(DataSource(path=str(tmp_path / path)), tmp_path)


def test_a_directory_of_two_formats_is_refused_until_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README.md").write_text("about")
    write_jsonl(tmp_path / "in" / "a.jsonl", text_rows(["a"]))
    source = DataSource(path=str(tmp_path / "in"))
    with pytest.raises(ValueError, match=r"cannot tell one format by the names \(\.jsonl, \.md\); set format"):
        read(source, tmp_path)
    assert contents(replace(source, format="jsonl"), tmp_path) == ["a"]


@pytest.mark.parametrize("path", ["hf://name", "hf://", "hf://org/"])
def test_a_hub_path_without_a_name_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{path}: a Hub dataset is hf://org/name")):
        read(DataSource(path=path), tmp_path)


def test_an_empty_dataset_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    for source in (DataSource(path=str(tmp_path / "a.parquet")), write_jsonl(tmp_path / "b.jsonl", [{"text": ""}])):
        with pytest.raises(ValueError, match="the dataset is empty; add documents or take it out"):
            prepare(source)


def test_documents_that_cannot_fill_both_sides_are_refused(prepare: Prepare, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", text_rows(["only one"]))
    with pytest.raises(ValueError, match=r"1 documents leave \d to train on and \d held out .*; add documents"):
        prepare(source)


def test_a_split_too_short_for_a_sequence_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    record, _ = prepare(write_jsonl(tmp_path / "a.jsonl", text_rows()))
    tokens = record.train.tokens
    check_length("train.safetensors", tokens, tokens - 1)
    with pytest.raises(
        ValueError, match=f"train.safetensors holds {tokens} tokens, too few for a sequence of {tokens} "
    ):
        check_length("train.safetensors", tokens, tokens)


def test_chats_need_a_template(tokenizer_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((tokenizer_dir / name).read_bytes())
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": CHATS[0]}])
    with pytest.raises(
        ValueError, match=r"a.jsonl line 1 holds messages but the tokenizer has no chat template; add one"
    ):
        build_corpus(DataConfig(sources=(source,)), bare, tmp_path / "out")


@pytest.mark.parametrize(
    ("messages", "cause"),
    [([{"role": "critic", "content": "x"}], "role critic is not"), ([{"role": "user"}], "content")],
)
def test_a_chat_that_the_template_refuses_is_named(
    prepare: Prepare, tmp_path: Path, messages: list[Any], cause: str
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*({"messages": chat} for chat in CHATS), {"messages": messages}])
    with pytest.raises(ValueError, match=f"a.jsonl line 21: the chat template refuses it .*{cause}.*; mend it"):
        prepare(source)


def test_faults_of_the_disk_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(piece: pieces.Piece) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pieces, "_raw", broken)
    with pytest.raises(OSError, match="Input/output error"):
        read(write_jsonl(tmp_path / "a.jsonl", text_rows()), tmp_path)


# --- the problems of the tiny recipe ---


@pytest.fixture(scope="module")
def problems() -> Problems:
    return {
        side: [
            json.loads(line) for file in PROBLEMS.glob(f"problems-{side}*") for line in file.read_text().splitlines()
        ]
        for side in ("train", "heldout")
    }


def test_problems_are_questions_with_answers(problems: Problems) -> None:
    assert len(problems["heldout"]) == 300
    assert len(problems["train"]) > 12_000
    for row in problems["train"] + problems["heldout"]:
        question, reply = row["messages"]
        assert (question["role"], reply["role"]) == ("user", "assistant")
        assert question["content"].strip() and reply["content"].strip() == reply["content"] != ""


def test_no_question_is_asked_twice(problems: Problems) -> None:
    questions = [row["messages"][0]["content"] for row in problems["train"] + problems["heldout"]]
    assert len(questions) == len(set(questions))


def test_problems_are_balanced_over_the_same_tasks(problems: Problems) -> None:
    counts = {side: {row["task"]: 0 for row in rows} for side, rows in problems.items()}
    for side, rows in problems.items():
        for row in rows:
            counts[side][row["task"]] += 1
    assert counts["train"].keys() == counts["heldout"].keys()
    assert all(len(set(by_task.values())) == 1 for by_task in counts.values())


def test_answers_are_right(problems: Problems) -> None:
    solve = {
        "simple_equations": solve_equation,
        "number_sorting": solve_sorting,
        "number_filtering": solve_filtering,
        "manipulate_matrix": solve_matrix,
        "rotate_matrix": solve_matrix,
        "spiral_matrix": solve_matrix,
    }
    for row in problems["train"] + problems["heldout"]:
        question, reply = (message["content"] for message in row["messages"])
        assert solve[row["task"]](question) == reply, question


def solve_equation(question: str) -> str:
    first, sign, second, right = re.fullmatch(r"solve (\w)([+-])(\w)=(-?\d+)", question).groups()

    def left(x: int) -> int:
        a, b = (x if term.isalpha() else int(term) for term in (first, second))
        return a + b if sign == "+" else a - b

    return next(str(x) for x in range(100) if left(x) == int(right))


def solve_sorting(question: str) -> str:
    _, direction, digits = question.split()
    return "".join(sorted(digits, reverse=direction == "descending"))


def solve_filtering(question: str) -> str:
    verb, side, limit, digits = re.fullmatch(r"(\w+) (\w+) than (\d): (\d+)", question).groups()
    kept = [d for d in digits if ((d > limit if side == "larger" else d < limit) == (verb == "keep"))]
    return "".join(kept) or "none"


def solve_matrix(question: str) -> str:
    how, text = question.split()
    rows = text.split("/")
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    answers = {
        "rotate": [column[::-1] for column in columns],
        "spiral": ["".join(rows[0]) + rows[1][::-1]],
        "hmirror": rows[::-1],
        "vmirror": [row[::-1] for row in rows],
        "dmirror": columns,
        "cmirror": [column[::-1] for column in columns[::-1]],
    }
    return "/".join(answers[how])
