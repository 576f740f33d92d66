"""Laws of locks: one process has one, its end frees it, and a file system without locks is told of."""

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elastic_core.files.locks import IsHeld, held, is_held

# Holds the lock, with a forked child that lives on, and tells when.
HOLD = """
import os, sys, time
from pathlib import Path
from elastic_core.files.locks import held
born, bears = os.pipe()
with held(Path(sys.argv[1])):
    if os.fork() == 0:
        os.close(1)
        os.write(bears, b"!")
        time.sleep(20)
        os._exit(0)
    os.read(born, 1)
    print("held", flush=True)
    time.sleep(600)
"""


def holder(file: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_lock_is_of_one_process_and_its_death_frees_it_though_a_forked_child_lives_on(tmp_path: Path) -> None:
    file = tmp_path / "locks/one"
    with holder(file) as process:
        assert is_held(file)
        with pytest.raises(IsHeld), held(file):
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with held(file):
            assert is_held(file)
    assert not is_held(file)


def test_who_waits_for_long_says_again_for_what_and_since_when(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("elastic_core.files.locks.SECONDS_BETWEEN_LINES", 0.01)
    file = tmp_path / "one"

    def second() -> None:
        with held(file, waits="waiting for the first"):
            pass

    thread = threading.Thread(target=second)
    with held(file):
        thread.start()
        while len(caplog.messages) < 3:
            time.sleep(0.01)
    thread.join()
    assert caplog.messages[0] == "waiting for the first"
    assert all(re.fullmatch(r"waiting for the first, since \d\d:\d\d", line) for line in caplog.messages[1:])


def test_who_waits_says_so_once_and_then_has_the_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    file, order = tmp_path / "one", []

    def second() -> None:
        with held(file, waits="waiting for the first"):
            order.append("second")

    thread = threading.Thread(target=second)
    with held(file):
        thread.start()
        while not caplog.messages:
            time.sleep(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and caplog.messages == ["waiting for the first"]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of_and_still_has_one_holder(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    file = tmp_path / "one"
    with held(file):
        assert len(caplog.messages) == 1 and "this file system has no locks" in caplog.messages[0]
        with pytest.raises(IsHeld), held(file):
            pass
    with held(file):
        pass
