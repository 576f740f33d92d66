"""Documents from wherever a recipe's sources are: files, S3, the Hub, or Python's own standard library.

A document is text or a chat.
"""

import glob
import hashlib
import json
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, TypeVar

from fsspec.utils import glob_translate

from elastic_core.files.pointers import pointer_fault
from elastic_core.recipe import DataSource
from tasks.artifacts import ListedObject
from tasks.corpus.chats import Chat, Row, Unusable, read_chat
from tasks.corpus.hub import HUB
from tasks.corpus.pieces import (
    S3,
    SUFFIXES,
    Piece,
    cut,
    file_pieces,
    first_line,
    format_of,
    hub_pieces,
    listed,
    object_pieces,
    piece_rows,
    whole_hub,
)

STDLIB = "stdlib://"
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
UNREADABLE = (".arrow", ".csv", ".lz4", ".tar", ".tsv", ".zip", ".zst")  # they hold rows, which are not read
SHOWN = 3  # the refused rows of a source that are kept word for word

P = TypeVar("P", bound=PurePath)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Document:
    """Text or a chat, and the place it was read from."""

    content: str | Chat
    where: str

    def digest(self) -> bytes:
        """SHA-256 of the content, whatever file, format or place it came from."""
        chat = self.content
        text = chat if isinstance(chat, str) else json.dumps(chat.hashed(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).digest()


class Empty(Unusable):
    """A row without content, of which a source may have any number."""


class Tally:
    """Counts what a source holds beside documents: rows that cannot be used, and rows without content.

    `unthought` turns have no thought, were not said to have none, and are rendered with thinking turned off. `before`
    so many rows of the source could not be used, the first of them for the reasons `first_before`.
    """

    def __init__(self, source: DataSource, before: int = 0, first_before: tuple[str, ...] = ()) -> None:
        self._source, self._before, self._first_before = source, before, first_before
        self.skipped = self.empty = self.unthought = 0
        self.first: list[str] = []

    def add(self, fault: Unusable) -> None:
        """Count a row that is no document; ValueError where the source may skip no more of those with a fault."""
        if isinstance(fault, Empty):
            self.empty += 1
            return
        self.skipped += 1
        if len(self.first) < SHOWN:
            self.first.append(str(fault))
        limit = self._source.max_skipped
        if self._before + self.skipped > limit:
            first = [*self._first_before, *self.first][0]
            more = f"; it is one more than max_skipped={limit}, and the first was: {first}" if limit else ""
            raise ValueError(f"{fault}{more}") from fault


def iter_documents(source: DataSource, cache_dir: Path) -> Iterator[Document]:
    """The documents of a source, in a fixed order; rows with empty content are passed over.

    `cache_dir` takes the lock files of `datasets`; it can go when the iterator ends. ValueError names the file, the row
    and the remedy.
    """
    tally = Tally(source)
    for found in documents_in(iter_rows(source, cache_dir), source):
        if isinstance(found, Unusable):
            tally.add(found)
        else:
            yield found


def documents_in(rows: Iterable[tuple[str, Row | str]], source: DataSource) -> Iterator[Document | Unusable]:
    """The documents of some rows, and what is wrong with each row that is none."""
    for where, row in rows:
        try:
            content = _content(row, source, where)
        except Unusable as fault:
            yield Unusable(str(fault))  # without its traceback, which holds the row
            continue
        is_empty = content == "" or (isinstance(content, Chat) and not content.messages)
        yield Empty(f"{where} is empty") if is_empty else Document(content, where)


def iter_rows(source: DataSource, cache_dir: Path) -> Iterator[tuple[str, Row | str]]:
    """Where each row of a source stands, and the row, or the line of JSON that it is. A text file is one row."""
    return piece_rows(whole_pieces(source), source, str(cache_dir))


def whole_pieces(source: DataSource) -> list[Piece]:
    """The source uncut: its files or objects, or all that it is on the Hub."""
    if source.path.startswith(HUB):
        return [whole_hub(source)]
    if source.path.startswith(S3):
        return object_pieces(source, source_objects(source))
    return file_pieces(source, source_files(source))


def source_pieces(source: DataSource, cache_dir: Path, piece_bytes: int) -> list[Piece]:
    """The source in pieces of about so many bytes, where it can be cut."""
    if source.path.startswith(HUB):
        return hub_pieces(source, str(cache_dir))
    return cut(whole_pieces(source), piece_bytes)


def parse_row(row: Row | str, where: str) -> tuple[Row, bool]:
    """A row's fields, and whether they come from columns, which lend every struct the keys of all others."""
    return (_parse(row, where), False) if isinstance(row, str) else (row, True)


# --- files ---


def source_files(source: DataSource) -> list[Path]:
    """The files of a source that is on this machine, in order."""
    return _stdlib_files() if source.path == STDLIB else _local_files(source, Path(source.path).expanduser())


def source_objects(source: DataSource) -> list[ListedObject]:
    """The objects of a source that is in S3, in order: one, those of data below a prefix, or what a glob matches."""
    if glob.has_magic(source.path):
        return _matching_objects(source.path)
    objects = {PurePosixPath(found.path): found for found in listed(source.path)}
    if [found.uri for found in objects.values()] == [source.path]:
        return list(objects.values())
    return [objects[path] for path in _data_files(source, objects)]


def digest_files(files: Iterable[Path]) -> str:
    """SHA-256 over the SHA-256 of each file, in order: it changes with any content, not with names or places."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _local_files(source: DataSource, path: Path) -> list[Path]:
    """A file, the data files below a directory, or what matches a glob."""
    if path.is_file():
        return _fetched([path])
    if path.is_dir():
        below = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        return _fetched([path / file for file in _data_files(source, below)])
    files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if os.path.isfile(found))
    if not files:
        problem = "no file matches" if glob.has_magic(str(path)) else "no such file or directory"
        raise ValueError(f"{source.path}: {problem}; correct the path in data.sources")
    return _fetched(files)


def _matching_objects(pattern: str) -> list[ListedObject]:
    """Matched as files are: `*` and `?` within a component, `**` over several, and nothing that is hidden."""
    fixed = list(takewhile(lambda part: not glob.has_magic(part), pattern.split("/")))
    matches = re.compile(glob_translate(pattern)).match
    found = [found for found in listed("/".join(fixed)) if matches(found.uri) and not _is_hidden(found.path)]
    if not found:
        raise ValueError(f"{pattern}: no object matches; correct the path in data.sources")
    return found


def _data_files(source: DataSource, below: Iterable[P]) -> list[P]:
    """Which of the paths below a directory are read, in order: those of data, none of them hidden."""
    wanted = SUFFIXES if source.format == "auto" else (source.format,)
    visible = sorted(path for path in below if not _is_hidden(path))
    found = [path for path in visible if format_of(path) in wanted]
    _say_unread(source, [path for path in visible if format_of(path) not in wanted])
    if not found:
        known = ", ".join(suffix for name in wanted for suffix in SUFFIXES[name])
        raise ValueError(f"{source.path}: the directory holds no data file ({known}); correct the path in data.sources")
    return found


def _is_hidden(path: str | PurePath) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(path).parts)


def _say_unread(source: DataSource, files: Sequence[PurePath]) -> None:
    """Say which files of a directory are not read; ValueError for those that hold rows in a form that cannot be."""
    if rows := next((file.name for file in files if file.suffix.lower() in UNREADABLE), None):
        raise ValueError(
            f"{source.path}: {rows} cannot be read; make it JSONL or Parquet, or name the files that are wanted, "
            "such as DIR/*.jsonl"
        )
    if files:
        logger.warning("%s: %d files there are not read, such as %s", source.path, len(files), files[0].name)


def _fetched(files: list[Path]) -> list[Path]:
    """The files, none of which Git LFS has yet to fetch."""
    if fault := next(filter(None, map(pointer_fault, files)), ""):
        raise ValueError(fault)
    return files


def _stdlib_files() -> list[Path]:
    """The standard library's own modules, less its tests: real text that every machine has."""
    found: list[Path] = []
    for directory, below, names in os.walk(sysconfig.get_path("stdlib")):
        below[:] = [name for name in below if name not in NOT_LIBRARY]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return [file for file in sorted(found) if _is_text(file)]


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


# --- rows ---


def _parse(line: str, where: str) -> Row:
    """The object that a line of JSON spells."""
    try:
        row = json.loads(line, object_pairs_hook=_unique)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise Unusable(f"{where} is not JSON ({error.msg}, column {error.colno}); mend or remove it") from error
    except UnicodeEncodeError as error:
        raise Unusable(f"{where} holds half a surrogate pair, which is no character; mend or remove it") from error
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{where} cannot be read ({first_line(error)}); mend or remove it") from error
    if not isinstance(row, dict):
        raise Unusable(f"{where} is not a JSON object, of which JSONL holds one a line; mend or remove it")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    """An object of JSON; ValueError for a key that it has twice, of whose values one would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return row


def _content(row: Row | str, source: DataSource, where: str) -> str | Chat:
    fields, columns = parse_row(row, where)
    if fields.get(source.messages_field) is not None:
        return read_chat(fields, source, where, columns=columns)
    text = fields.get(source.field)
    if isinstance(text, str):
        return text
    if text is not None:
        raise Unusable(f"{where}: {source.field!r} holds {type(text).__name__}, not text; mend it or set field")
    present = ", ".join(repr(key) for key, value in fields.items() if value is not None) or "nothing"
    raise Unusable(
        f"{where} has neither {source.field!r} nor {source.messages_field!r}, but {present}; "
        "mend it, or set the source's field or messages_field"
    )
