"""Run a program that nobody trusts: without network, in a file system of its own, within limits.

Bubblewrap (`bwrap`) gives the program its own namespaces: it sees an interpreter, read-only, and a /tmp of its own, and
may not make the system calls of `seccomp.py`. Its limits are set before its first line runs, by `within.py`; a watcher
bounds the memory of all its processes together.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from tasks.judging.seccomp import seccomp_filter

# `failed`: an exception or a signal. `slow`, `large`: stopped because of either time, or of its memory.
Ending = Literal["ended", "failed", "slow", "large"]

WATCH_SECONDS = 0.05
# A user for each thread that waits for a program; the kernel counts the processes of a user. Beyond any real user.
FIRST_USER = 0x7000_0000
INTERPRETER = ("/usr", "/bin", "/lib", "/lib64", "/nix/store")
LINKER = ("/etc/ld.so.cache", "/etc/alternatives")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use. A process has `memory_bytes` at most, and so have all its processes together.

    `cpu_seconds` are those that all its processes compute, so that a busy machine makes no program slow;
    `clock_seconds` bound one that sleeps or waits.
    """

    cpu_seconds: float = 6.0
    clock_seconds: float = 60.0
    memory_bytes: int = 2 << 30
    processes: int = 8
    output_bytes: int = 16 << 20
    files_bytes: int = 64 << 20
    open_files: int = 32


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended, and what it wrote to standard output."""

    ending: Ending
    output: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """Where programs run: isolated by bubblewrap, or, `isolated=False`, as this user, with fewer limits.

    Without isolation nothing bounds the number of processes, the network or what the program reads and writes.
    """

    limits: Limits = field(default_factory=Limits)
    isolated: bool = True

    def run(self, program: str, given: str, *, function: str | None = None) -> Outcome:
        """Run a Python program on this standard input, or call its function with the arguments there.

        See `within.py` for both forms. RuntimeError where the program did not even start.
        """
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            stdin.write(_encoded(given))
            stdin.seek(0)
            start = self._isolated if self.isolated else self._bare
            with start(program, function, (stdin, stdout, stderr)) as (process, began):
                ending = _watched(process, self.limits)
                started = began()
            if not started:
                stderr.seek(0)
                raise RuntimeError(f"a program did not start: {_last_line(stderr)}")
            stdout.seek(0)
            return Outcome(ending, stdout.read().decode(errors="replace"))

    @contextmanager
    def _isolated(self, program: str, function: str | None, files: tuple[IO[bytes], ...]) -> Iterator[Any]:
        with (
            tempfile.TemporaryFile() as source,
            tempfile.TemporaryFile() as status,
            tempfile.TemporaryFile() as denied,
        ):
            for file, content in ((source, _encoded(program)), (denied, seccomp_filter())):
                file.write(content)
                file.seek(0)
            root = os.geteuid() == 0
            settings = self._settings(function, user=FIRST_USER + threading.get_native_id() if root else None)
            passed = (source.fileno(), status.fileno(), denied.fileno())
            argv = [*self._bwrap(root, *passed), *_interpreter("/program.py", settings)]
            process = _started(argv, files, pass_fds=passed, cwd="/", env={})

            def began() -> bool:
                # bwrap tells an exit code only of a program that was started; of one that we killed it cannot.
                status.seek(0)
                return b"exit-code" in status.read() or process.returncode < 0

            with _ended(process):
                yield process, began

    @contextmanager
    def _bare(self, program: str, function: str | None, files: tuple[IO[bytes], ...]) -> Iterator[Any]:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory, "program.py")
            file.write_bytes(_encoded(program))
            settings = self._settings(function, user=None) | {"processes": None}
            process = _started(_interpreter(str(file), settings), files, cwd=directory, env=ENVIRONMENT)
            with _ended(process):
                yield process, lambda: True

    def _settings(self, function: str | None, user: int | None) -> dict[str, Any]:
        return {
            "processes": self.limits.processes,
            "memory_bytes": self.limits.memory_bytes,
            "cpu_seconds": math.ceil(self.limits.cpu_seconds) + 1,
            "file_bytes": self.limits.output_bytes,
            "open_files": self.limits.open_files,
            "user": user,
            "function": function,
        }

    def _bwrap(self, root: bool, source: int, status: int, denied: int) -> list[str]:
        """The command up to the program. Root needs no namespace of users, in which its limit would not count."""
        seen = [path for path in [*INTERPRETER, *LINKER, sys.base_prefix, sys.prefix] if os.path.exists(path)]
        above = sorted({str(parent) for path in seen for parent in Path(path).parents} - {"/", "/tmp"})
        unshared = ["pid", "net", "ipc", "uts"] if root else ["pid", "net", "ipc", "uts", "user"]
        return [
            shutil.which("bwrap") or "bwrap",
            *(f"--unshare-{each}" for each in unshared),
            *("--die-with-parent", "--json-status-fd", str(status), "--seccomp", str(denied)),
            # First of all: an interpreter of a virtual environment may be in /tmp too.
            *("--perms", "1777", "--size", str(self.limits.files_bytes), "--tmpfs", "/tmp"),
            *(word for path in above for word in ("--perms", "0755", "--dir", path)),  # bwrap's own are 0700
            *(word for path in seen for word in ("--ro-bind", path, path)),
            *("--proc", "/proc", "--dev", "/dev", "--perms", "0444", "--file", str(source), "/program.py"),
            *("--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"),
            *(word for name, value in ENVIRONMENT.items() for word in ("--setenv", name, value)),
        ]


def require_isolation() -> None:
    """ValueError, with the remedy, where programs cannot be isolated on this machine."""
    fault = why_not_isolated()
    if fault is not None:
        raise ValueError(
            f"programs that a model wrote cannot be isolated here: {fault}; install bubblewrap 0.7 or later, "
            "on a Linux that lets this user make namespaces, or set unsafe_code to run them as this user"
        )


@cache
def why_not_isolated() -> str | None:
    """Why bubblewrap does not isolate programs here; None where it does, which is tried, not believed."""
    if shutil.which("bwrap") is None:
        return "there is no bwrap"
    alone = Sandbox(limits=Limits(processes=1))
    try:
        outcome = alone.run(_PROBE, "")
    except (OSError, RuntimeError, ValueError) as error:
        return str(error)
    return None if outcome == Outcome("ended", "isolated\n") else f"its limits do not hold ({outcome.output.strip()})"


_PROBE = """
import os, socket
try:
    os.fork()
