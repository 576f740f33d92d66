"""Laws of the embedded services, with real processes."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from objects import exists

from flows.serving import servers, services
from flows.serving.running import read_running, this_process, write_running
from flows.serving.servers import ObjectStore
from flows.serving.services import embedded_services, registry_services
from tasks.artifacts import check_bucket, open_store, put_file
from tasks.settings import ServiceError, Settings

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[3]
LIMIT_SECONDS = 60.0  # far beyond what any of this takes; a test that hangs should end
COMMAND = """
import logging, sys
from pathlib import Path
from flows.serving import services
from tasks.running import processes
from tasks.settings import ServiceError
logging.getLogger("flows").addHandler(logging.StreamHandler(sys.stdout))
if "elsewhere" in sys.argv:
    processes._GUARD = processes._GUARD.replace('"linux"', '"none"')
try:
    with services.embedded_services(Path(sys.argv[1]), share="share" in sys.argv) as defined:
        print(defined["AWS_ENDPOINT_URL_S3"], flush=True)
        sys.stdin.read()
except ServiceError as error:
    print(f"refused: {error}", flush=True)
"""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_", "ELASTIC_", "PREFECT_", "DO_NOT_TRACK")):
            monkeypatch.delenv(name)


@contextmanager
def command(home: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """An `elastic` command in a process of its own, and the first line it says: where its object store is."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(home), *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def servers_of(pid: int, home: Path) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if child.name() == "weed" and f"-dir={home}/s3/data" in child.cmdline()]


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def test_services_are_there_within_the_block_and_leave_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = {
        "AWS_SESSION_TOKEN": "of another account",
        "AWS_PROFILE": "none-such",
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    (tmp_path / "file").write_text("kept")
    home = tmp_path / "home"
    with embedded_services(home) as defined:
        assert {name: os.environ[name] for name in defined} == defined
        settings = Settings.from_environment()
        assert (settings.home, settings.bucket) == (home, "elastic")
        assert settings.tracking_uri == f"sqlite:///{home}/mlflow.db"
        uri = f"s3://{settings.bucket}/kept"
        put_file(open_store(settings), tmp_path / "file", uri)
        (server,) = servers_of(os.getpid(), home)
        listening = [c.laddr.ip for c in server.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        assert listening and set(listening) == {"127.0.0.1"}
        keys = (defined["AWS_ACCESS_KEY_ID"], defined["AWS_SECRET_ACCESS_KEY"])
        assert keys[1] not in " ".join(server.cmdline()) and keys[1] not in str(server.environ())
    assert dict(os.environ) == before
    assert not server.is_running()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home / "s3").glob("*.json")] == [0o600] * 2
    assert (home / "logs" / "seaweedfs.log").read_text()

    port = int(defined["AWS_ENDPOINT_URL_S3"].rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ZeroDivisionError), embedded_services(home) as second:
        assert second["AWS_ENDPOINT_URL_S3"] != defined["AWS_ENDPOINT_URL_S3"]
        assert (second["AWS_ACCESS_KEY_ID"], second["AWS_SECRET_ACCESS_KEY"]) == keys
        assert exists(open_store(Settings.from_environment()), uri)
        (server,) = servers_of(os.getpid(), home)
        raise ZeroDivisionError
    assert dict(os.environ) == before
    assert not server.is_running()


def test_the_store_stays_until_those_who_share_it_are_done(tmp_path: Path) -> None:
    with command(tmp_path) as (owner, endpoint), command(tmp_path, "share") as (reader, shared):
        assert shared == endpoint and owner.stdin and owner.stdout and reader.stdin
        owner.stdin.close()
        assert owner.stdout.readline() == (
            "waiting for another elastic command, which uses the object store that this one started\n"
        )
        assert owner.poll() is None and len(servers_of(owner.pid, tmp_path)) == 1
        reader.stdin.close()
        assert (reader.wait(LIMIT_SECONDS), owner.wait(LIMIT_SECONDS)) == (0, 0)
    assert not [*(tmp_path / "locks/borrowers").iterdir()]
    with command(tmp_path) as (owner, _), command(tmp_path, "share") as (reader, _):
        owner.send_signal(signal.SIGINT)  # does not wait
        assert eventually(lambda: owner.poll() is not None) and reader.poll() is None


def test_a_second_command_waits_for_the_first_or_shares(tmp_path: Path) -> None:
    with command(tmp_path) as (owner, endpoint):
        assert endpoint.startswith("http://127.0.0.1:")
        with command(tmp_path, "share") as (reader, shared):
            assert shared == endpoint
            assert servers_of(reader.pid, tmp_path) == []
            end(reader)
        assert len(servers_of(owner.pid, tmp_path)) == 1
        with command(tmp_path) as (second, said):
            assert said.startswith("another elastic command is using") and "ELASTIC_HOME" in said
            assert servers_of(second.pid, tmp_path) == []
            end(owner)
            assert second.stdout is not None and second.stdout.readline().strip() == endpoint
            end(second)


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(LIMIT_SECONDS) == 0


