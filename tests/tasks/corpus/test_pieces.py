"""Laws of pieces: however a source is cut, its rows come out once each, in its own order."""

import gzip
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from elastic_core.recipe import DataSource
from tasks.artifacts import Store
from tasks.corpus import pieces
from tasks.corpus.pieces import Piece, file_pieces, hub_pieces, piece_rows

TEXTS = [f"{i}: {'αβγ' * (i % 7)}" for i in range(60)]


def rows(found: list[Piece], source: DataSource) -> list[Any]:
    read = [row for _, row in piece_rows(found, source, "")]
    return [json.loads(row)["text"] if isinstance(row, str) else row["text"] for row in read]


def cut(path: Path, piece_bytes: int) -> tuple[list[Piece], DataSource]:
    source = DataSource(path=str(path))
    return pieces.cut(file_pieces(source, [path]), piece_bytes), source


@pytest.mark.parametrize("piece_bytes", [1, 7, 30, 64, 1000, 10**6])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n"])
def test_a_file_of_lines_cut_anywhere_gives_every_line_once(piece_bytes: int, end: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    lines[20] = ""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines[:40]).encode() + b"\r\n" + "\n".join(lines[40:]).encode())
    with path.open("ab") as file:
        file.write(end.encode())
    found, source = cut(path, piece_bytes)
    assert len(found) == max(1, -(-path.stat().st_size // piece_bytes))
    assert sum(piece.size or 0 for piece in found) == path.stat().st_size
    assert rows(found, source) == TEXTS[:20] + TEXTS[21:]


def test_a_line_in_the_middle_of_a_file_is_found_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found, source = cut(path, path.stat().st_size // 3)
    for where, row in piece_rows(found, source, ""):
        _, _, place = where.partition(" line ")
        number, _, first = place.partition(" after byte ")
        rest = path.read_bytes()[int(first or 0) :].decode()
        assert rest.splitlines()[int(number) - 1].endswith(str(row))


@pytest.mark.parametrize("piece_bytes", [1, 500, 10**6])
def test_parquet_is_cut_at_its_row_groups_and_rows_keep_their_numbers(piece_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)
    found, source = cut(path, piece_bytes)
    assert (len(found) == 9) if piece_bytes == 1 else (len(found) < 9)
    assert rows(found, source) == TEXTS
    numbers = [where.removeprefix(f"{path} row ") for where, _ in piece_rows(found, source, "")]
    assert numbers == [str(number) for number in range(1, 61)]


def test_what_is_compressed_is_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))
    found, source = cut(path, 10)
    assert len(found) == 1 and rows(found, source) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.txt"])
def test_an_object_of_s3_is_read_as_the_file_is(name: str, store: Store, tmp_path: Path) -> None:
    path = tmp_path / name
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    match name.partition(".")[2]:
        case "parquet":
            pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case _:
            path.write_bytes(lines)
    store.client.put_object(Bucket=store.bucket, Key=name, Body=path.read_bytes())
    found, source = cut(path, 500)
    there = [replace(piece, path=f"s3://{store.bucket}/{name}") for piece in found]
    assert list(piece_rows(there, source, "")) == list(piece_rows(found, source, ""))


def test_a_file_of_300_gigabytes_is_cut_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    size, piece_bytes = 300 * 10**9, 128 * 2**20
    with path.open("wb") as file:
        file.truncate(size)
    found, _ = cut(path, piece_bytes)
    spans = [piece.span for piece in found if piece.span is not None]
    assert spans[0][0] == 0 and spans[-1][1] == size and len(spans) == len(found)
    assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert all(0 < end - first <= piece_bytes for first, end in spans)


def test_a_data_set_on_the_hub_is_read_file_by_file_at_one_commit_that_is_listed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for name, texts in {"1": "ab", "2": "c", "3": "d"}.items():
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    asked: list[Any] = []

    def list_and_stream(name: str, subset: str | None, *, split: str, revision: str, **options: Any) -> Any:
        asked.append((name, subset, revision, split))
        return load_dataset("json", data_files={split: [str(file) for file in files]}, split=split, **options)

    monkeypatch.setattr("datasets.load_dataset", list_and_stream)
    monkeypatch.setattr(pieces, "commit_of", lambda hub: f"commit of {hub.revision}")
    source = DataSource(path="hf://org/three-files/config@v1.0", split="math")
    found = hub_pieces(source, str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    assert [piece.size for piece in found] == [None] * 3
    read = list[tuple[str, Any]]()
    for number, piece in enumerate(found):  # as shards read them, each with a directory that ends with it
        cache = tmp_path / f"cache of {number}"
        read += [
            (where, row["text"]) for where, row in piece_rows([piece], source, str(cache)) if isinstance(row, dict)
        ]
        shutil.rmtree(cache, ignore_errors=True)
    assert read == [
        (f"{source.path} file 1 row 1", "a"),
        (f"{source.path} file 1 row 2", "b"),
        (f"{source.path} file 2 row 1", "c"),
        (f"{source.path} file 3 row 1", "d"),
    ]
    assert asked == [("org/three-files", "config", "commit of v1.0", "math")]
