"""The sizes that are in memory: started when they are asked for, started again when they die, stopped to make room."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from elastic_core.budget import bytes_text
from flows.serving.watched import Watched
from tasks.running.engines import START_SECONDS, Engine, Program
from tasks.settings import ServiceError

POLL_SECONDS = 0.1
PROBE_SECONDS = 5.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model that may be served: its name, the family and budget that it is, and where its checkpoint is to be.

    `bring` has the checkpoint there, verified, when it returns. `created` is in seconds since 1970; `tokenizer` is the
    SHA-256 of the tokenizer's files.
    """

    name: str
    family: str
    budget: str
    tokenizer: str
    directory: Path
    created: float
    bring: Callable[[], Awaitable[None]]


class Resident:
    """A size in memory, or on its way there. `users` are the requests that have it or wait for it."""

    def __init__(self, size: Size, engine: Engine) -> None:
        self.size, self.engine = size, engine
        self.bytes = 0  # of memory; 0 until it is started
        self.users, self.used = 0, time.monotonic()
        self.answering = False
        self.up: asyncio.Task[None]
        self._watched: Watched | None = None

    def start(self, size: int) -> None:
        self.bytes = size
        self.engine.start()
        self._watched = Watched(self.size.name, self.engine, time.monotonic())

    def runs(self) -> bool:
        return self.answering and self.engine.process.running()

    def revive(self) -> None:
        """Start it again where it has ended; the pauses before that grow when it keeps ending."""
        if self._watched is not None and self.up.done() and self._watched.revive():
            self.answering = False

    def keeps_ending(self) -> bool:
        """Whether it has ended once more after it was started again."""
        return self._watched is not None and self._watched.pause > 1.0 and not self.engine.process.running()

    def state(self) -> str:
        return "running" if self.runs() else "starting"