@pytest.mark.skipif(not psutil.LINUX, reason="there psutil counts from the boot time, which a set clock moves")
def test_a_clock_that_is_set_hides_nothing_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot, running = psutil.boot_time(), this_process({}, ())
    write_running(tmp_path, running)
    for seconds in (-1.0, 3600.0):
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda by=seconds: boot + by)
        assert read_running(tmp_path) is not None
    write_running(tmp_path, replace(running, started=running.started + 0.01))  # another process with its number
    assert read_running(tmp_path) is None


@pytest.mark.parametrize("system", ["here", "elsewhere"])
def test_no_server_outlives_a_command_that_is_killed(tmp_path: Path, system: str) -> None:
    with command(tmp_path, system) as (process, _):
        (server,) = servers_of(process.pid, tmp_path)
        process.send_signal(signal.SIGKILL)
        assert eventually(lambda: not server.is_running())
    with command(tmp_path, system) as (process, endpoint):  # at once, on the same data
        assert endpoint.startswith("http://127.0.0.1:")
        (server,) = servers_of(process.pid, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_SECONDS) == 128 + signal.SIGTERM
        assert not server.is_running()


def test_what_the_environment_names_is_used_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {
        "AWS_ENDPOINT_URL": "http://s3.example",
        "ELASTIC_BUCKET": "models",
        "MLFLOW_TRACKING_URI": "http://mlflow.example",
        "PREFECT_API_URL": "http://prefect.example/api",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "77",
        "AWS_PROFILE": "work",
    }
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(servers, "_weed", lambda: pytest.fail("started a server"))
    with embedded_services(tmp_path) as defined:
        assert not named.keys() & defined.keys()
        assert not [name for name in defined if name.startswith("AWS_")]
        assert {name: os.environ[name] for name in named} == named


def test_a_bucket_of_ones_own_means_ones_own_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_BUCKET", "models")  # on AWS there is no endpoint to name
    monkeypatch.setattr(servers, "_weed", lambda: pytest.fail("started a server"))
    with embedded_services(tmp_path) as defined:
        assert "AWS_ENDPOINT_URL_S3" not in defined
        assert defined["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_reader_of_a_registry_elsewhere_names_no_bucket_and_starts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "_weed", lambda: pytest.fail("started a server"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    with registry_services(tmp_path / "home"):
        assert Settings.from_environment(need_bucket=False).endpoint_url is None
        assert os.environ["DO_NOT_TRACK"]
    assert not (tmp_path / "home").exists()


def test_a_reader_of_the_registry_here_shares_the_store_of_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTIC_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with command(tmp_path) as (_, endpoint), registry_services(tmp_path):
        assert Settings.from_environment().endpoint_url == endpoint


def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "weed"
    broken.write_text("#!/bin/sh\necho no room; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(servers, "_weed", lambda: str(broken))
    with pytest.raises(ServiceError, match=r"SeaweedFS did not start: no room; its log is .*seaweedfs\.log"):
        ObjectStore(tmp_path / "s3", tmp_path / "logs").start()


def test_every_variable_means_something_to_its_reader(tmp_path: Path) -> None:
    server = servers.PrefectServer(tmp_path, tmp_path, 1)
    defined = {**server.environment(), **services.tracking_environment(tmp_path), **servers.QUIET}
    code = """
import mlflow.environment_variables, mlflow.telemetry.utils, os
from prefect.settings import get_current_settings
settings = get_current_settings()
assert str(settings.home) == os.environ["PREFECT_HOME"]
assert settings.api.url == os.environ["PREFECT_API_URL"]
assert not settings.server.analytics_enabled
assert mlflow.telemetry.utils.is_telemetry_disabled()
known = vars(mlflow.environment_variables)
assert all(name in known for name in os.environ if name.startswith("MLFLOW_") and name != "MLFLOW_LOGGING_LEVEL")
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **defined}, cwd=tmp_path, check=True)


def test_a_store_of_ours_that_dies_is_explained_by_its_log_and_not_by_a_variable_nobody_set(tmp_path: Path) -> None:
    with embedded_services(tmp_path):
        for server in servers_of(os.getpid(), tmp_path):
            server.kill()
            server.wait(10)
        log = re.escape(f"{tmp_path}/logs/seaweedfs.log")
        with pytest.raises(ServiceError, match=f"elastic started this server, and its log is {log}") as died:
            check_bucket(Settings.from_environment())
        assert "AWS_" not in str(died.value)