except BlockingIOError:
    print("isolated" if [name for _, name in socket.if_nameindex()] in (["lo"], []) else "there is a network")
else:
    print("a program of one process could fork")
"""


def _encoded(text: str) -> bytes:
    return text.encode(errors="replace")  # half a surrogate pair, which a model may write, has no code


def _interpreter(file: str, settings: dict[str, Any]) -> list[str]:
    return [sys.executable, "-I", "-c", Path(__file__).with_name("within.py").read_text(), file, json.dumps(settings)]


def _started(argv: list[str], files: tuple[IO[bytes], ...], **options: Any) -> "subprocess.Popen[bytes]":
    stdin, stdout, stderr = files
    return subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True, **options)


@contextmanager
def _ended(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """See to it that the process, and its whole group, is gone at the end. bwrap takes its namespace along."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def _watched(process: "subprocess.Popen[bytes]", limits: Limits) -> Ending:
    """Wait for the end; kill the process where it, with its descendants, takes too much time or memory."""
    deadline = time.monotonic() + limits.clock_seconds
    while True:
        try:
            return "failed" if process.wait(min(WATCH_SECONDS, max(0.0, deadline - time.monotonic()))) else "ended"
        except subprocess.TimeoutExpired:
            ending: Ending = "slow"
            cpu_seconds, memory_bytes = _used(process.pid)
            if memory_bytes > limits.memory_bytes:
                ending = "large"
            elif cpu_seconds <= limits.cpu_seconds and time.monotonic() < deadline:
                continue
            process.kill()
            process.wait()
            return ending


def _used(pid: int) -> tuple[float, int]:
    """The CPU seconds and the memory of a process and all its descendants. Pages that they share count for each.

    The seconds of a process that has ended are among its parent's. Where that ignores SIGCHLD Linux drops them, and the
    clock alone bounds the program.
    """
    seconds, resident = 0.0, 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                seconds += sum(process.cpu_times()[:4])  # user, system, and those of children that were waited for
                resident += process.memory_info().rss
    return seconds, resident


def _last_line(file: IO[bytes]) -> str:
    lines = file.read()[-4096:].decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
