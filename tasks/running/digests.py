"""Artifacts and their digests: hashed when a step has written them, and compared before they are used.

Before a step uses a file, this holds: it is the file that was hashed against its record. Since then neither its size
nor its inode nor its times have changed, and every write changes one of these. Only files that have changed are hashed
again, so that a second look at a checkpoint of 24 GB costs nothing. A disk that loses bits of a file that nobody writes
is caught when the family is published: every byte is hashed as it is sent.
"""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from tasks.artifacts.manifest import directory_digest
from tasks.records import Artifact, StageRecord
from tasks.settings import home_directory

# A file that was written so shortly before it was hashed may be written again with no change of its times.
SETTLED_NS = 2 * 10**9
WORKSPACE = "workspace"  # of a state directory: what steps make
HASHERS = 4  # files at once; hashing one takes a core

# How a file was when it was hashed, and its SHA-256: size, inode, times of the last write and of any last change in ns.
Known = tuple[int, int, int, int, str]


def artifact(directory: Path, paths: list[Path] | None = None) -> Artifact:
    """A finished directory as an artifact, with the SHA-256 of each file, and the digest over names and bytes.

    Of a directory of the user's own, `paths` are the files that belong to it.
    """
    files = _digests(directory, paths)
    return Artifact(path=str(directory), digest=directory_digest(files.items()), files=files)


def file_digest(path: Path) -> str:
    """A file's SHA-256; where the file is as it was when it was hashed last, without reading it."""
    (digest,) = _digests(path.parent, [path]).values()
    return digest


def damage(record: Artifact | StageRecord) -> str:
    """What of a record's files is not as it was recorded, in one line; "" where everything is."""
    if isinstance(record, StageRecord):
        return damage(record.family) or difference(Path(record.metrics), record.metrics_sha256)
    directory = Path(record.path)
    try:
        paths = None
        if is_of_the_user(record):  # what else lies there is not the artifact's
            paths = [path for name in record.files if (path := directory / name).is_file()]
        found = _digests(directory, paths) if directory.is_dir() else None
    except FileNotFoundError:  # another run set it aside meanwhile
        found = None
    if found is None:
        return f"{directory} is gone"
    for name in sorted(record.files.keys() | found.keys()):
        if name not in found:
            return f"{directory / name} is gone"
        if name not in record.files:
            return f"{directory / name} was not there when {directory.name} was recorded"
        if spoiled := _difference(directory / name, found[name], record.files[name]):
            return spoiled
    return ""


def difference(path: Path, recorded: str) -> str:
    """What is wrong with a file whose SHA-256 is on record, in one line; "" where nothing is."""
    return _difference(path, file_digest(path), recorded) if path.is_file() else f"{path} is gone"


def _difference(path: Path, found: str, recorded: str) -> str:
    return "" if found == recorded else f"{path} is damaged: its SHA-256 is {found[:12]}, and {recorded[:12]} on record"


def recorded(value: Any) -> Iterator[Artifact | StageRecord]:
    """The artifacts in a value: those of its fields, entries and items."""
    if isinstance(value, Artifact | StageRecord):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from recorded(getattr(value, field.name))
    elif isinstance(value, Mapping):
        yield from recorded(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from recorded(entry)


def can_be_made(record: Artifact | StageRecord) -> bool:
    """Whether a step can make it again where it is damaged: not the user's directory, nor a whole stage's metrics."""
    if isinstance(record, StageRecord):
        return bool(damage(record.family))
    return not is_of_the_user(record)


def is_of_the_user(record: Artifact | StageRecord) -> bool:
    """Whether an artifact is a directory that no step made, such as a teacher of the user's own."""
    if isinstance(record, StageRecord) or not (directory := Path(record.path)).is_dir():
        return False
    places = ((home_directory() / name).resolve() for name in (WORKSPACE, "cache"))
    return not any(directory.resolve().is_relative_to(place) for place in places)


def below_workspace(path: Path) -> Path | None:
    """A path below the workspace of a state directory, wherever that was when the path was noted; None for others."""
    parts = path.parts[::-1]
    return Path(*parts[: parts.index(WORKSPACE)][::-1]) if WORKSPACE in parts else None


def relocated(path: str) -> str:
    """Where a noted file or directory is, should the state directory have been moved since, or have another name."""
    if (below := below_workspace(Path(path))) is None or Path(path).exists():
        return path
    here = home_directory() / WORKSPACE / below
    return str(here) if here.exists() else path


def remedy(record: Artifact | StageRecord) -> str:
    """What to do about a record whose files differ from it."""
    if can_be_made(record):
        return "run again, it is made again"
    if isinstance(record, StageRecord):
        return f"put it back, or remove {Path(record.metrics).parent} and run again to train the stage anew"
    return "put it back, or touch a file of it and run again to take it as it is"


def set_aside(record: Artifact | StageRecord) -> None:
    """Leave a damaged artifact's place free for a new one; its files stay beside it, for whoever needs them."""
    directory = Path(record.family.path if isinstance(record, StageRecord) else record.path)
    with suppress(FileNotFoundError):  # it is gone already
        directory.rename(directory.with_name(f"{directory.name}.damaged-{secrets.token_hex(4)}"))


def forget(directory: Path) -> None:
    """Have a directory's files hashed again at the next look, whatever is known of them."""
    _notes(directory).unlink(missing_ok=True)


def _digests(directory: Path, paths: list[Path] | None = None) -> dict[str, str]:
    """The SHA-256 of files (of all in a directory), by name below it, in order; those not yet known are hashed."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file()) if paths is None else paths
    known, now = _load(directory), time.time_ns()
    stamps = {path.relative_to(directory).as_posix(): _stamp(path) for path in paths}
    unknown = [name for name, stamp in stamps.items() if known.get(name, ())[:4] != stamp]
    with ThreadPoolExecutor(HASHERS) as pool:
        hashed = dict(zip(unknown, pool.map(_sha256, [directory / name for name in unknown]), strict=True))
    settled = {
        name: (*stamps[name], digest) for name, digest in hashed.items() if max(stamps[name][2:]) < now - SETTLED_NS
    }
    if settled:
        _save(directory, {**known, **settled})
    return {name: hashed[name] if name in hashed else known[name][4] for name in stamps}


def _stamp(path: Path) -> tuple[int, int, int, int]:
    status = path.stat()
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _notes(directory: Path) -> Path:
    name = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:32]
    return home_directory() / "hashed" / f"{name}.json"


def _load(directory: Path) -> dict[str, Known]:
    """What is known of a directory's files. Notes that cannot be read are none: then files are hashed again."""
    try:
        notes = json.loads(_notes(directory).read_text())
        return {name: tuple(known) for name, known in notes["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _save(directory: Path, known: Mapping[str, Known]) -> None:
    """Keep notes of a directory's files in the state directory, where there is one."""
    notes = _notes(directory)
    if not home_directory().is_dir():
        return
    notes.parent.mkdir(exist_ok=True)
    part = notes.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
    part.write_text(json.dumps({"directory": str(directory), "files": known}, indent=1))
    part.replace(notes)
