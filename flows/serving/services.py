"""The services that `elastic run` brings along: an S3 server, SQLite for MLflow and Prefect, all in one directory.

What the environment already names (an S3 endpoint or bucket, MLFLOW_TRACKING_URI, PREFECT_API_URL) is used instead,
and so is what `elastic up` has running in the same directory.
"""

import json
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from elastic_core.files.locks import IsHeld, held, is_held
from flows.serving.running import Running, read_running
from flows.serving.servers import QUIET, START_SECONDS, ObjectStore, PrefectServer
from tasks import tracking
from tasks.artifacts import check_bucket, ensure_bucket
from tasks.running.loopback import answers, free_ports
from tasks.settings import (
    BUCKET,
    EMBEDDED,
    ENDPOINT,
    ENDPOINT_S3,
    HOME,
    PREFECT_API,
    REGISTRY_URI,
    TRACKING_URI,
    ServiceError,
    Settings,
    make_home,
)

RESULTS = "PREFECT_LOCAL_STORAGE_PATH"
HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}  # seconds; an automation takes a silent run for dead

WAITING_SECONDS = 1.0
BORROWERS = Path("locks", "borrowers")

_log = logging.getLogger(__name__)

# boto3 would prefer these over the embedded store's keys: they are unset while it is in use.
FOREIGN = ("AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_PROFILE")


@contextmanager
def embedded_services(home: Path, *, share: bool = False, prefect: bool = False) -> Iterator[dict[str, str]]:
    """Start what os.environ does not name, set its variables for the duration, and stop it on any way out.

    Prefect's server is started only where it is asked for; readers of the registry do without.

    Yields the variables that were set. One command at a time owns `home`: a second uses the servers of `elastic up`,
    or with `share` (readers) those of any owner, which waits at its end for those who do; otherwise it waits for the
    first to end. Where nothing is to be started any number run beside each other.
    """
    home = home.absolute()
    with ExitStack() as stack:
        owner, running = _turn(home, stack, share=share or _names_all(prefect=prefect))
        defined = basic_environment(home)
        if not os.environ.get(TRACKING_URI):
            defined |= tracking_environment(home)
        server, logs = None, dict[str, str]()
        if running is not None:
            defined |= {name: value for name, value in running.environment.items() if not os.environ.get(name)}
            shared = json.loads(defined.pop(EMBEDDED, "{}"))
            logs |= {name: log for name, log in shared.items() if not os.environ.get(name)}
        elif prefect and not os.environ.get(PREFECT_API):
            server = PrefectServer(home / "prefect", home / "logs", free_ports(1)[0])
            stack.callback(server.stop)
            server.start()
            defined |= server.environment()
            logs[PREFECT_API] = str(server.process.log)
        if names_a_store():
            stack.enter_context(applied(defined | embedded(logs)))
        else:
            store = ObjectStore(home / "s3", home / "logs")
            if owner:
                served = start_store(store, stack)
                stack.enter_context(_lent(home))
            else:
                stack.enter_context(held(home / BORROWERS / f"{os.getpid()}-{secrets.token_hex(4)}"))
                served = _borrowed(store, running)
            logs |= store.logs()
            stack.enter_context(applied(defined | served | embedded(logs), removed=FOREIGN))
            defined |= served
            make_bucket()
        if server is not None:
            server.wait()
        yield defined


@contextmanager
def registry_services(home: Path) -> Iterator[None]:
    """What reading a registry takes: nothing of ours where the environment names one in another place.

    Its objects are then where its s3:// URIs say: at the endpoint of the environment, or on AWS.
    """
    named, running = os.environ.get(REGISTRY_URI) or os.environ.get(TRACKING_URI), read_running(home)
    ours = {service.where for service in running.services} if running is not None else set()
    if named and named not in ours | set(tracking_environment(home).values()):
        tracking.check_database(named)
        with applied(basic_environment(home) | {TRACKING_URI: os.environ.get(TRACKING_URI) or named}):
            yield
    else:
        with embedded_services(make_home(), share=True):
            yield


