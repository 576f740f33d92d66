"""The servers that `elastic` brings along, each a child process on loopback ports with a log file of its own."""

import json
import logging
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tasks.running.loopback import answers, free_ports, is_free
from tasks.running.processes import ChildProcess
from tasks.settings import BUCKET, ENDPOINT_S3, ServiceError
from tasks.tracking import CLIENT_ENVIRONMENT

EMBEDDED_BUCKET = "elastic"
START_SECONDS = 60.0
SLOW_START_SECONDS = 180.0  # Prefect and MLflow take 8 on an idle machine
START_ATTEMPTS = 3  # a port found free may be taken before the server binds it
LAST_EVENTS_SECONDS = 60.0

QUIET = {"DO_NOT_TRACK": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", **CLIENT_ENVIRONMENT}
# After so many seconds Prefect takes a run for cancelled that no worker ends; workers take half a minute.
GIVES_UP = {"PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "90"}

# For the server, and for its clients, which would else link to pages that it does not have.
NO_UI = {"PREFECT_SERVER_UI_ENABLED": "0"}

KEYS_FILE = "credentials"  # the store's keys as AWS's clients read them from AWS_SHARED_CREDENTIALS_FILE

_log = logging.getLogger(__name__)


class ObjectStore:
    """SeaweedFS on loopback ports, its data and its keys under one directory.

    It takes the ports of last time where they are free; others do as well, the data stay. The file of keys is in the
    server's own format: the first identity is ours.
    """

    KINDS = ("s3", "master", "volume", "filer", "admin")

    def __init__(self, directory: Path, logs: Path, port: int | None = None) -> None:
        self.directory = directory
        self.process = ChildProcess(logs / "seaweedfs.log")
        self._port = port
        self._keys = directory / "identities.json"
        self._ports = directory / "ports.json"

    @property
    def url(self) -> str:
        """Where the server listens, or last listened."""
        return f"http://127.0.0.1:{json.loads(self._ports.read_text())[0]}"

    def start(self) -> None:
        """Return when the server answers; it needs about a second."""
        data = self.directory / "data"
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.credentials()
        for attempt in range(1, START_ATTEMPTS + 1):
            self._launch(data)
            if _until(lambda: answers(self.url), self.process, START_SECONDS):
                return
            said = self.process.last_words()
            self.stop()
            _log.warning("SeaweedFS did not start (attempt %d): %s", attempt, said)
        raise ServiceError(f"SeaweedFS did not start: {said}; its log is {self.process.log}", transient=True)

    def stop(self) -> None:
        self.process.stop()
        self._remove_sockets()

    def logs(self) -> dict[str, str]:
        """Its log, by the variables of `environment` that failures are explained by."""
        return dict.fromkeys((ENDPOINT_S3, "AWS_ACCESS_KEY_ID"), str(self.process.log))

    def credentials(self) -> tuple[str, str]:
        """The access key and the secret key, made at random the first time and kept in a file for our eyes only."""
        if not self._keys.exists():
            key = {"accessKey": f"elastic{secrets.token_hex(6)}", "secretKey": secrets.token_urlsafe(32)}
            actions = ["Admin", "Read", "Write", "List", "Tagging"]
            identities = {"identities": [{"name": "elastic", "credentials": [key], "actions": actions}]}
            write_private(self._keys, json.dumps(identities, indent=1))
        first = json.loads(self._keys.read_text())["identities"][0]["credentials"][0]
        access_key, secret_key = first["accessKey"], first["secretKey"]
        if not (self.directory / KEYS_FILE).exists():
            profile = f"[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n"
            write_private(self.directory / KEYS_FILE, profile)
        return access_key, secret_key

    def environment(self) -> dict[str, str]:
        """What a client needs to know, in boto3's and MLflow's variables."""
        access_key, secret_key = self.credentials()
        return {
            ENDPOINT_S3: self.url,
            "MLFLOW_S3_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            BUCKET: EMBEDDED_BUCKET,
        }

    def _last_ports(self) -> list[int]:
        return list(json.loads(self._ports.read_text())) if self._ports.exists() else []

    def _remove_sockets(self) -> None:
        """Remove what a server that was killed leaves in /tmp, a place of its own choice; others may have its ports."""
        for port in filter(is_free, self._last_ports()):
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)

    def _launch(self, data: Path) -> None:
        ports, count = self._last_ports(), 2 * len(self.KINDS)
        if len(ports) != count or not all(map(is_free, ports)) or self._port not in (None, ports[0]):
            self._remove_sockets()
            ports = free_ports(count)
            ports[0] = choose_port(self._port, "s3", ports[0])
            write_private(self._ports, json.dumps(ports))
        names = [f"{kind}.port{suffix}" for suffix in ("", ".grpc") for kind in self.KINDS]
        flags = [
            *(f"-{name}={port}" for name, port in zip(names, ports, strict=True)),
            f"-dir={data}",
            f"-s3.config={self._keys}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
        ]
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        self.process.start([_weed(), "mini", *flags], environment=environment, directory=data)


class PrefectServer:
    """Prefect's API on a loopback port, on SQLite in one directory unless the environment names a database.

    Without `ui` it is what Prefect would start by itself for a single run, but that one outlives a killed run.
    """

    def __init__(self, home: Path, logs: Path, port: int, *, ui: bool = False) -> None:
        self.home = home
        self.process = ChildProcess(logs / "prefect.log")
        self._port, self._ui = port, ui

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def environment(self) -> dict[str, str]:
        own = {"PREFECT_HOME": str(self.home), "PREFECT_API_URL": f"{self.url}/api"}
        return own | ({"PREFECT_UI_URL": self.url} if self._ui else NO_UI)

    def start(self) -> None:
        """Return at once; `wait` until it answers, which takes some seconds."""
        self.home.mkdir(parents=True, exist_ok=True)
        command = _uvicorn("flows.serving.prefect_server:create_app", self._port, "--factory", "--lifespan", "on")
        environment = {**GIVES_UP, **os.environ, **QUIET, **(self._with_ui() if self._ui else self._for_one_run())}
        self.process.start(command, environment=environment, directory=self.home)

    def wait(self) -> None:
        wait_for(f"{self.url}/api/health", "Prefect's server", self.process)

    def stop(self) -> None:
        """Stop it once it has this process's events: each would else be tried for a minute at the exit."""
        sender = sys.modules.get("prefect.events.worker")
        if sender is not None and self.process.running():
            sender.EventsWorker.drain_all(timeout=LAST_EVENTS_SECONDS)
        self.process.stop()

    def _for_one_run(self) -> dict[str, str]:
        own = {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        return own | NO_UI | {"PREFECT_HOME": str(self.home)}

    def _with_ui(self) -> dict[str, str]:
        return {
            **self.environment(),
            "PREFECT__SERVER_FINAL": "1",
            "PREFECT_UI_API_URL": f"{self.url}/api",
            "PREFECT_UI_STATIC_DIRECTORY": str(self.home / "ui"),  # not into site-packages, which may be read-only
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "flows.serving.prefect_server",
            # In memory, which is Prefect's default, a restart would lose who holds a slot, and so the slot.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }


class MlflowServer:
    """MLflow with its UI on a loopback port: one process, artifacts of runs in the object store."""

    def __init__(self, home: Path, logs: Path, port: int, *, database: str, bucket: str) -> None:
        self.home = home
        self.process = ChildProcess(logs / "mlflow.log")
        self._port, self._database, self._bucket = port, database, bucket

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return at once; `wait` until it answers, which takes some seconds."""
        # `mlflow server` sets these, and then runs the same as a child that would outlive a killed parent.
        settings = {
            "_MLFLOW_SERVER_FILE_STORE": self._database,
            "_MLFLOW_SERVER_REGISTRY_STORE": self._database,
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": f"s3://{self._bucket}/mlflow",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
        }
        environment = {**os.environ, **QUIET, **settings}
        command = _uvicorn("mlflow.server.fastapi_app:app", self._port)
        self.process.start(command, environment=environment, directory=self.home)

    def wait(self) -> None:
        # The first look at its database makes the tables.
        wait_for(f"{self.url}/api/2.0/mlflow/experiments/search?max_results=1", "MLflow's server", self.process)

    def stop(self) -> None:
        self.process.stop()


def _uvicorn(application: str, port: int, *options: str) -> list[str]:
    command = [sys.executable, "-m", "uvicorn", application, "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--log-level", "error", *options]


def wait_for(url: str, name: str, process: ChildProcess) -> None:
    """Return when the server answers at `url`; a ServiceError where it ends or never does."""
    if not _until(lambda: answers(url), process, SLOW_START_SECONDS):
        raise ServiceError(f"{name} did not start: {process.last_words()}; its log is {process.log}", transient=True)


def _until(true: Callable[[], bool], process: ChildProcess, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while process.running() and time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.05)
    return False


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")  # where pip puts it, whether or not the environment is on PATH
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ServiceError(
            f"no `weed` on PATH: pip install 'elastic-family[pipeline]', or set {ENDPOINT_S3} to an S3 server"
        )
    return found


def choose_port(asked: int | None, name: str, *preferred: int) -> int:
    """The port asked for, a ServiceError where it is taken; else the first free one of those preferred, or any."""
    if asked is not None:
        if not is_free(asked):
            raise ServiceError(f"port {asked} is taken; stop what listens there, or give another as --{name}-port")
        return asked
    return next(filter(is_free, preferred), None) or free_ports(1)[0]


def write_private(path: Path, text: str) -> None:
    """Replace a file that is for our eyes only, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(partial, path)
