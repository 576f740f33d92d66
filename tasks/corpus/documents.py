"""Read documents from wherever a recipe's sources are: files, S3, the Hub, or Python's own standard library.

Text, JSONL (also gzipped) and Parquet are read by `datasets`, streaming. A document is text or a chat.
"""

import glob
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from datasets import IterableDataset, load_dataset

from elastic_core.files.pointers import pointer_fault
from elastic_core.recipe import DataSource
from tasks.corpus.chats import Chat, Row, Unusable, read_chat
from tasks.corpus.hub import HUB, parse_dataset
from tasks.settings import is_transient

STDLIB = "stdlib://"
SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst", ".py"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
}
NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
ROWS_PER_READ = 1024
SHOWN = 3  # the refused rows of a source that are kept word for word

# Downloads an s3:// object or prefix to a path inside a directory that does not exist yet, and returns that path.
Fetch = Callable[[str, Path], Path]


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


class Tally:
    """Counts what a source holds beside documents: rows that cannot be used, and rows without content.

    `unthought` turns have no thought, were not said to have none, and are rendered with thinking turned off.
    """

    def __init__(self, source: DataSource) -> None:
        self._source = source
        self.skipped = self.empty = self.unthought = 0
        self.first: list[str] = []

    def add(self, fault: Unusable) -> None:
        """Count a row that cannot be used; ValueError where the source may skip no more of them."""
        self.skipped += 1
        if len(self.first) < SHOWN:
            self.first.append(str(fault))
        limit = self._source.max_skipped
        if self.skipped > limit:
            more = f"; it is one more than max_skipped={limit}, and the first was: {self.first[0]}" if limit else ""
            raise ValueError(f"{fault}{more}") from fault


def iter_documents(
    source: DataSource, *, fetch: Fetch, directory: Path, tally: Tally | None = None
) -> Iterator[Document]:
    """The documents of a source, in a fixed order; rows with empty content are passed over.

    `directory` takes what has to be fetched, and the lock files of `datasets`; it can go when the iterator ends.
    ValueError names the file, the row and the remedy. `tally` counts the rows that cannot be used, and raises where
    there are too many.
    """
    tally = tally or Tally(source)
    for where, row in iter_rows(source, fetch=fetch, directory=directory):
        try:
            content = _content(row, source, where)
        except Unusable as fault:
            tally.add(fault)
            continue
        if content == "" or (isinstance(content, Chat) and not content.messages):
            tally.empty += 1
        else:
            yield Document(content, where)


def iter_rows(source: DataSource, *, fetch: Fetch, directory: Path) -> Iterator[tuple[str, Row | str]]:
    """Where each row of a source stands, and the row, or the line of JSON that it is. A text file is one row."""
    cache_dir = str(directory / "cache")
    if source.path.startswith(HUB):
        return _hub_rows(source, cache_dir)
    return _file_rows(source, source_files(source, fetch=fetch, directory=directory), cache_dir)


def parse_row(row: Row | str, where: str) -> tuple[Row, bool]:
    """A row's fields, and whether they come from columns, which lend every struct the keys of all others."""
    return (_parse(row, where), False) if isinstance(row, str) else (row, True)


# --- files ---


def source_files(source: DataSource, *, fetch: Fetch, directory: Path) -> dict[str, Path]:
    """The local files of a source that is not on the Hub, in order, by the names that users know them by."""
    if source.path == STDLIB:
        return {str(file): file for file in _stdlib_files()}
    if not source.path.startswith("s3://"):
        return {str(file): file for file in _local_files(source, Path(source.path).expanduser())}
    root = fetch(source.path, directory / "fetched")
    if root.is_file():
        return {source.path: root}
    prefix = source.path.rstrip("/")
    return {f"{prefix}/{file.relative_to(root).as_posix()}": file for file in _local_files(source, root)}


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
        wanted = SUFFIXES if source.format == "auto" else (source.format,)
        below = (file for file in path.rglob("*") if not any(p.startswith(".") for p in file.relative_to(path).parts))
        files = sorted(file for file in below if _format_of(file) in wanted and file.is_file())
        known = ", ".join(suffix for name in wanted for suffix in SUFFIXES[name])
        problem = f"the directory holds no data file ({known})"
    else:
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if os.path.isfile(found))
        problem = "no file matches" if glob.has_magic(str(path)) else "no such file or directory"
    if not files:
        raise ValueError(f"{source.path}: {problem}; correct the path in data.sources")
    return _fetched(files)


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


def _format_of(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return next((name for name, suffixes in SUFFIXES.items() if suffix.lower() in suffixes), None)


# --- rows ---


def _file_rows(source: DataSource, files: dict[str, Path], cache_dir: str) -> Iterator[tuple[str, Row | str]]:
    formats = {_format_of(file) for file in files.values()} if source.format == "auto" else {source.format}
    if len(formats) > 1 or None in formats:
        found = ", ".join(sorted({file.suffix or file.name for file in files.values()}))
        raise ValueError(f"{source.path}: cannot tell one format by the names ({found}); set format or name one kind")
    # The loaders log as errors, on lines of their own, what is raised here as one line.
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    text_reader = partial(IterableDataset.from_text, encoding="utf-8-sig", cache_dir=cache_dir)
    match formats.pop():
        case "text":
            # One reader for all of them: opening a reader takes longer than reading a small file.
            rows = iter(text_reader([_literal(file) for file in files.values()], sample_by="document"))
            for name in files:
                with _naming(name):
                    text = next(rows)["text"]
                yield name, {source.field: text}
        case "jsonl":
            # Line by line, because the JSON reader holds every row to the columns and types of the first ones.
            for name, file in files.items():
                for number, line in _numbered(name, file, partial(text_reader, sample_by="line")):
                    if line["text"].strip():
                        yield f"{name} line {number}", str(line["text"])
        case _:
            reader = partial(IterableDataset.from_parquet, batch_size=ROWS_PER_READ, cache_dir=cache_dir)
            for name, file in files.items():
                for number, row in _numbered(name, file, reader):
                    yield f"{name} row {number}", row


def _numbered(name: str, file: Path, reader: Callable[[str], IterableDataset]) -> Iterator[tuple[int, Row]]:
    """The rows of one file, from 1."""
    with _naming(name):
        if not file.stat().st_size:
            raise ValueError("the file is empty")
        rows = iter(reader(_literal(file)))
    for number in count(1):
        with _naming(name):
            row = next(rows, None)
        if row is None:
            return
        yield number, row


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


def _literal(file: Path) -> str:
    """A path that `datasets`, which takes every path for a glob, finds whatever characters are in it."""
    return glob.escape(str(file.absolute()))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Names the file in whatever is wrong with its content; a fault of the disk, which has a number, stays itself."""
    try:
        yield
    except Exception as error:
        if is_transient(error) or isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{name}: {first_line(error)}; mend or remove it") from error


def _hub_rows(source: DataSource, cache_dir: str) -> Iterator[tuple[str, Row | str]]:
    """The rows of `hf://[datasets/]org/name[/config][@revision]`, streamed."""
    hub = parse_dataset(source.path)
    try:
        rows = load_dataset(
            hub.repository,
            hub.config,
            split=source.split,
            revision=hub.revision,
            streaming=True,
            cache_dir=cache_dir,
        )
    except ValueError as error:
        if is_transient(error):
            raise
        raise ValueError(f"{source.path}: {first_line(error)}; correct it in data.sources") from error
    for number, row in enumerate(rows, 1):
        yield f"{source.path} row {number}", row


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


def first_line(error: Exception) -> str:
    """The first line of an error's message, for libraries that write paragraphs."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
