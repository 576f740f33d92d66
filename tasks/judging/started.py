"""Completions from an engine that is started here for one model, in as many replicas as the GPUs allow, and ended."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock

from elastic_core import judging
from elastic_core.budget import Dtype
from elastic_core.judging import Endpoint
from tasks.judging.endpoint import Client
from tasks.judging.samples import Completion, Request, SampleFile, Wanted, fill
from tasks.running.bars import Report
from tasks.running.devices import visible
from tasks.running.engines import START_SECONDS, Engine, Program, find_program
from tasks.settings import ServiceError

POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 30.0

logger = logging.getLogger(__name__)


def program_for(engine: judging.Engine, dtype: Dtype) -> Program:
    """The program that a recipe has answer, of this machine; ValueError, with the remedy, where it is not here."""
    return find_program(engine.program, ("--dtype", dtype, *engine.arguments))


def check_gpus(engine: judging.Engine) -> None:
    """ValueError where this machine has GPUs, and too few for a replica."""
    count = len(visible())
    if 0 < count < engine.gpus:
        raise ValueError(f"evaluation.engine.gpus is {engine.gpus}, and this machine has {count}; ask for fewer")


class Started:
    """The engine that is a program: it runs while samples are made. Its logs are files that begin with `log`.

    `identity` tells the model, and all else that an answer depends on. `special` is `Client`'s.
    """

    def __init__(
        self,
        program: Program,
        settings: judging.Engine,
        directory: Path,
        size: str,
        log: Path,
        identity: str,
        special: Collection[str] = (),
    ) -> None:
        self.identity, self._special = identity, special
        self._program, self._settings = program, settings
        self._directory, self._size, self._log = directory, size, log

    def fill(self, samples: SampleFile, wanted: Sequence[Wanted], report: Report) -> None:
        """Have the engine make the samples that are missing.

        ServiceError where it does not start, or ends; one that may pass where it has answered something before it did.
        """
        begun, each = len(samples), self._settings.concurrency if self._program.answers_together else 1
        with self._replicas() as replicas:
            endpoints = [
                Endpoint(url=f"{replica.url}/v1", model=replica.model, concurrency=each, seconds=self._settings.seconds)
                for replica in replicas
            ]
            looks = [partial(self._look, replica, lambda: len(samples) > begun) for replica in replicas]
            asking = partial(Client, special=self._special)
            complete = Shared(list(map(asking, endpoints, looks))).complete
            fill(samples, wanted, complete, each * len(replicas), report, break_off=partial(_stop, replicas))

    @contextmanager
    def _replicas(self) -> Iterator[list[Engine]]:
        """Engines that answer, and end with the block."""
        gpus, per = visible(), self._settings.gpus
        shares = [gpus[first : first + per] for first in range(0, len(gpus) - per + 1, per)] or [gpus]
        replicas = [self._replica(number, share) for number, share in enumerate(shares)]
        with ExitStack() as stack:
            stack.callback(_stop, replicas)
            for replica in replicas:
                replica.start()
            self._wait(replicas)
            yield replicas

    def _replica(self, number: int, gpus: Sequence[str]) -> Engine:
        split = ("--tensor-parallel-size", str(len(gpus))) if len(gpus) > 1 and self._program.kind == "vllm" else ()
        return Engine(
            self._program,
            self._directory,
            self._size,
            log=self._log.with_name(f"{self._log.name}-{number}.log"),
            options=split,
            environment={"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else None,
        )

    def _wait(self, replicas: Sequence[Engine]) -> None:
        """Return when all answer, and say meanwhile what they do."""
        name, began = self._program.name, time.monotonic()
        count = f"{len(replicas)} replicas" if len(replicas) > 1 else "an engine"
        logger.info("%s: starting %s for %s, log %s", name, count, self._size, replicas[0].process.log)
        told, waiting = began, list(replicas)
        while waiting:
            for replica in waiting:
                self._look(replica, lambda: False, "did not start")
            waiting = [replica for replica in waiting if not replica.answers()]
            now = time.monotonic()
            if waiting and now - began > START_SECONDS:
                log = waiting[0].process.log
                raise ServiceError(f"{name} does not answer after {START_SECONDS:.0f} s; its log is {log}")
            if waiting and now - told >= SECONDS_BETWEEN_LINES:
                told, said = now, waiting[0].process.last_words()
                logger.info("%s: starting for %.0f s, now: %s", name, now - began, said)
            time.sleep(POLL_SECONDS if waiting else 0)
        logger.info("%s answers for %s after %.0f s", name, self._size, time.monotonic() - began)

    def _look(self, replica: Engine, got_further: Callable[[], bool], fault: str = "ended while it answered") -> None:
        """ServiceError where a replica does not run; it may pass where samples were made since it was started."""
        if not replica.process.running():
            code, said, log = replica.process.exit_code(), replica.last_words(), replica.process.log
            told = f"{self._program.name} {fault} (exit code {code}): {said}; its log is {log}"
            raise ServiceError(told, transient=got_further())


class Shared:
    """Several clients as one: a request goes to the one that is asked least."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients, self._asked = clients, [0] * len(clients)
        self._lock = Lock()

    def complete(self, request: Request) -> Completion:
        with self._lock:
            place = self._asked.index(min(self._asked))
            self._asked[place] += 1
        try:
            return self._clients[place].complete(request)
        finally:
            with self._lock:
                self._asked[place] -= 1


def _stop(replicas: Sequence[Engine]) -> None:
    """End all, side by side."""
    for replica in replicas:
        replica.process.terminate()
    for replica in replicas:
        replica.stop()
