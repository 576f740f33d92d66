"""`elastic up`, `status` and `down`: servers with their UIs, object store, workers and deployments on one machine."""

import os
import shlex
import signal
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.table import Column, Table

from flows.commands.terminal import wide_console
from flows.serving.running import Service, last_running, read_running, this_process, write_running
from flows.serving.schedule import Schedule
from flows.serving.servers import KEYS_FILE, MlflowServer, ObjectStore, PrefectServer, choose_port
from flows.serving.services import (
    FOREIGN,
    applied,
    basic_environment,
    embedded,
    make_bucket,
    names_a_store,
    owned,
    start_store,
)
from flows.serving.watched import Server, Watched
from tasks.running.loopback import answers
from tasks.running.processes import ChildProcess
from tasks.settings import ENDPOINT, ENDPOINT_S3, HOME, PREFECT_API, TRACKING_URI, ServiceError, Settings, redact
from tasks.tracking import check_server

MLFLOW_DATABASE = "MLFLOW_BACKEND_STORE_URI"  # MLflow's own name for the database of its server
PREFECT_PORT, MLFLOW_PORT = 4200, 5000
POOLS = ("cpu", "gpu")

# For workers and the runs that they start.
WORKING = {
    "PREFECT_WORKER_QUERY_SECONDS": "5",  # half of what an idle server does is to answer these looks
    "PREFECT_LOGGING_EXTRA_LOGGERS": "elastic_core,tasks,flows",
}

WATCH_SECONDS = 1.0
STOP_SECONDS = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The ports asked for; where None, that of last time, or the usual one, or any that is free."""

    prefect: int | None = None
    mlflow: int | None = None
    s3: int | None = None

    def check(self) -> None:
        """ServiceError for one that is taken."""
        for name, port in asdict(self).items():
            if port is not None:
                choose_port(port, name)


class Worker:
    """A Prefect worker that runs what waits in a pool, each run in a process of its own."""

    def __init__(self, pool: str, home: Path) -> None:
        self.pool, self.home = pool, home
        self.process = ChildProcess(home / "logs" / f"worker-{pool}.log")

    @property
    def url(self) -> str:
        return f"pool {self.pool}"

    def start(self) -> None:
        command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process"]
        command += ["--pool", self.pool, "--name", f"{self.pool}-{socket.gethostname()}"]
        self.process.start(command, environment=os.environ, directory=self.home)

    def stop(self) -> None:
        self.process.stop()


class Fleet:
    """All that `elastic up` started, and what of the environment it uses instead."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self._stack = home, stack
        self.environment: dict[str, str] = {}
        self._watched: list[Watched] = []
        self._named: list[Service] = []
        self._logs: dict[str, str] = {}

    def start_servers(self, ports: Ports) -> None:
        """Start what the environment does not name, set its variables, and return when all of it answers."""
        # torch, which `elastic status` does without
        from tasks.running.gpu_pool import DEVICE_VARIABLE
        from tasks.running.places import this_device

        here = {DEVICE_VARIABLE: this_device()}
        self._stack.enter_context(applied(basic_environment(self.home) | WORKING | here))
        self._start_store(ports)
        waiting = [server for server in (self._start_prefect(ports), self._start_mlflow(ports)) if server]
        self._offer(embedded(self._logs))
        make_bucket()
        for server in waiting:
            server.wait()

    def begin(self, name: str, server: Server) -> None:
        """Start a server, which stops with the stack."""
        self._stack.callback(server.stop)
        server.start()
        self._watched.append(Watched(name, server, time.monotonic()))

    def watch(self) -> None:
        """Start again what ends, for ever."""
        while True:
            if any([watched.revive() for watched in self._watched]):
                self.record()
            time.sleep(WATCH_SECONDS)

    def end(self) -> None:
        """Stop it all: first the workers, who tell Prefect how their runs end, then the servers; each kind at once."""
        servers = [watched.server for watched in self._watched]
        workers = [server for server in servers if isinstance(server, Worker)]
        for together in (workers, servers):
            for server in together:
                server.process.terminate()
            for server in together:
                server.stop()

    def services(self) -> tuple[Service, ...]:
        return (*self._named, *(watched.service() for watched in self._watched))

    def record(self) -> None:
        """Write down what runs, for those who ask."""
        write_running(self.home, this_process(self.environment, self.services()))

    def _start_store(self, ports: Ports) -> None:
        if names_a_store():
            where = os.environ.get(ENDPOINT_S3) or os.environ.get(ENDPOINT) or "AWS"
            self._named.append(Service(name="S3", where=redact(where)))
        else:
            store = ObjectStore(self.home / "s3", self.home / "logs", ports.s3)
            self._stack.enter_context(applied(start_store(store, self._stack), removed=FOREIGN))
            self._watched.append(Watched("S3", store, time.monotonic()))
            self._logs |= store.logs()

    def _start_prefect(self, ports: Ports) -> PrefectServer | None:
        if url := os.environ.get(PREFECT_API):
            if not answers(f"{url.rstrip('/')}/health"):
                raise ServiceError(f"Prefect at {redact(url)} does not answer; check {PREFECT_API}", transient=True)
            self._named.append(Service(name="Prefect", where=redact(url)))
            return None
        port = choose_port(ports.prefect, "prefect", *self._last_port("Prefect"), PREFECT_PORT)
        server = PrefectServer(self.home / "prefect", self.home / "logs", port, ui=True)
        self.begin("Prefect", server)
        self._offer(server.environment())
        self._logs[PREFECT_API] = str(server.process.log)
        return server

    def _start_mlflow(self, ports: Ports) -> MlflowServer | None:
        if uri := os.environ.get(TRACKING_URI):
            check_server(uri)
            self._named.append(Service(name="MLflow", where=redact(uri)))
            return None
        port = choose_port(ports.mlflow, "mlflow", *self._last_port("MLflow"), MLFLOW_PORT)
        database = os.environ.get(MLFLOW_DATABASE) or f"sqlite:///{self.home}/mlflow.db"
        bucket = Settings.from_environment({**os.environ, TRACKING_URI: database}).bucket
        server = MlflowServer(self.home, self.home / "logs", port, database=database, bucket=bucket)
        self.begin("MLflow", server)
        self._offer({TRACKING_URI: server.url})
        self._logs[TRACKING_URI] = str(server.process.log)
        return server

    def _offer(self, environment: dict[str, str]) -> None:
        """Set variables here and for those who read what runs."""
        self.environment |= environment
        self._stack.enter_context(applied(environment))

    def _last_port(self, name: str) -> list[int]:
        last = last_running(self.home)
        services = last.services if last is not None else ()
        ports = (urlsplit(service.where).port for service in services if service.name == name and service.log)
        return [port for port in ports if port]


