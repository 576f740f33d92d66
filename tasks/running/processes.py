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

# Runs a program that dies with this process: on Linux the kernel sees to it, elsewhere a parent that changed tells.
# Under a shell's `&` SIGINT is ignored, and a Prefect worker that inherits that would not stop on SIGTERM either.
# A `preexec_fn` could do the first, but is unsafe (and from Python 3.12 warned of) among threads.
_GUARD = """
import ctypes, os, signal, subprocess, sys, time
parent, ending, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ending)
    if os.getppid() == parent:
        os.execv(argv[0], argv)
else:
    child = subprocess.Popen(argv)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    while child.poll() is None:
        if os.getppid() != parent:
            child.send_signal(ending)
        time.sleep(0.2)
    sys.exit(child.returncode)
"""


class ChildProcess:
    """A child with a log file that cannot outlive this process. Start it from a thread that lives as long.

    One `with_children` of its own gets SIGTERM, not SIGKILL, when this process dies, so that it ends them; those that
    it leaves all the same are killed when it is stopped or started again.
    """

    def __init__(self, log: Path, *, with_children: bool = False) -> None:
        self.log = log
        self._with_children = with_children
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, argv: Sequence[str], *, environment: Mapping[str, str], directory: Path) -> None:
        self._sweep()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        ending = signal.SIGTERM if self._with_children else signal.SIGKILL
        guard = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), str(int(ending)), *argv]
        with self.log.open("ab") as log:
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

    def last_words(self, skip: re.Pattern[str] | None = None) -> str:
        """The last line of the log that says something, and does not begin with `skip`."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        said = (line.strip() for line in reversed(lines) if line.strip() and not (skip and skip.match(line)))
        return next(said, "nothing")[:300]

    def _sweep(self) -> None:
        """Kill what is left of the process group of a child that has ended."""
        if self._with_children and self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
