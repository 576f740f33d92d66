"""Servers and workers that are watched, and started again when they end."""

import logging
import time
from dataclasses import dataclass
from typing import Protocol

from flows.serving.running import Service
from tasks.running.processes import ChildProcess

STEADY_SECONDS = 60.0  # what ran for so long is started again at once
LONGEST_PAUSE_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Server(Protocol):
    """What is watched, and started again when it ends."""

    process: ChildProcess

    @property
    def url(self) -> str: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


@dataclass(slots=True)
class Watched:
    """A server or worker, and how long to wait before it is started again."""

    name: str
    server: Server
    started: float
    pause: float = 0.0

    def service(self) -> Service:
        process = self.server.process
        return Service(name=self.name, where=self.server.url, log=str(process.log), pid=process.pid())

    def revive(self) -> bool:
        """Start it again where it has ended, after a pause that grows when it keeps ending; whether it was started."""
        now, process = time.monotonic(), self.server.process
        if process.running() or now < self.started + self.pause:
            return False
        steady = now - self.started > STEADY_SECONDS
        self.pause = 0.0 if steady else min(max(1.0, 2 * self.pause), LONGEST_PAUSE_SECONDS)
        _log.warning(
            "%s ended with exit code %s; started again, its log is %s", self.name, process.exit_code(), process.log
        )
        self.server.start()
        self.started = now
        return True
