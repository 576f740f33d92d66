"""Laws of child processes: none outlives its parent, however that ends, and whatever the child makes of SIGTERM."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.running.processes import ChildProcess

SECONDS = 60  # far beyond what it takes; a test that hangs should end
# Has a child of its own, and neither of them ends on SIGTERM.
DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""
PARENT = """
import os, sys, time
from pathlib import Path
from tasks.running import processes
processes.STOP_SECONDS = 0.5
child = processes.ChildProcess(Path(sys.argv[1]) / "log", with_children=True)
child.start([sys.executable, "-c", sys.argv[2], sys.argv[1] + "/started"], environment=os.environ, directory=Path("."))
time.sleep(600)
"""


def started(directory: Path) -> list[psutil.Process]:
    deadline = time.monotonic() + SECONDS
    while not (directory / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [psutil.Process(int(pid)) for pid in (directory / "started").read_text().split()]


def test_a_child_that_is_deaf_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), DEAF])
    processes = started(tmp_path)
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(processes, timeout=SECONDS)[1]


def test_a_child_that_is_deaf_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.running.processes.STOP_SECONDS", 0.5)
    child = ChildProcess(tmp_path / "log", with_children=True)
    command = [sys.executable, "-c", DEAF, str(tmp_path / "started")]
    child.start(command, environment=os.environ, directory=tmp_path)
    processes = started(tmp_path)
    child.stop()
    assert not psutil.wait_procs(processes, timeout=SECONDS)[1]


def test_what_it_said_is_what_it_said_since_its_last_start(tmp_path: Path) -> None:
    child = ChildProcess(tmp_path / "log", with_children=True)
    for code, said, ended in (("print('one')", "one", 0), ("raise SystemExit(3)", "nothing", 3)):
        child.start([sys.executable, "-c", code], environment=os.environ, directory=tmp_path)
        while child.running():
            time.sleep(0.02)
        assert (child.last_words(), child.exit_code()) == (said, ended)
