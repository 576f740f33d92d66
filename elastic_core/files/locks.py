"""Locks on files: one process at a time, on this host or on any other that shares the file system."""

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 600.0  # that say what is waited for
# Lustre without -o flock, some FUSE file systems, NFS whose lock service is off.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

logger = logging.getLogger(__name__)

_told: set[Path] = set()  # directories on file systems without locks


class IsHeld(RuntimeError):
    """Another process has the lock."""


@contextmanager
def held(file: Path, *, patience: float = 0.0, waits: str | None = None) -> Iterator[None]:
    """Hold the lock of `file`, which stays in its place; the end of the process frees it, however it ends.

    A lock that another process has for longer than `patience` seconds is IsHeld; with `waits`, a line of log, it is
    waited for without end. Where a file system has no locks, the existence of a file beside `file` is the lock; that of
    a host that died stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = _acquired(file, patience, waits)
    try:
        yield
    finally:
        lock.release()


def is_held(file: Path) -> bool:
    """Whether a process has the lock of `file`."""
    if not file.exists():
        return False
    try:
        with held(file):
            return False
    except IsHeld:
        return True


def _acquired(file: Path, patience: float, waits: str | None) -> BaseFileLock:
    # Neither shared between threads nor re-entrant: a lock that its own process has is held.
    lock: BaseFileLock = FileLock(file, thread_local=False, fallback_to_soft=False)
    try:
        _acquire(lock, patience, waits)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        marker = file.with_name(f"{file.name}.held")
        if file.parent not in _told:
            logger.warning(
                "%s: this file system has no locks (%s), so files such as %s are its locks; remove one whose host died",
                file.parent,
                error.strerror,
                marker.name,
            )
        _told.add(file.parent)
        lock = SoftFileLock(marker, thread_local=False)
        _acquire(lock, patience, waits)
    return lock


def _acquire(lock: BaseFileLock, patience: float, waits: str | None) -> None:
    try:
        lock.acquire(timeout=patience, poll_interval=min(POLL_SECONDS, patience / 2) or POLL_SECONDS)
    except Timeout as error:
        if waits is None:
            raise IsHeld(f"{lock.lock_file} is held by another process") from error
        logger.info("%s", waits)
        since = time.strftime("%H:%M")
        while True:
            with suppress(Timeout):
                lock.acquire(timeout=SECONDS_BETWEEN_LINES, poll_interval=POLL_SECONDS)
                return
            logger.info("%s, since %s", waits, since)


def lock_beside(directory: Path) -> Path:
    """The lock file of an unfinished directory `.NAME.partial`, which is renamed at its end: `.NAME.lock`."""
    return directory.with_suffix(".lock")


@contextmanager
def held_while_filled(directory: Path) -> Iterator[None]:
    """Hold an unfinished directory against other processes; its lock file goes with the lock. Raises IsHeld."""
    lock = lock_beside(directory)
    with held(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
