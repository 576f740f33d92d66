"""What a source is read from, piece by piece: files and objects, ranges of large ones, files of a data set on the Hub.

A piece is read by itself, where it lies and no more of it than itself, wherever the others are read. One after the
other the pieces give the rows of the source in its own order, however it was cut. Text is one row a file, JSONL one row
a line, and Parquet one a row.
"""

import bz2
import gzip
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, pairwise
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow.parquet as pq

from elastic_core.files import pointers
from elastic_core.recipe import DataSource
from tasks import artifacts
from tasks.corpus.chats import Row
from tasks.corpus.hub import commit_of, parse_dataset
from tasks.settings import ServiceError, Settings, is_transient

if TYPE_CHECKING:
    from datasets import IterableDataset

SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst", ".py"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
HUB_FORMAT = "hub"
S3 = "s3://"
ROWS_PER_READ = 1024
LOOKS = 16  # files that are looked into at a time
COMPRESSED = (".gz", ".bz2", ".xz")
# What opens a file that begins so; any other is read as it is.
OPENERS: dict[bytes, Callable[[BinaryIO], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a source: what users call its file, and where that is.

    `path`: a file here, an object of S3, or a data set on the Hub. `size`: bytes to read, None where nobody knows.
    `span`: of a file of lines the bytes from the first to before the second, and every line that begins in them; of
    Parquet such row groups; of the Hub which of how many files. None: all of it. `etag`: that of the object, which is
    to be no other.
    """

    name: str
    path: str
    format: str
    size: int | None
    span: tuple[int, int] | None = None
    etag: str | None = None


def file_pieces(source: DataSource, files: Iterable[Path]) -> list[Piece]:
    """Files of this machine, each uncut."""
    found = list(files)
    format = _one_format(source, found)
    return [Piece(name=str(file), path=str(file), format=format, size=file.stat().st_size) for file in found]


def object_pieces(source: DataSource, objects: Sequence[artifacts.ListedObject]) -> list[Piece]:
    """Objects of S3 as they were listed, each uncut."""
    format = _one_format(source, [PurePosixPath(found.path) for found in objects])
    return [Piece(name=found.uri, path=found.uri, format=format, size=found.size, etag=found.etag) for found in objects]


def cut(pieces: Sequence[Piece], piece_bytes: int) -> list[Piece]:
    """The pieces in order; in the place of one that is larger than `piece_bytes`, and can be cut, several."""
    ways = {"jsonl": _line_ranges, "parquet": _row_groups}
    with ThreadPoolExecutor(LOOKS) as pool:  # S3 takes its time to answer
        parts = pool.map(lambda piece: ways.get(piece.format, _uncut)(piece, piece_bytes), pieces)
        return [part for of_piece in parts for part in of_piece]


def hub_pieces(source: DataSource, cache_dir: str) -> list[Piece]:
    """The files of a data set on the Hub, at the commit that it has now."""
    path = f"{source.path.partition('@')[0]}@{commit_of(parse_dataset(source.path))}"
    files = _listed(path, source.path, source.split, cache_dir).num_shards
    return [
        Piece(name=source.path, path=path, format=HUB_FORMAT, size=None, span=(number, files))
        for number in range(files)
    ]


def whole_hub(source: DataSource) -> Piece:
    """A data set on the Hub as it is now, read from its first row on."""
    return Piece(name=source.path, path=source.path, format=HUB_FORMAT, size=None)


def piece_rows(pieces: Iterable[Piece], source: DataSource, cache_dir: str) -> Iterator[tuple[str, Row | str]]:
    """Where each row of some pieces stands, and the row, or the line of JSON that it is.

    `cache_dir` takes the lock files of `datasets`, which reads from the Hub.
    """
    for piece in pieces:
        match piece.format:
            case "text":
                with _naming(piece.name), _opened(piece) as file:
                    text = file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
                yield piece.name, {source.field: text}
            case "jsonl":
                yield from _lines(piece)
            case "parquet":
                yield from _parquet_rows(piece)
            case _:
                yield from _hub_rows(piece, source.split, cache_dir)


def format_of(path: PurePath) -> str | None:
    """The format that the name of a file tells, that of a compression after it or not."""
    suffix = PurePath(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    return next((name for name, suffixes in SUFFIXES.items() if suffix.lower() in suffixes), None)


def listed(uri: str) -> list[artifacts.ListedObject]:
    """The objects below a prefix of S3, or the one that is meant."""
    return artifacts.list_objects(_store(Settings.from_environment(need_bucket=False)), uri)


# --- files ---


def _one_format(source: DataSource, files: Sequence[PurePath]) -> str:
    known = {format_of(file) for file in files} if source.format == "auto" else {source.format}
    if len(known) > 1 or None in known:
        found = ", ".join(sorted({file.suffix or file.name for file in files}))
        raise ValueError(f"{source.path}: cannot tell one format by the names ({found}); set format or name one kind")
    return str(known.pop())


def _uncut(whole: Piece, piece_bytes: int) -> list[Piece]:
    return [whole]


def _line_ranges(whole: Piece, piece_bytes: int) -> list[Piece]:
    size = whole.size or 0
    if size <= piece_bytes:
        return [whole]
    with _raw(whole) as raw:
        if _opener(raw) is not None:
            return [whole]
    pieces = -(-size // piece_bytes)
    borders = [size * number // pieces for number in range(pieces + 1)]
    return [_part(whole, first, end, end - first) for first, end in pairwise(borders)]


def _row_groups(whole: Piece, piece_bytes: int) -> list[Piece]:
    """Row groups together up to `piece_bytes`, as they are when they are read."""
    pieces: list[Piece] = []
    first = size = 0
    with _naming(whole.name), _parquet(whole) as file:
        sizes = [file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)]
    for number, added in enumerate(sizes):
        if size and size + added > piece_bytes:
            pieces.append(_part(whole, first, number, size))
            first, size = number, 0
        size += added
    return [*pieces, _part(whole, first, len(sizes), size)]


def _part(whole: Piece, first: int, end: int, size: int) -> Piece:
    return replace(whole, size=size, span=(first, end))


def _lines(piece: Piece) -> Iterator[tuple[str, str]]:
    """The lines that are not blank. In the middle of a file they are counted from the first that begins there."""
    position, end = piece.span or (0, None)
    with _naming(piece.name), _opened(piece) as file:
        if position:
            file.seek(position - 1)
            position += len(file.readline()) - 1  # the line that began before
        after = f" after byte {position}" if position else ""
        for number in count(1):
            if end is not None and position >= end:
                return
            line = file.readline()
            if not line:
                return
            try:
                text = line.decode("utf-8" if position else "utf-8-sig").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}{after}: {error}") from error
            position += len(line)
            if text.strip():
                yield f"{piece.name} line {number}{after}", text


def _parquet_rows(piece: Piece) -> Iterator[tuple[str, Row]]:
    with _naming(piece.name), _parquet(piece) as file:
        first, end = piece.span or (0, file.num_row_groups)
        number = sum(file.metadata.row_group(before).num_rows for before in range(first))
        for batch in file.iter_batches(batch_size=ROWS_PER_READ, row_groups=list(range(first, end))):
            for row in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                yield f"{piece.name} row {number}", row


@contextmanager
def _parquet(piece: Piece) -> Iterator[Any]:
    with _opened(piece) as file, pq.ParquetFile(file) as parquet:
        yield parquet


@contextmanager
def _opened(piece: Piece) -> Iterator[BinaryIO]:
    """The file, or the object in S3, decompressed where it is compressed."""
    with _raw(piece) as raw:
        if piece.format != "text" and not raw.seek(0, os.SEEK_END):
            raise ValueError("the file is empty")
        raw.seek(0)
        if pointers.is_pointer(raw):
            raise ValueError(pointers.FAULT)
        is_plain = piece.format == "jsonl" and piece.span is not None  # only what is not compressed is cut
        opener = None if is_plain else _opener(raw)
        if opener is None:
            yield raw
            return
        with opener(raw) as file:
            yield file


def _raw(piece: Piece) -> BinaryIO:
    if piece.path.startswith(S3):
        store = _store(Settings.from_environment(need_bucket=False))
        return artifacts.open_object(store, piece.path, piece.etag, piece.size if piece.span is None else None)
    return Path(piece.path).open("rb")


@cache
def _store(settings: Settings) -> artifacts.Store:
    """One client for the process."""
    return artifacts.open_store(settings)


def _opener(raw: BinaryIO) -> Callable[[BinaryIO], Any] | None:
    """What opens a file that begins as this one, which is then read from its beginning."""
    begins = raw.read(8)
    raw.seek(0)
    return next((opener for magic, opener in OPENERS.items() if begins.startswith(magic)), None)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Names the file in whatever is wrong with its content; a fault of the disk, which has a number, stays itself."""
    try:
        yield
    except Exception as error:
        if (
            is_transient(error)
            or isinstance(error, MemoryError | ServiceError)
            or getattr(error, "errno", None) is not None
        ):
            raise
        raise ValueError(f"{name}: {first_line(error)}; mend or remove it") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, for libraries that write paragraphs."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# --- the Hub ---


def _hub_rows(piece: Piece, split: str, cache_dir: str) -> Iterator[tuple[str, Row]]:
    """The rows of `hf://[datasets/]org/name[/config][@revision]`, streamed."""
    of_file = ""
    if piece.span is None:
        rows = _stream(piece.path, piece.name, split, cache_dir)
    else:
        at, files = piece.span
        rows = _listed(piece.path, piece.name, split, cache_dir).shard(num_shards=files, index=at)
        of_file = f" file {at + 1}" if files > 1 else ""
    for number, row in enumerate(rows, 1):
        yield f"{piece.name}{of_file} row {number}", row


def _stream(path: str, name: str, split: str, cache_dir: str) -> "IterableDataset":
    from datasets import load_dataset  # half a second, for data sets of the Hub alone

    hub = parse_dataset(path)
    try:
        return load_dataset(
            hub.repository, hub.config, split=split, revision=hub.revision, streaming=True, cache_dir=cache_dir
        )
    except ValueError as error:
        if is_transient(error):
            raise
        raise ValueError(f"{name}: {first_line(error)}; correct it in data.sources") from error


def _listed(path: str, name: str, split: str, cache_dir: str) -> "IterableDataset":
    """A data set at a commit, asked for once a process: the Hub takes seconds to list a large one.

    Each shard has a `cache_dir` of its own, of which `datasets` uses nothing any more once it has listed the files.
    """
    if (path, split) not in _known:
        _known[path, split] = _stream(path, name, split, cache_dir)
    return _known[path, split]


_known: "dict[tuple[str, str], IterableDataset]" = {}
