"""Directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_core.files.locks import IsHeld, held_while_filled
from elastic_core.files.shards import CheckpointError


@contextmanager
def staged_directory(directory: Path) -> Iterator[Path]:
    """A new directory to fill, which becomes `directory` at the end of the block, whole and on the disk, or never.

    It is `.NAME.partial` beside `directory` until then: removed when the block fails, and taken over by the next
    attempt when this process is killed. Raises CheckpointError when `directory` holds files already, or when another
    process is writing it.
    """
    directory = directory.absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists already; remove it or choose another directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.with_name(f".{directory.name}.partial")
    try:
        with held_while_filled(staging):
            yield from _filled(staging, directory)
    except IsHeld:
        raise CheckpointError(f"{directory}: is being written by another process; wait for it to end") from None


def _filled(staging: Path, directory: Path) -> Iterator[Path]:
    if staging.is_symlink():
        raise CheckpointError(f"{staging}: is a link; remove it")
    staging.mkdir(exist_ok=True)
    try:
        for left_over in staging.iterdir():
            if left_over.is_dir():
                shutil.rmtree(left_over)
            else:
                left_over.unlink()
        yield staging
        for path in staging.rglob("*"):
            sync(path)
        sync(staging)
        staging.rename(directory)
    except BaseException:
        shutil.rmtree(staging)
        raise
    sync(directory.parent)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
