"""`elastic serve`: registered models behind one OpenAI-compatible endpoint, each size in an engine of its own."""

import asyncio
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import typer
import uvicorn

from flows.commands.pull import pull_version
from flows.commands.registry import label
from flows.endpoint.front import endpoint
from flows.endpoint.residents import POLL_SECONDS, Residents, Size
from flows.serving.services import registry_services, terminates_gracefully
from tasks import artifacts, tracking
from tasks.artifacts.manifest import Manifest, directory_digest
from tasks.corpus.tokenizer import TOKENIZER_FILES
from tasks.running.cache import SERVED, in_use
from tasks.running.engines import SERVE_KEY, Program
from tasks.running.limits import memory as memory_left
from tasks.running.processes import ChildProcess
from tasks.settings import ServiceError, Settings, make_home

LOGS = "logs"  # a directory in the state directory
GPU_SHARE = 0.9  # of a GPU's memory; the engines' kernels and graphs have the rest
LAST_ANSWERS_SECONDS = 5


def serve_models(
    models: Sequence[str], program: Program, *, host: str, port: int, memory: int | None, cache: int
) -> None:
    """Serve these models, and on demand the other sizes of their families, until this process is told to stop.

    ValueError for a model that is not registered, a port that is taken, or an address that needs a key.
    """
    key = os.environ.get(SERVE_KEY) or None
    if key is None and not _is_loopback(host):
        raise ValueError(f"--host {host} lets others in: set {SERVE_KEY} in the environment to the key that they need")
    with _listening(host, port) as listening, registered_sizes(models) as (sizes, named):
        typer.echo(f"engine     {program.kind}, {program.path}")
        residents = partial(
            Residents,
            sizes,
            program,
            memory=memory_here() if memory is None else memory,
            cache=cache,
            logs=make_home() / LOGS,
        )
        with terminates_gracefully():
            asyncio.run(_serve(residents, named, listening, key))


@contextmanager
def registered_sizes(models: Sequence[str]) -> Iterator[tuple[dict[str, Size], list[str]]]:
    """The sizes that may be served, by name: those named, which are pulled, and those registered with them.

    Also the names of the former. For the duration `elastic gc` leaves all of them. ValueError where one is named twice.
    """
    home = make_home()
    with ExitStack() as kept:
        with registry_services(home):
            settings = Settings.from_environment(need_bucket=False)
            versions = [tracking.resolve(settings.registry, model) for model in models]
            named = [version.name for version in versions]
            if twice := next((name for name in named if named.count(name) > 1), None):
                raise ValueError(f"{twice} is named twice; one version of it can be served")
            found = {version.name: version for version in versions}
            for version in versions:
                for other in tracking.registered_with(settings.registry, version):
                    found.setdefault(other.name, other)
            store = artifacts.open_store(settings)
            manifests = {
                uri: artifacts.read_manifest(store, uri)
                for uri in {version.tags[tracking.MANIFEST] for version in found.values()}
            }
            for version in found.values():
                kept.enter_context(in_use(_place(home, version)))
            for version in versions:
                pull_version(settings, version, _place(home, version))
        sizes = {
            name: _size(home, version, manifests[version.tags[tracking.MANIFEST]], is_here=name in named)
            for name, version in found.items()
        }
        yield sizes, named


def memory_here() -> int:
    """Bytes for weights and caches where nobody says how many: of this machine's GPU, or what it has left itself."""
    import torch

    if torch.cuda.is_available():
        return int(GPU_SHARE * torch.cuda.get_device_properties(0).total_memory)
    return memory_left()


def _place(home: Path, version: tracking.ModelVersion) -> Path:
    return home / SERVED / f"{version.name}-{version.version}"


def _size(home: Path, version: tracking.ModelVersion, manifest: Manifest, *, is_here: bool) -> Size:
    budget = version.tags[tracking.BUDGET]
    files = {file.path: file.sha256 for file in manifest.part(budget)}
    return Size(
        name=version.name,
        family=version.tags[tracking.FAMILY],
        budget=budget,
        tokenizer=directory_digest((name, files[name]) for name in TOKENIZER_FILES if name in files),
        directory=_place(home, version),
        created=version.created,
        bring=Pull(label(version), _place(home, version), home / LOGS / f"pull-{version.name}.log", is_here=is_here),
    )


class Pull:
    """Pulls a version once. By a process of its own: it changes variables, and a Ctrl-C is to end it."""

    def __init__(self, version: str, directory: Path, log: Path, *, is_here: bool) -> None:
        self._version, self._directory, self._log = version, directory, log
        self._is_here = is_here

    async def __call__(self) -> None:
        if self._is_here:
            return
        process = ChildProcess(self._log)
        command = [sys.executable, "-m", "flows.cli", "pull", self._version, "-o", str(self._directory)]
        try:
            process.start(command, environment=os.environ, directory=Path.cwd())
            while process.running():
                await asyncio.sleep(POLL_SECONDS)
            if process.exit_code():
                said = process.last_words().removeprefix("elastic: ")
                raise ServiceError(f"{self._version} cannot be pulled: {said}")
        finally:
            process.stop()
        self._is_here = True


async def _serve(make: "partial[Residents]", named: list[str], listening: socket.socket, key: str | None) -> None:
    async with make() as residents:
        await residents.start(named)
        host, port = listening.getsockname()[:2]
        typer.echo(f"models     {', '.join(residents.sizes)}")
        typer.echo(f"endpoint   http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C stops it")
        config = uvicorn.Config(
            endpoint(residents, key),
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=LAST_ANSWERS_SECONDS,
        )
        await uvicorn.Server(config).serve(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; ValueError where the port is taken or the address is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} is taken; stop what listens there, or give another as --port") from error
        raise ValueError(f"--host {host}: {error.strerror}; give an address of this machine") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
