"""Laws of staged directories: whole or not at all, and what is left over is found."""

import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from objects import contents, make

from tasks.artifacts.staging import beside, left_overs, scratch, staged

LATER = datetime.now(UTC) + timedelta(days=8)


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    with staged(tmp_path / "out", "a") as work:
        make(work, {"x": b"1"})
        assert not (tmp_path / "out").exists()
    assert contents(tmp_path) == {"out/x": b"1"}


def test_what_a_failed_attempt_made_is_there_for_the_next_of_the_same_identity_only(tmp_path: Path) -> None:
    for identity, there in (("a", {}), ("a", {"x": b"1"}), ("b", {})):
        with pytest.raises(RuntimeError), staged(tmp_path / "out", identity) as work:
            assert contents(work) == there
            assert beside(work).exists() == bool(there)
            make(work, {"x": b"1"})
            make(beside(work), {"y": b"2"})
            raise RuntimeError
    assert not (tmp_path / "out").exists()


def test_a_directory_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    make(tmp_path / "out", {"old": b"0"})
    with staged(tmp_path / "out", "a") as work:
        make(work, {"new": b"1"})
        make(beside(work), {"y": b"2"})
        assert contents(tmp_path / "out") == {"old": b"0"}
    assert contents(tmp_path) == {"out/new": b"1"}


def test_left_overs_are_unfinished_old_and_held_by_nobody(tmp_path: Path) -> None:
    make(tmp_path, {".killed.partial/deep/x": b"1", "finished/x": b"1", ".file.partial": b"1", "x.partial/y": b"1"})
    (tmp_path / ".link.partial").symlink_to(tmp_path / "finished")
    assert left_overs(tmp_path, LATER) == [tmp_path / ".killed.partial"]
    assert left_overs(tmp_path, datetime.now(UTC) - timedelta(days=1)) == []
    with staged(tmp_path / "out", "a"), scratch(tmp_path, "room"):
        assert left_overs(tmp_path, LATER) == [tmp_path / ".killed.partial"]


def test_a_young_file_deep_inside_keeps_a_left_over(tmp_path: Path) -> None:
    make(tmp_path / ".killed.partial", {"deep/x": b"1"})
    for path in (tmp_path / ".killed.partial", tmp_path / ".killed.partial/deep"):
        os.utime(path, (0, 0))
    assert left_overs(tmp_path, datetime.now(UTC) - timedelta(days=1)) == []
    os.utime(tmp_path / ".killed.partial/deep/x", (0, 0))
    assert left_overs(tmp_path, datetime.now(UTC) - timedelta(days=1)) == [tmp_path / ".killed.partial"]


HOLD = """
import sys, time
from pathlib import Path
from tasks.artifacts.staging import scratch
with scratch(Path(sys.argv[1]), "room"):
    time.sleep(600)
"""


def test_a_scratch_directory_goes_at_the_end_or_is_left_for_gc_by_a_killed_process(tmp_path: Path) -> None:
    with scratch(tmp_path, "room") as room:
        make(room, {"x": b"1"})
    assert not list(tmp_path.iterdir())
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert left_overs(tmp_path, LATER) == list(tmp_path.glob(".room-*.partial")) != []
