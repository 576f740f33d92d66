"""The endpoint of `elastic serve` over a stand-in for the engines, for tests: run in a thread, asked by real HTTP."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import standin
import uvicorn

from flows.endpoint.front import endpoint
from flows.endpoint.residents import Residents, Size
from tasks.running.engines import Program, find_program

WEIGHTS, CACHE = 1000, 24  # bytes, of each size
ONE, TWO = 1024, 2048  # memory for so many sizes
CHAT = [{"role": "user", "content": "2 + 2?"}]


def eventually(true: Any) -> Any:
    deadline = time.monotonic() + 60  # far beyond what it takes; a test that hangs should end
    while not (result := true()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


@dataclass(frozen=True)
class Serving:
    """A running endpoint of the sizes tiny-l, tiny-m and tiny-s."""

    url: str
    directory: Path
    key: str | None

    def client(self, timeout: float = 60.0) -> httpx.Client:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def ask(self, model: str, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json={"model": model, "messages": CHAT, **fields})

    def asked(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / f"asked-{name}.jsonl").read_text().splitlines()]

    def says(self, name: str, *pieces: str) -> None:
        (self.directory / f"{name}.json").write_text(json.dumps({"pieces": pieces}))

    def states(self) -> dict[str, str]:
        return dict(self.get("/health").json()["models"])

    def processes(self, name: str) -> list[list[int]]:
        """The engine and its child, of each start."""
        lines = [line.split() for line in (self.directory / "processes").read_text().splitlines()]
        return [[int(process) for process in line[1:]] for line in lines if line[0] == name]


@dataclass(frozen=True)
class Stage:
    """Where the stand-ins and what they say are; called, it serves for the duration."""

    directory: Path
    checkpoint: Path

    def program(self, kind: str = "vllm") -> Program:
        return find_program(str(standin.write_program(self.directory, kind)))

    def residents(self, memory: int, kind: str = "vllm") -> Residents:
        sizes = {f"tiny-{budget}": self._size(budget) for budget in "lms"}
        return Residents(sizes, self.program(kind), memory=memory, cache=CACHE, logs=self.directory / "logs")

    @contextmanager
    def __call__(self, *start: str, memory: int = TWO, key: str | None = None, kind: str = "vllm") -> Iterator[Serving]:
        """Whatever was started must have ended at the end."""
        listening = socket.create_server(("127.0.0.1", 0))
        servers: list[uvicorn.Server] = []

        async def serve() -> None:
            async with self.residents(memory, kind) as residents:
                await residents.start(list(start))
                config = uvicorn.Config(endpoint(residents, key), log_level="warning", timeout_graceful_shutdown=1)
                servers.append(uvicorn.Server(config))
                await servers[0].serve(sockets=[listening])

        thread = threading.Thread(target=asyncio.run, args=(serve(),))
        thread.start()
        try:
            eventually(lambda: servers and servers[0].started)
            yield Serving(f"http://127.0.0.1:{listening.getsockname()[1]}", self.directory, key)
        finally:
            servers[0].should_exit = True
            thread.join()
            listening.close()
        started = [int(word) for word in (self.directory / "processes").read_text().split() if word.isdecimal()]
        eventually(lambda: not any(map(runs, started)))  # a kill takes a moment

    def _size(self, budget: str) -> Size:
        name = f"tiny-{budget}"
        place = self.directory / "served" / name
        place.parent.mkdir(exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(self.checkpoint)
        return Size(
            name=name,
            family="tiny",
            budget=budget,
            tokenizer="the same",
            directory=place,
            created=1e9,
            bring=nothing,
        )


async def nothing() -> None:
    """All is there."""


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def events(text: str) -> list[Any]:
    said = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [each if each == "[DONE]" else json.loads(each) for each in said]
