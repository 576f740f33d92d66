"""Child processes that cannot outlive this one, kill -9 included: servers and training."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

STOP_SECONDS = 10.0

# Starts argv and ends it when this process dies. With no grace it is killed: by PR_SET_PDEATHSIG on Linux, elsewhere by
# polling getppid(). With some seconds of grace it gets SIGTERM, and after these SIGKILL with all of its process group.
# Under a shell's `&` SIGINT is ignored, and a Prefect worker that inherits that would not stop on SIGTERM either.
# A `preexec_fn` could do the first, but is unsafe (and from Python 3.12 warned of) among threads.
_GUARD = """
import ctypes, os, signal, subprocess, sys, time
parent, grace, argv = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux" and not grace:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != parent:
    sys.exit(1)
if sys.platform == "linux" and not grace:
    os.execv(argv[0], argv)
child, ends = subprocess.Popen(argv), None
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
while child.poll() is None:
    if os.getppid() != parent and ends is None:
        child.terminate()
        ends = time.monotonic() + grace
    if ends is not None and time.monotonic() >= ends:
        break
    try:
        child.wait(0.2)
    except subprocess.TimeoutExpired:
        pass
if os.getppid() != parent:
    os.killpg(0, signal.SIGKILL)
sys.exit(child.returncode if child.returncode >= 0 else 128 - child.returncode)
"""


class ChildProcess:
    """A child with a log file that cannot outlive this process. Start it from a thread that lives as long.

    One `with_children` of its own gets SIGTERM when this process dies, so that it ends them, and is killed with what is
    left of them ten seconds later. What it leaves is also killed when it is stopped or started again.
    """

    def __init__(self, log: Path, *, with_children: bool = False) -> None:
        self.log = log
        self._with_children = with_children
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0  # bytes of the log before this start

    def start(self, argv: Sequence[str], *, environment: Mapping[str, str], directory: Path) -> None:
        self._sweep()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        grace = STOP_SECONDS if self._with_children else 0.0
        guard = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), str(grace), *argv]
        with self.log.open("ab") as log:
            self._begun = log.tell()
            self._process = subprocess.Popen(
                guard,
                env=dict(environment),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is ours to handle, in our order
            )

    def pid(self) -> int | None:
        """The process that runs, or ran last."""
        return self._process.pid if self._process is not None else None

    def exit_code(self) -> int | None:
        """How it ended; None while it runs or when it was never started."""
        return self._process.poll() if self._process is not None else None

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def terminate(self) -> None:
        """Ask it to end, and do not wait for that."""
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        if self._process is None:
            return
        self.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._sweep()
        self._process = None

    def said(self) -> list[str]:
        """The lines that the log has since it was started last."""
        written = self.log.read_bytes()[self._begun :] if self.log.exists() else b""
        return written.decode(errors="replace").splitlines()

    def last_words(self, skip: re.Pattern[str] | None = None) -> str:
        """The last line of the log that says something, and does not begin with `skip`."""
        lines = reversed(self.said())
        said = (line.strip() for line in lines if line.strip() and not (skip and skip.match(line)))
        return next(said, "nothing")[:300]

    def _sweep(self) -> None:
        """Kill what is left of the process group of a child that has ended."""
        if self._with_children and self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
