"""Three hosts that are one Ray cluster, share no disk, and reach the servers of this machine."""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from hosts import GATEWAY, Host, reachable, three_hosts, why_not
from laws import Place
from micro import ELASTIC, LIMIT_SECONDS
from prefect.client.orchestration import SyncPrefectClient

from flows.serving.servers import MlflowServer, ObjectStore, PrefectServer
from tasks.artifacts import ensure_bucket, open_store
from tasks.artifacts.documents import documents, read_document, remove_objects
from tasks.running.loopback import free_ports
from tasks.running.workspace import Workspace, shared_workspace
from tasks.settings import BUCKET, HOME, PREFECT_API, TRACKING_URI, WORKSPACE, Settings

TRAINER = "-u -m elastic_core.training.job"
PORT = 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Cluster:
    """Hosts with so many processors each, the first with Ray's head, and what each has in its environment."""

    hosts: Sequence[Host]
    processors: Sequence[int]
    environment: Mapping[str, str]
    servers: "Servers"

    @property
    def address(self) -> str:
        return f"{self.hosts[0].address}:{PORT}"

    def join(self, host: Host) -> None:
        """Make a host part of the cluster."""
        first = host is self.hosts[0]
        join = ["--head", f"--port={PORT}", "--include-dashboard=false"] if first else [f"--address={self.address}"]
        own = [f"--node-ip-address={host.address}", f"--temp-dir={host.state}/ray", "--object-store-memory=80000000"]
        cpus = f"--num-cpus={self.processors[self.hosts.index(host)]}"
        done = host.run([*RAY, "start", *join, *own, cpus], self.environment)
        assert done.returncode == 0, done.stdout + done.stderr

    def elastic(self, host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
        return host.run([*ELASTIC, *arguments], self.asking)

    def begin(self, number: int, log: Path, *arguments: str) -> subprocess.Popen[str]:
        """The command on one of the hosts, while it runs; what it says is in a file."""
        with log.open("a") as file:
            return self.hosts[number].start([*ELASTIC, *arguments], self.asking, stdout=file, stderr=file)

    @property
    def asking(self) -> dict[str, str]:
        """The environment of a process that has the cluster do its steps."""
        return {**self.environment, "RAY_ADDRESS": self.address}

    def said(self, since: int = 0) -> list[str]:
        """The lines of log of all runs, but for the first ones."""
        found: list[str] = []
        with SyncPrefectClient(api=self.environment[PREFECT_API]) as client:
            while page := client.read_logs(offset=len(found)):
                found += [line.message for line in page]
        return found[since:]

    def trainers(self) -> set[int]:
        return {process for host in self.hosts for process in host.processes(TRAINER)}

    @contextmanager
    def place(self) -> Iterator[Place]:
        """The registry and the bucket."""
        with environment_of(self.environment):
            settings = Settings.from_environment()
            with closing((store := open_store(settings)).client):
                yield Place(settings.tracking_uri, store)

    def documents(self, under: str) -> list[bytes]:
        """What the workspace has under a name, but for files by digest."""
        with self.workspace() as shared:
            keys = sorted(key for key in documents(shared.store, f"{shared.root}{under}") if "/files/" not in key)
            return [read_document(shared.store, key) or b"" for key in keys]

    def forget(self) -> None:
        """Have other hosts by the same names, and a workspace without a result."""
        for host in self.hosts:
            host.lose()
        with self.workspace() as shared:
            remove_objects(shared.store, documents(shared.store, shared.root))
        for host in self.hosts:
            self.join(host)

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        with environment_of(self.environment):
            shared = shared_workspace()
            assert shared is not None
            yield shared


@contextmanager
def ray_cluster(directory: Path, processors: Sequence[int]) -> Iterator[Cluster]:
    """A cluster of three hosts with so many processors each; the test is skipped where there can be none."""
    pytest.importorskip("ray")
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        hosts = stack.enter_context(three_hosts())
        servers = Servers(directory)
        stack.callback(servers.stop)
        cluster = Cluster(hosts, processors, {**servers.known, **_of_a_host(hosts[0])}, servers)
        for host in hosts:
            cluster.join(host)
        yield cluster


class Servers:
    """The servers of this machine, which all hosts reach: the object store, Prefect and MLflow."""

    def __init__(self, directory: Path) -> None:
        self._store = ObjectStore(directory / "s3", directory)
        self._store.start()
        known = self._store.environment()
        prefect_port, mlflow_port = free_ports(2)
        database = f"sqlite:///{directory}/mlflow.db"
        mlflow = MlflowServer(directory, directory, mlflow_port, database=database, bucket=known[BUCKET])
        self._others = (PrefectServer(directory / "prefect", directory, prefect_port), mlflow)
        self._environment = {**known, TRACKING_URI: "sqlite://"}
        with environment_of(self._environment):
            ensure_bucket(Settings.from_environment())
        self._start_others()
        self._ports = (int(self._store.url.rpartition(":")[2]), prefect_port, mlflow_port)
        self._reached = ExitStack()
        self._let_hosts_in()
        self.known = {
            **{name: value.replace("127.0.0.1", GATEWAY) for name, value in known.items()},
            PREFECT_API: f"http://{GATEWAY}:{prefect_port}/api",
            TRACKING_URI: f"http://{GATEWAY}:{mlflow_port}",
            WORKSPACE: f"s3://{known[BUCKET]}/workspace",
        }

    def _start_others(self) -> None:
        with environment_of(self._environment):
            for server in self._others:
                server.start()
            for server in self._others:
                server.wait()

    def _let_hosts_in(self) -> None:
        for port in self._ports:
            self._reached.enter_context(reachable(port))

    def kill(self) -> None:
        """End them at once, as a loss of power would."""
        self._reached.close()  # SeaweedFS begins only where nobody listens at its port, on whatever address
        for server in (self._store, *self._others):
            pid = server.process.pid()
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            server.process.stop()

    def start_again(self) -> None:
        """Where they were, with what they had."""
        self._store.start()
        self._start_others()
        self._let_hosts_in()

    def stop(self) -> None:
        self._reached.close()
        for server in (*self._others, self._store):
            server.stop()


@contextmanager
def environment_of(variables: Mapping[str, str]) -> Iterator[None]:
    """This process with these variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def _of_a_host(host: Host) -> dict[str, str]:
    return {
        HOME: str(host.state / "home"),
        "PREFECT_HOME": str(host.state / "prefect"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # else each host looks for all fonts first
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else 15: other tests would come first
    }


def bring_recipe(host: Host, source: Path) -> Path:
    """The recipe and its files on one host, where no other sees them."""
    place = host.state / "recipe"
    assert host.run(["cp", "--recursive", str(source), str(place)], {}).returncode == 0
    return place / "micro.yaml"


def wait_until(true: Callable[[], Any], runs: "subprocess.Popen[str]", log: Path) -> Any:
    """The first result that is true, while a process runs, whose lines are in a file."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (result := true()):
        assert runs.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(0.5)
    return result


def found(pattern: str, lines: Sequence[str]) -> list[str]:
    return [match[1] for line in lines if (match := re.fullmatch(pattern, line))]
