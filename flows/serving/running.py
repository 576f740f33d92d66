"""What `elastic up` has running, in a file that other commands read: where it is, and whether it still is."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from elastic_core.schema import build
from flows.serving.servers import write_private

STATE_FILE = "up.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A server or a worker: `where` is its URL, or the pool that it works for; `log` its file; `pid` its process.

    A service that the environment named has neither log nor process here.
    """

    name: str
    where: str
    log: str = ""
    pid: int | None = None

    def lives(self) -> bool:
        return self.pid is None or _lives(self.pid)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An `elastic up`: its process, the variables by which others use its servers, and the services."""

    pid: int
    started: float
    environment: dict[str, str]
    services: tuple[Service, ...]

    def lives(self) -> bool:
        """Whether the process is there, and not another one with its number."""
        return _lives(self.pid, self.started)


def this_process(environment: Mapping[str, str], services: tuple[Service, ...]) -> Running:
    me = psutil.Process()
    return Running(pid=me.pid, started=_started(me), environment=dict(environment), services=services)


def write_running(home: Path, running: Running) -> None:
    write_private(home / STATE_FILE, json.dumps(asdict(running), indent=1))


def read_running(home: Path) -> Running | None:
    """The `elastic up` of this state directory; None where none runs."""
    last = last_running(home)
    return last if last is not None and last.lives() else None


def last_running(home: Path) -> Running | None:
    """The `elastic up` that runs, or ran last; None where there was none."""
    try:
        return build(Running, json.loads((home / STATE_FILE).read_text(encoding="utf-8")), STATE_FILE)
    except FileNotFoundError:
        return None


def _lives(pid: int, started: float | None = None) -> bool:
    try:
        process = psutil.Process(pid)
        same = started is None or math.isclose(started, _started(process), rel_tol=0.0, abs_tol=1e-3)
        return same and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _started(process: psutil.Process) -> float:
    """When it began, by a clock that nobody sets; psutil adds Linux's boot time, which moves with the system clock."""
    return float(process.create_time() - (psutil.boot_time() if psutil.LINUX else 0.0))
