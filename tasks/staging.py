"""Directories that appear whole or not at all: filled beside their place, then renamed."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tasks.manifest import FileRecord
from tasks.settings import ServiceError


@contextmanager
def staged(final: Path, identity: str) -> Iterator[Path]:
    """Yield a directory to fill, which becomes `final` when the block succeeds; one process at a time.

    When the block fails the directory stays, so that the next attempt with the same `identity` (a name for the content
    being made) finds what is already there. Leftovers of another identity are removed.
    """
    final = final.absolute()
    holder = final.parent / f".{final.name}.partial"
    holder.mkdir(parents=True, exist_ok=True)
    lock = os.open(holder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(f"{final} is being filled by another process; wait for it", transient=True) from None
        work = holder / identity
        for other in holder.iterdir():
            if other != work:
                shutil.rmtree(other)
        work.mkdir(exist_ok=True)
        yield work
        os.rename(work, final)
        holder.rmdir()
        _sync_directory(final.parent)
    finally:
        os.close(lock)


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
    if directory.is_dir() and not directory.is_symlink():
        return any(directory.iterdir())
    return os.path.lexists(directory)


def holds_exactly(directory: Path, files: Sequence[FileRecord]) -> bool:
    """Whether a directory holds these files, byte for byte, and no others."""
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
    return found.keys() == {file.path for file in files} and all(
        not found[file.path].is_symlink()
        and found[file.path].stat().st_size == file.size
        and sha256_of(found[file.path]) == file.sha256
        for file in files
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
