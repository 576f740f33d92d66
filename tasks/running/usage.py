"""What runs use of the state directory, and what of it nobody needs any more.

Each run keeps a list, `runs/TIME-xxxx.jsonl`, of the steps that it began, of the results that it took or made and of
their directories, and holds the lock beside it while it goes on. These runs' results are needed: those in progress, of
each family the last run that came to its end and all that began after it, and those whose registration is a candidate
or a champion. A run that is in progress, or that was interrupted and may be started again, has begun directories that
are on no list yet: whatever was used since it began is needed too. Everything else in the workspace is superseded.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_core.files.locks import held, is_held
from tasks.artifacts.staging import last_written, size_of
from tasks.records import Release, StageRecord
from tasks.running.digests import WORKSPACE, below_workspace, recorded
from tasks.running.workspace import store_list

RUNS = "runs"
RESULTS = Path("prefect", "storage")  # where Prefect keeps results, unless told otherwise

# The list of the run that this is part of.
_list: ContextVar[Path | None] = ContextVar("list of what the run uses", default=None)


@contextmanager
def noting(home: Path, family: str = "") -> Iterator[None]:
    """Keep a list of what the steps of the block use; it ends with a line that says so where the block ends well."""
    file = home / RUNS / f"{time.time_ns()}-{secrets.token_hex(4)}.jsonl"
    with held(_lock(file)):
        began = _list.set(file)
        try:
            _add({"family": family, "began": time.time()})
            yield
            _add({"finished": True})
        finally:
            _list.reset(began)


def note(key: str, record: Any) -> None:
    """Add a step's result to the list of this run, if it keeps one, and mark its directories as used now."""
    if _list.get() is None:
        return
    paths = {Path(made.family.path if isinstance(made, StageRecord) else made.path) for made in recorded(record)}
    line: dict[str, Any] = {"key": key}
    if isinstance(record, Release):
        line["registration"] = record.registration
        paths.add(Path(record.report).parent)
    for path in paths:
        with suppress(OSError):  # it may be the user's own, and not ours to mark
            os.utime(path)
    _add({**line, "paths": sorted(map(str, paths))})


def note_begun(key: str) -> None:
    """Add to the list of this run, if it keeps one, a step that it does now, for days maybe."""
    if _list.get() is not None:
        _add({"key": key})


def _add(line: dict[str, Any]) -> None:
    file = _list.get()
    assert file is not None
    with file.open("a") as opened:
        opened.write(json.dumps(line) + "\n")
    store_list(file)


def _lock(file: Path) -> Path:
    return file.with_suffix(".lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one run used: keys of results, and paths; `open` where it goes on, or ended before its end."""

    file: Path
    family: str
    began: float
    keys: frozenset[str]
    paths: frozenset[Path]
    registrations: frozenset[str]
    finished: bool
    running: bool

    @property
    def open(self) -> bool:
        return self.running or not self.finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Superseded:
    """What nobody needs of the state directory: entries of the workspace, results of steps, lists of what runs used."""

    entries: tuple[Path, ...]
    results: tuple[Path, ...]
    lists: tuple[Path, ...]


def uses(home: Path) -> list[Use]:
    """What the runs of this state directory used, the oldest first."""
    found = (_read(file) for file in sorted((home / RUNS).glob("*.jsonl")))
    return [use for use in found if use is not None]


def _read(file: Path) -> Use | None:
    return parse_use(file, file.read_text(), running=is_held(_lock(file)))


def parse_use(file: Path, text: str, *, running: bool) -> Use | None:
    """What a run used by the text of its list `file`; None where that says nothing."""
    lines = []
    for line in text.splitlines():
        with suppress(ValueError):  # one that a kill tore
            lines.append(json.loads(line))
    if not lines or "began" not in lines[0]:
        return None
    return Use(
        file=file,
        family=lines[0]["family"],
        began=lines[0]["began"],
        keys=frozenset(line["key"] for line in lines if "key" in line),
        paths=frozenset(Path(path) for line in lines for path in line.get("paths", ())),
        registrations=frozenset(line["registration"] for line in lines if "registration" in line),
        finished="finished" in lines[-1],
        running=running,
    )


def needed(found: list[Use], aliased: Collection[str]) -> list[Use]:
    """The runs whose results are needed; `aliased` are the registrations of candidates and champions."""
    ended = {use.family: use.began for use in found if use.finished}

    def is_latest(use: Use) -> bool:
        """Whether its family's last whole run, or one since, which may be started again."""
        return bool(use.family) and use.began >= ended.get(use.family, -math.inf)

    return [use for use in found if use.running or is_latest(use) or use.registrations & set(aliased)]


def superseded(home: Path, aliased: Collection[str], before: float, max_bytes: int | None = None) -> Superseded:
    """What is not needed and was last used before a time (seconds since 1970).

    Where the workspace has more than `max_bytes`, also of what is not needed the least recently used, up to there.
    Nothing where no run has left a list: then what is needed is not known.
    """
    found = uses(home)
    if not found:
        return Superseded(entries=(), results=(), lists=())
    kept = needed(found, aliased)
    used_since = min((use.began for use in kept if use.open), default=float("inf"))
    mine = _entries(home, kept)
    entries = [path for path in (home / WORKSPACE).glob("*") if not path.name.startswith(".")]
    free = {path: last_written(path) for path in entries if path.name not in mine}
    free = {path: used for path, used in sorted(free.items(), key=lambda item: item[1]) if used < used_since}
    going = {path for path, used in free.items() if used < before}
    if max_bytes is not None:
        left = sum(map(size_of, entries)) - sum(map(size_of, going))
        for path in free:
            if left > max_bytes and path not in going:
                going.add(path)
                left -= size_of(path)
    keys = {key for use in kept for key in use.keys}
    results = (path for path in (home / RESULTS).glob("*") if path.is_file() and path.name not in keys)
    return Superseded(
        entries=tuple(path for path in free if path in going),
        results=tuple(sorted(path for path in results if path.stat().st_mtime < min(before, used_since))),
        lists=tuple(use.file for use in found if use not in kept and use.began < before),
    )


def written_by_open_runs(home: Path, family: str) -> int:
    """Bytes in the workspace of a family's runs that have not come to their end, which another run would go on with.

    They are what the runs list, and what was written since the first of them began and no other family lists.
    """
    known = uses(home)
    found = [use for use in needed(known, ()) if use.family == family and use.open]
    if not found:
        return 0
    began, listed = min(use.began for use in found), _entries(home, found)
    others = _entries(home, [use for use in known if use.family != family]) - listed
    entries = [path for path in (home / WORKSPACE).glob("*") if path.name in listed or last_written(path) >= began]
    return sum(size_of(path) for path in entries if path.name not in others)


def _entries(home: Path, found: Iterable[Use]) -> set[str]:
    """The names of the workspace's entries that runs list."""
    below = (below_workspace(path) for use in found for path in use.paths)
    return {path.parts[0] for path in below if path is not None and path.parts}
