"""`elastic up`, `status` and `down`, as real processes."""

import configparser
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests
from micro import Command, write_micro
from served import Served, descendants, eventually, kill, listening
from served import served as serving

pytestmark = pytest.mark.services

# A client of MLflow's own making, which reads the variables of its environment.
LISTS = """
import sys
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
S3ArtifactRepository(f"s3://{sys.argv[1]}").list_artifacts("")
"""

SERVICES = ["S3", "Prefect", "MLflow", "cpu worker", "gpu worker"]


def test_up_says_where_everything_is_and_status_agrees(served: Served):
    said = served.command("status")
    assert said.returncode == 0, said.stdout
    for text in (said.stdout, served.output.read_text()):
        for name in SERVICES:
            assert name in text
        for name in ("Prefect", "MLflow"):
            assert served.services()[name].where in text


def test_up_and_status_say_what_an_mlflow_client_needs_and_no_secret(served: Served):
    said = served.command("status").stdout
    lines = dict(line.removeprefix("export ").split("=", 1) for line in said.splitlines() if line.startswith("export "))
    assert lines["MLFLOW_TRACKING_URI"] == served.services()["MLflow"].where
    assert lines["MLFLOW_S3_ENDPOINT_URL"] == served.services()["S3"].where
    keys = configparser.ConfigParser()
    keys.read(lines["AWS_SHARED_CREDENTIALS_FILE"])
    secret = keys["default"]["aws_secret_access_key"]
    assert secret and all(secret not in text for text in (said, served.output.read_text()))
    assert all(line in served.output.read_text() for line in said.splitlines() if line.startswith("export "))
    client = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | lines
    listed = subprocess.run([sys.executable, "-c", LISTS, "elastic"], env=client, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr


@pytest.mark.parametrize("name", ["Prefect", "MLflow"])
def test_a_server_brings_its_user_interface(served: Served, name: str):
    page = requests.get(served.services()[name].where, timeout=30)
    assert page.status_code == 200 and name.lower() in page.text.lower()


def test_every_port_is_of_this_machine_alone(served: Served):
    assert listening(descendants(psutil.Process(served.process.pid))) == {"127.0.0.1"}


def test_nothing_of_the_servers_reports_to_their_makers(served: Served):
    settings = requests.get(f"{served.services()['Prefect'].where}/api/admin/settings", timeout=30).json()
    assert settings["server"]["analytics_enabled"] is False
    for name in ("MLflow", "Prefect", "cpu worker", "gpu worker"):
        environment = psutil.Process(served.services()[name].pid).environ()
        assert environment["DO_NOT_TRACK"] == "true" and environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_second_one_of_the_same_directory_is_refused(served: Served):
    second = served.command("up", str(served.command.recipe))
    assert second.returncode == 1
    assert "is in use: see `elastic status`" in second.stderr


@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port", "--s3-port"])
def test_a_port_that_is_asked_for_and_taken_is_refused(tmp_path: Path, option: str):
    command = Command(recipe=write_micro(tmp_path), home=tmp_path / "home")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("up", str(command.recipe), option, str(port))
    assert done.returncode == 1
    assert f"port {port} is taken" in done.stderr and option in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("missing.yaml",), "missing.yaml"),
        (("RECIPE", "--schedule", "daily", "--max-gpu-hours", "1"), "is not a cron expression"),
    ],
    ids=["recipe", "schedule"],
)
def test_what_cannot_be_served_is_refused_in_one_line(tmp_path: Path, arguments: tuple[str, ...], text: str):
    command = Command(recipe=write_micro(tmp_path), home=tmp_path / "home")
    done = command("up", *(str(command.recipe) if argument == "RECIPE" else argument for argument in arguments))
    assert done.returncode == 1
    assert text in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_killed_comes_back_where_it_was(served: Served, name: str):
    before = served.services()[name]
    kill(before.pid)
    after = eventually(lambda: served.services()[name] if served.services()[name].pid != before.pid else None)
    assert (after.where, after.log) == (before.where, before.log)
    eventually(lambda: served.command("status").returncode == 0)


@pytest.mark.slow
def test_down_ends_all_of_it_and_up_goes_on_where_it_was(tmp_path: Path):
    command = Command(recipe=write_micro(tmp_path), home=tmp_path / "home")
    with serving(command) as first:
        before, processes = first.services(), descendants(psutil.Process(first.process.pid))
        done = command("down")
        assert done.returncode == 0, done.stderr
        assert first.process.wait(10) == 128 + signal.SIGTERM
        assert not [process for process in processes if process.is_running()]
    assert command("status").returncode == 1
    assert "nothing is running" in command("down").stdout
    with serving(command) as second:
        assert {name: service.where for name, service in second.services().items()} == {
            name: service.where for name, service in before.items()
        }
        processes = descendants(psutil.Process(second.process.pid))
        second.process.kill()
        eventually(lambda: not [process for process in processes if process.is_running()], what=str(processes))
        time.sleep(0.1)
    assert command("status").returncode == 1
