"""`elastic up` on a micro family, and what a user of its Prefect server does: start runs, look at them, wait."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import requests
from micro import ELASTIC, Command
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact, FlowRun

from elastic_core.config import to_dict
from flows.recipes import load_recipe
from flows.running import Service, read_running

START_SECONDS = 240.0
RUN_SECONDS = 900.0  # far beyond what a run takes; a test that hangs should end


def eventually(true: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """The first result that is true."""
    deadline = time.monotonic() + seconds
    while not (result := true()):
        assert time.monotonic() < deadline, what or "it never came true"
        time.sleep(0.2)
    return result


@dataclass(frozen=True)
class Served:
    """A running `elastic up`."""

    command: Command
    process: subprocess.Popen[str]
    output: Path

    @property
    def home(self) -> Path:
        return self.command.home

    def services(self) -> dict[str, Service]:
        running = read_running(self.home)
        assert running is not None, self.output.read_text()
        return {service.name: service for service in running.services}

    def environment(self) -> dict[str, str]:
        """What a client needs: Prefect's and MLflow's addresses."""
        running = read_running(self.home)
        assert running is not None
        return dict(running.environment)

    @contextmanager
    def prefect(self) -> Iterator[SyncPrefectClient]:
        with SyncPrefectClient(api=f"{self.services()['Prefect'].where}/api") as client:
            yield client

    def mlflow(self, path: str, **query: str) -> dict[str, Any]:
        answer = requests.get(f"{self.services()['MLflow'].where}/api/2.0/mlflow/{path}", params=query, timeout=30)
        return dict(answer.json())

    def aliases(self, model: str) -> dict[str, int]:
        """The versions of a registered model by alias."""
        found = self.mlflow("registered-models/get", name=model).get("registered_model", {})
        return {alias["alias"]: int(alias["version"]) for alias in found.get("aliases", ())}

    def recipe(self, *overrides: str) -> dict[str, Any]:
        return to_dict(load_recipe(self.command.recipe, overrides))

    def start(self, deployment: str, **parameters: Any) -> UUID:
        """Start a run as the form does."""
        with self.prefect() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def run(self, identity: UUID) -> FlowRun:
        with self.prefect() as client:
            return client.read_flow_run(identity)

    def ended(self, identity: UUID) -> FlowRun:
        """The run once it has ended."""
        eventually(lambda: self.run(identity).state.is_final(), RUN_SECONDS, f"run {identity} does not end")
        return self.run(identity)

    def runs(self, flow: str) -> list[FlowRun]:
        """All runs of a flow that were begun, oldest first."""
        with self.prefect() as client:
            flows = {found.id for found in client.read_flows() if found.name == flow}
            return sorted(
                (run for run in client.read_flow_runs() if run.flow_id in flows and run.start_time),
                key=lambda run: run.start_time,
            )

    def artifacts(self, run: UUID) -> dict[str, Artifact]:
        """What a run's page shows, by key."""
        with self.prefect() as client:
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
            )
        return {artifact.key: artifact for artifact in found if artifact.key}

    def trainers(self) -> list[psutil.Process]:
        """The launchers of training that work in this state directory."""
        return self.command.processes("torch.distributed.run")


@contextmanager
def served(command: Command, *arguments: str, extra: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Run `elastic up` for the duration; it must stop when it is told to."""
    command.home.parent.mkdir(parents=True, exist_ok=True)
    output = command.home.with_suffix(".up.log")
    with output.open("w") as file:
        process = subprocess.Popen(
            [*ELASTIC, "up", str(command.recipe), *arguments],
            env=command.environment() | (extra or {}),
            cwd=Path(__file__).parents[2],
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        eventually(lambda: process.poll() is not None or "Ctrl-C" in output.read_text(), START_SECONDS)
        assert process.poll() is None, output.read_text()
        yield Served(command=command, process=process, output=output)
    finally:
        process.terminate()
        process.wait(120)


def descendants(process: psutil.Process) -> Sequence[psutil.Process]:
    return process.children(recursive=True)


def listening(processes: Sequence[psutil.Process]) -> set[str]:
    """The addresses at which they listen."""
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, 9)