class Residents:
    """The sizes that may be served, of which as many are resident as the memory holds.

    `memory` is for the weights of all residents, in bytes as on disk, and `cache` for the requests of each. Within
    `async with` the residents are watched; its end stops them.
    """

    def __init__(self, sizes: Mapping[str, Size], program: Program, *, memory: int, cache: int, logs: Path) -> None:
        self.sizes = sizes
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=PROBE_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),  # engines close idle ones
            headers={"Accept-Encoding": "identity"},
            trust_env=False,  # a proxy is not asked for this machine
        )
        self._program, self._memory, self._cache, self._logs = program, memory, cache, logs
        self._residents: dict[str, Resident] = {}
        self._leaving: list[Resident] = []
        self._turn = asyncio.Lock()  # one at a time is started: engines measure the memory that is free

    async def __aenter__(self) -> "Residents":
        self._watch = asyncio.create_task(self._revive())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop all, synchronously: a second Ctrl-C must not leave one behind."""
        residents = [*self._residents.values(), *self._leaving]
        for task in (self._watch, *(resident.up for resident in residents)):
            task.cancel()
        for resident in residents:
            resident.engine.process.terminate()
        for resident in residents:
            resident.engine.stop()
        await self.client.aclose()

    def states(self) -> dict[str, str]:
        """What each size is: running, starting (again), or stopped."""
        return {name: self._residents[name].state() if name in self._residents else "stopped" for name in self.sizes}

    def running(self) -> dict[str, Engine]:
        """The engines that answer, by the size's name."""
        return {name: resident.engine for name, resident in self._residents.items() if resident.runs()}

    async def start(self, names: list[str]) -> None:
        """Start these sizes, in turn, as far as there is memory; a ServiceError where one cannot be."""
        for name in names:
            need = await self._brought(self.sizes[name])
            if self._taken() + need > self._memory:
                _log.warning("%s: no memory is left, of %s; it starts when it is asked for", name, self._shown())
            else:
                async with self.using(name):
                    _log.info("%s: running", name)

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[Engine]:
        """The engine of a size, which is started where it is not, and stays for the duration.

        A ServiceError where it cannot be.
        """
        resident = self._residents.get(name) or self._demand(self.sizes[name])
        resident.users += 1
        try:
            # Started for all who ask: it goes on where one of them gives up.
            await asyncio.shield(resident.up)
            await self._until_answering(resident)
            yield resident.engine
        finally:
            resident.users -= 1
            resident.used = time.monotonic()

    def _demand(self, size: Size) -> Resident:
        engine = Engine(
            self._program,
            size.directory,
            size.name,
            log=self._logs / f"serve-{size.name}.log",
            options=self._program.cache_options(self._cache),
        )
        resident = self._residents[size.name] = Resident(size, engine)
        resident.up = asyncio.create_task(self._bring_up(resident))
        return resident

    async def _bring_up(self, resident: Resident) -> None:
        try:
            async with self._turn:
                need = await self._brought(resident.size)
                await self._make_room(need)
                resident.start(need)
                await self._until_answering(resident)
        except Exception:
            if self._residents.get(resident.size.name) is resident:
                del self._residents[resident.size.name]
            resident.engine.stop()
            raise

    async def _brought(self, size: Size) -> int:
        """The bytes of memory that a size takes, once its files are here; a ServiceError where they are too many."""
        await size.bring()
        need = sum(file.stat().st_size for file in size.directory.glob("*.safetensors")) + self._cache
        if need > self._memory:
            raise ServiceError(
                f"{size.name} takes {bytes_text(need)} with {bytes_text(self._cache)} of cache, and there are "
                f"{self._shown()}; give more as --memory, or less as --cache"
            )
        return need

    async def _make_room(self, need: int) -> None:
        """Stop residents until `need` bytes are free: first those that nobody uses, by when they were used last."""
        while self._taken() + need > self._memory:
            started = [resident for resident in self._residents.values() if resident.bytes]
            leaving = min(started, key=lambda resident: (resident.users > 0, resident.used))
            del self._residents[leaving.size.name]  # new requests wait for another start of it
            self._leaving.append(leaving)
            while leaving.users:
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.to_thread(leaving.engine.stop)
            self._leaving.remove(leaving)
            _log.info("%s: stopped, to make room", leaving.size.name)

    async def _until_answering(self, resident: Resident) -> None:
        """Return when it answers; a ServiceError where its first start fails, or it keeps ending."""
        deadline, process = time.monotonic() + START_SECONDS, resident.engine.process
        while not await self._takes_requests(resident):
            if not process.running() and (not resident.up.done() or resident.keeps_ending()):
                fault = "keeps ending" if resident.up.done() else "did not start"
                raise ServiceError(f"{resident.size.name} {fault}: {resident.engine.last_words()}; log: {process.log}")
            if time.monotonic() > deadline:
                raise ServiceError(f"{resident.size.name} does not answer; its log is {process.log}", transient=True)
            if process.running():
                resident.answering = await self._answers(resident.engine)
            await asyncio.sleep(0 if resident.answering else POLL_SECONDS)

    async def _takes_requests(self, resident: Resident) -> bool:
        """Whether it answers, still: that an engine has died is known some moments after nobody listens any more."""
        if not resident.runs():
            return False
        where = httpx.URL(resident.engine.url)
        try:
            _, connection = await asyncio.open_connection(where.host, where.port)
        except OSError:
            resident.answering = False
            return False
        connection.close()
        return True

    async def _answers(self, engine: Engine) -> bool:
        with suppress(httpx.TransportError):
            answer = await self.client.get(f"{engine.url}/health", timeout=PROBE_SECONDS)
            return answer.status_code == 200
        return False

    async def _revive(self) -> None:
        """Start again what dies, for ever."""
        while True:
            for resident in [*self._residents.values()]:
                resident.revive()
                if resident.up.done() and not resident.runs() and resident.engine.process.running():
                    resident.answering = await self._answers(resident.engine)
            await asyncio.sleep(POLL_SECONDS)

    def _taken(self) -> int:
        return sum(resident.bytes for resident in (*self._residents.values(), *self._leaving))

    def _shown(self) -> str:
        return f"{bytes_text(self._memory)} of memory"