def _turn(home: Path, stack: ExitStack, *, share: bool) -> tuple[bool, Running | None]:
    """Whether this command owns `home`, for as long as the stack lasts, and else the `elastic up` that does."""
    waiting = False
    while True:
        with ExitStack() as attempt:
            owner = attempt.enter_context(owned(home))
            running = None if owner else read_running(home)
            if owner or share or running is not None:
                stack.push(attempt.pop_all())
                return owner, running
        if not waiting:
            _log.warning(
                "another elastic command is using %s, and this one waits for it to end; Ctrl-C, and set %s to another "
                "directory, to run beside it",
                home,
                HOME,
            )
        waiting = True
        time.sleep(WAITING_SECONDS)


def _names_all(*, prefect: bool) -> bool:
    """Whether the environment names every service, so that none is started."""
    return names_a_store() and bool(os.environ.get(TRACKING_URI)) and (not prefect or bool(os.environ.get(PREFECT_API)))


def basic_environment(home: Path) -> dict[str, str]:
    """What every process of ours is to have: the state directory, where results go, a heartbeat, and no telemetry.

    A proxy is not asked for servers of this machine, whichever of them are ours.
    """
    wanted = {**QUIET, **HEARTBEAT, RESULTS: str(home / "prefect" / "storage")}
    unset = {name: value for name, value in wanted.items() if not os.environ.get(name)}
    return unset | {HOME: str(home)} | _without_proxy()


def embedded(logs: Mapping[str, str]) -> dict[str, str]:
    """The variable that says which others we set, to servers of ours, and where each server's log is."""
    return {EMBEDDED: json.dumps(dict(logs))}


def tracking_environment(home: Path) -> dict[str, str]:
    """MLflow on a SQLite file, with no server process."""
    return {TRACKING_URI: f"sqlite:///{home}/mlflow.db"}


def names_a_store() -> bool:
    """Whether the environment says which object store to use; on AWS a bucket is enough."""
    return any(os.environ.get(name) for name in (ENDPOINT_S3, ENDPOINT, BUCKET))


def start_store(store: ObjectStore, stack: ExitStack) -> dict[str, str]:
    """Start it, for as long as the stack lasts, and return what its clients need to know."""
    stack.callback(store.stop)
    store.start()
    return store.environment()


def make_bucket() -> None:
    """Make the bucket of the environment; return when it can store and give, a moment after SeaweedFS first answers."""
    settings = Settings.from_environment()
    ensure_bucket(settings)
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return check_bucket(settings)
        except ServiceError as error:
            if not error.transient or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@contextmanager
def owned(home: Path) -> Iterator[bool]:
    """Whether this process got the home directory's lock, which its end frees; SIGTERM leaves as Ctrl-C does."""
    with terminates_gracefully(), ExitStack() as stack:
        owner = True
        try:
            stack.enter_context(held(home / "lock"))
        except IsHeld:
            owner = False
        yield owner


@contextmanager
def terminates_gracefully() -> Iterator[None]:
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
def applied(defined: Mapping[str, str], removed: Sequence[str] = ()) -> Iterator[None]:
    """Set and remove variables of os.environ for the duration."""
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


@contextmanager
def _lent(home: Path) -> Iterator[None]:
    """Where the block ends well, wait for the commands that use what this one has started."""
    yield
    told = False
    for borrower in sorted((home / BORROWERS).glob("*")):
        while is_held(borrower):
            if not told:
                _log.warning("waiting for another elastic command, which uses the object store that this one started")
            told = True
            time.sleep(WAITING_SECONDS)
        borrower.unlink(missing_ok=True)


def _borrowed(store: ObjectStore, running: Running | None) -> dict[str, str]:
    """The owner's server, which may be about to come up."""
    if running is not None and not any(service.where == store.url for service in running.services):
        raise ServiceError("`elastic up` stores in the S3 of its own environment; set the same variables here")
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            if answers(store.url):
                return store.environment()
        time.sleep(0.1)
    raise ServiceError(
        f"the elastic command that uses {store.directory.parent} has no object store running; wait for it to end"
    )


def _without_proxy() -> dict[str, str]:
    """Keep a configured HTTP proxy from taking requests for this machine."""
    known = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    hosts = ",".join(dict.fromkeys(filter(None, (*known, "127.0.0.1", "localhost"))))
    return {"no_proxy": hosts, "NO_PROXY": hosts}