def up(home: Path, recipe: Path, schedule: Schedule, ports: Ports) -> None:
    """Start everything, print where it is, and keep it running until this process is told to stop."""
    home = home.absolute()
    with owned(home) as owner, ExitStack() as stack:
        if not owner:
            raise ServiceError(f"{home} is in use: see `elastic status`, or set {HOME} to another directory")
        ports.check()
        fleet = Fleet(home, stack)
        fleet.start_servers(ports)
        deploy(home, recipe, schedule, fresh=PREFECT_API in fleet.environment)
        for pool in POOLS:
            fleet.begin(f"{pool} worker", Worker(pool, home))
        stack.callback(fleet.end)
        fleet.record()  # before its lines are read, and acted upon
        print_services(fleet.services(), home)
        wide_console().print(f"state and logs are in {home}; Ctrl-C or `elastic down` stops it", soft_wrap=True)
        fleet.watch()


def deploy(home: Path, recipe: Path, schedule: Schedule, *, fresh: bool) -> None:
    """Put pools, deployments and automations on the server: in a process of its own, which loads the flows."""
    process, notes = ChildProcess(home / "logs" / "deploy.log"), home / "logs" / "deploy.notes"
    command = [sys.executable, "-m", "flows.serving.deployments", str(recipe), "--notes", str(notes)]
    command += ["--fresh"] * fresh + schedule.arguments()
    process.start(command, environment=os.environ, directory=Path.cwd())
    try:
        while process.running():
            time.sleep(0.05)
        if process.exit_code():
            raise ServiceError(f"the deployments cannot be applied: {process.last_words()}; the log is {process.log}")
        wide_console().print(notes.read_text(encoding="utf-8"), end="", soft_wrap=True, highlight=False, markup=False)
    finally:
        process.stop()


def status(home: Path) -> bool:
    """Print what runs and whether it answers; whether all of it does."""
    running = read_running(home)
    if running is None:
        wide_console().print(f"nothing is running in {home}; start it with `elastic up`", soft_wrap=True)
        return False
    return print_services(running.services, home.absolute())


def down(home: Path) -> None:
    """Stop the `elastic up` of this state directory, and return when it has ended."""
    running = read_running(home)
    if running is None:
        wide_console().print(f"nothing is running in {home}", soft_wrap=True)
        return
    os.kill(running.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while running.lives():  # its parent may be slow to take note of its end, so it is not waited for by number
        if time.monotonic() > deadline:
            raise ServiceError(f"process {running.pid} has not stopped in {STOP_SECONDS:.0f} s; see {home / 'logs'}")
        time.sleep(0.1)
    wide_console().print("stopped; the state stays, and `elastic up` goes on with it", soft_wrap=True)


def print_services(services: tuple[Service, ...], home: Path) -> bool:
    """Print a table of services, and how an MLflow client downloads from them; whether all of them are well."""
    states = [_state(service) for service in services]
    table = Table("service", "state", Column("where", overflow="fold"), Column("log", overflow="fold"))
    for service, state in zip(services, states, strict=True):
        table.add_row(service.name, state, service.where, service.log or "-")
    wide_console().print(table)
    for line in client_lines(services, home):
        wide_console().print(line, soft_wrap=True, highlight=False, markup=False)
    return all(state in ("running", "named") for state in states)


def client_lines(services: tuple[Service, ...], home: Path) -> tuple[str, ...]:
    """What any MLflow client needs to download a registered model, for a shell; keys stay in the file that has them."""
    by_name = {service.name: service for service in services}
    mlflow, store = by_name["MLflow"], by_name["S3"]
    lines = [f"export {TRACKING_URI}={shlex.quote(mlflow.where)}"]
    if store.where.startswith("http"):
        lines.append(f"export MLFLOW_S3_ENDPOINT_URL={shlex.quote(store.where)}")
    if store.log:
        lines.append(f"export AWS_SHARED_CREDENTIALS_FILE={shlex.quote(str(home / 's3' / KEYS_FILE))}")
    else:
        lines.append("# and the keys of your own store, by AWS's variables")
    return ("mlflow.artifacts.download_artifacts('models:/NAME@champion') downloads in any MLflow client after", *lines)


def _state(service: Service) -> str:
    if not service.lives():
        return "ended"
    if not service.where.startswith("http"):
        return "running" if service.log else "named"
    return "running" if answers(service.where) else "does not answer"
