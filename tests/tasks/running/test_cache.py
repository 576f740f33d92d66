"""Laws of what was brought here: within its bound what was used last stays, and what is used now in any case."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from objects import make

from tasks.running import cache
from tasks.settings import HOME

KIB = 1 << 10


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME, str(tmp_path))
    return tmp_path


def brought(name: str, used: float) -> Path:
    """A directory of 1 KiB, used last at a time."""
    directory = make(cache.place_of(name), {"model.safetensors": bytes(KIB)})
    os.utime(directory, (used, used))
    return directory


def test_what_was_used_longest_ago_goes_first_and_no_more_than_has_to() -> None:
    last, first, second = (brought(name, used) for name, used in (("c", 3.0), ("a", 1.0), ("b", 2.0)))
    cache.make_room(0, 3 * KIB)
    assert first.exists() and second.exists() and last.exists()
    cache.make_room(KIB, 3 * KIB)
    assert not first.exists() and second.exists() and last.exists()
    with cache.in_use(second):
        pass
    cache.make_room(2 * KIB, 3 * KIB)
    assert second.exists() and not last.exists(), "use makes it the last that was used"
    assert not [*second.parent.glob(".*.partial")]


def test_what_is_used_stays_beyond_the_bound_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    used, free = brought("used", 1.0), brought("free", 2.0)
    with cache.in_use(used):
        cache.make_room(KIB, KIB)
        assert used.exists() and not free.exists()
        assert not cache.remove(used) and cache.unused(cache.CACHE, before=1e18) == []
    assert "more than ELASTIC_CACHE_SIZE=1 KiB" in caplog.text
    assert cache.remove(used) and not used.exists()


KILLED = """
import os, sys
from tasks.running import cache
with cache.in_use(cache.place_of("used")):
    print(flush=True)
    sys.stdin.readline()
"""


def test_a_user_that_was_killed_keeps_nothing() -> None:
    used = brought("used", 1.0)
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        cache.make_room(0, 0)
        assert used.exists()
        process.kill()
    cache.make_room(0, 0)
    assert not used.exists()
