"""Directories that appear whole or not at all: filled beside their place, then renamed."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from elastic_core.files.locks import IsHeld, held_while_filled, is_held, lock_beside
from tasks.artifacts.manifest import FileRecord
from tasks.settings import ServiceError


@contextmanager
def staged(final: Path, identity: str) -> Iterator[Path]:
    """Yield a directory to fill, which takes the place of `final` when the block succeeds; one process at a time.

    When the block fails the directory stays, so that the next attempt with the same `identity` (a name for the content
    being made) finds what is already there, in it and in `beside` it. Leftovers of another identity are removed. Where
    something is at `final` already it is replaced: the caller has made sure that it may be.
    """
    final = final.absolute()
    holder = final.parent / f".{final.name}.partial"
    with _filling(holder, final):
        holder.mkdir(exist_ok=True)
        if holder.is_symlink():
            raise ServiceError(f"{holder} is a symbolic link; remove it")
        work = holder / identity
        for other in holder.iterdir():
            if other not in (work, beside(work)):
                shutil.rmtree(other)
        work.mkdir(exist_ok=True)
        yield work
        if occupied(final):
            os.rename(final, holder / "replaced")
        os.rename(work, final)
        shutil.rmtree(holder)
        _sync_directory(final.parent)


@contextmanager
def _filling(holder: Path, final: Path) -> Iterator[None]:
    try:
        with held_while_filled(holder):
            yield
    except IsHeld:
        raise ServiceError(f"{final} is being filled by another process; wait for it", transient=True) from None


def beside(work: Path) -> Path:
    """A second directory for what is only needed to fill a staged one; it goes when that is whole."""
    return work.with_name(f"{work.name}.aside")


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """Yield a directory below `parent` that goes at the end; if the process is killed, `elastic gc` finds it."""
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", suffix=".partial", dir=parent) as made:
        directory = Path(made)
        with held_while_filled(directory):
            yield directory


def left_overs(directory: Path, before: datetime) -> list[Path]:
    """The unfinished directories in `directory` that nobody holds, and in which nothing was written since `before`."""
    found = (path for path in directory.glob(".*.partial") if _is_directory(path))
    return sorted(path for path in found if last_written(path) < before.timestamp() and not is_held(lock_beside(path)))


def last_written(directory: Path) -> float:
    """When a file, or anything in a directory, was last written, in seconds since 1970."""
    newest = directory.lstat().st_mtime
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):
            newest = max(newest, path.lstat().st_mtime)
    return newest


def size_of(path: Path) -> int:
    """The bytes of a file, or of all below a directory; what goes meanwhile counts nothing."""
    if not path.is_dir():
        with suppress(FileNotFoundError):
            return path.lstat().st_size
        return 0
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.lstat(os.path.join(folder, name)).st_size
    return size


def remove_left_over(directory: Path) -> None:
    """Remove an unfinished directory, and the file that was its lock."""
    shutil.rmtree(directory)
    lock_beside(directory).unlink(missing_ok=True)


def inside(root: Path, relative: str) -> Path:
    """Where `relative` lies below `root`, its directories made; a ServiceError where one of them is a symbolic link."""
    path = root
    for component in relative.split("/")[:-1]:
        path = path / component
        path.mkdir(exist_ok=True)
        if path.is_symlink():
            raise ServiceError(f"{path} is a symbolic link and could lead out of {root}; remove it")
    return path / relative.rpartition("/")[2]


def occupied(directory: Path) -> bool:
    """Whether something is there that a new directory would have to replace."""
    if _is_directory(directory):
        return any(directory.iterdir())
    return os.path.lexists(directory)


def holds_exactly(directory: Path, files: Sequence[FileRecord]) -> bool:
    """Whether a directory holds these files, byte for byte, and no others."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not _is_directory(path)}
    return found.keys() == {file.path for file in files} and all(
        not found[file.path].is_symlink()
        and found[file.path].stat().st_size == file.size
        and sha256_of(found[file.path]) == file.sha256
        for file in sorted(files, key=lambda file: file.size)
    )


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
