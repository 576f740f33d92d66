"""What was brought here and can be brought again: what other hosts made, and the checkpoints of `elastic serve`.

What other hosts made is a directory for each artifact by its digest, all of them within a bound: what was used longest
ago goes first. What is in use never goes: who uses a directory holds a lock of its own for as long.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from elastic_core.budget import bytes_text
from elastic_core.files.locks import held, is_held
from tasks.artifacts.staging import size_of
from tasks.settings import CACHE_SIZE, home_directory

CACHE, SERVED, USES = "cache", "served", ".uses"
SIDE = "-side"  # ends the name of what has an artifact's small files alone

logger = logging.getLogger(__name__)


def place_of(digest: str) -> Path:
    """Where an artifact with this digest lies, or would."""
    return home_directory() / CACHE / digest[:32]


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Keep a directory from going, whether it is there already or is about to be filled."""
    mark = directory.parent / USES / f"{directory.name}-{secrets.token_hex(4)}"
    with ExitStack() as use:
        with _one_at_a_time(directory.parent):
            use.callback(mark.unlink, missing_ok=True)
            use.enter_context(held(mark))
        _note_use(directory)
        use.callback(_note_use, directory)  # a use may take weeks, and its age counts from its end
        yield


def _note_use(directory: Path) -> None:
    with suppress(FileNotFoundError):
        os.utime(directory)


@contextmanager
def one_fetch(directory: Path) -> Iterator[None]:
    """Let one process of this host at a time bring what belongs into a directory."""
    lock = directory.parent / USES / f".{directory.name}.fetch"
    with held(lock, waits=f"waiting for {directory}, which another process fills"):
        yield


def make_room(need: int, bound: int) -> None:
    """Let what was used longest ago go until the cache and `need` more bytes are within `bound` and fit on the disk."""
    cache = home_directory() / CACHE
    cache.mkdir(parents=True, exist_ok=True)
    going = []
    with _one_at_a_time(cache):
        sizes = {path: size_of(path) for path in cache.iterdir() if path.name != USES}
        total, free = sum(sizes.values()), shutil.disk_usage(cache).free
        for path in sorted(sizes, key=_last_used):
            if total + need <= bound and need <= free:
                break
            if path.name.startswith(".") or path.name.endswith(SIDE) or _is_used(path):
                continue
            going.append(_set_aside(path))
            total, free = total - sizes[path], free + sizes[path]
    for gone in going:
        shutil.rmtree(gone, ignore_errors=True)  # `elastic gc` finds what is left
    if going:
        logger.info("%d that were used longest ago left the cache of what other hosts made", len(going))
    if total + need > bound:
        logger.warning(
            "running steps use %s of what other hosts made: more than %s=%s, until they end",
            bytes_text(total + need),
            CACHE_SIZE,
            bytes_text(bound),
        )


def unused(holder: str, before: float) -> list[Path]:
    """What of CACHE or SERVED nobody uses, and nobody has used since a time, in seconds since 1970."""
    found = (path for path in (home_directory() / holder).glob("[!.]*") if path.stat().st_mtime < before)
    return sorted(path for path in found if not _is_used(path))


def remove(directory: Path) -> bool:
    """Remove a directory that was brought here, unless it is used; whether it went."""
    with _one_at_a_time(directory.parent):
        if _is_used(directory) or not directory.exists():
            return False
        gone = _set_aside(directory)
    shutil.rmtree(gone)
    return True


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # it has gone since it was listed
        return 0.0


def _set_aside(directory: Path) -> Path:
    """Give a directory a name that nobody looks for, and under which the next `elastic gc` finds it."""
    gone = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}.partial")
    directory.rename(gone)
    return gone


def _is_used(directory: Path) -> bool:
    used = False
    for mark in (directory.parent / USES).glob(f"{directory.name}-*"):
        if is_held(mark):
            used = True
        else:
            mark.unlink(missing_ok=True)  # of a process that was killed
    return used


@contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    with held(cache / USES / ".lock", waits=f"waiting for {cache}, where another process makes room"):
        yield
