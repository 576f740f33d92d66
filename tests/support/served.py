"""`elastic up` on a micro family, and what a user of its Prefect server does: start runs, look at them, wait."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import requests
from micro import ELASTIC, LIMIT_SECONDS, Command, Run
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import Artifact, FlowRun, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort

from elastic_core.schema import told
from flows.commands.recipes import load_recipe
from flows.serving.running import Service, read_running

SCHEDULE = "30 2 * * *"  # not the default
OFTEN = CronSchedule(cron="* * * * * */30")


def eventually(true: Callable[[], Any], what: str = "", story: Callable[[], str] = lambda: "") -> Any:
    """The first result that is true; where none comes, `story` tells what went on instead."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not (result := true()):
        assert time.monotonic() < deadline, f"{what or 'it never came true'}\n{story()}"
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
        answer = requests.get(
            f"{self.services()['MLflow'].where}/api/2.0/mlflow/{path}", params=query, timeout=LIMIT_SECONDS
        )
        return dict(answer.json())

    def aliases(self, model: str) -> dict[str, int]:
        """The versions of a registered model by alias."""
        found = self.mlflow("registered-models/get", name=model).get("registered_model", {})
        return {alias["alias"]: int(alias["version"]) for alias in found.get("aliases", ())}

    def mlflow_run(self, model: str, version: int = 1) -> str:
        """The MLflow run that made a registered version."""
        found = self.mlflow("model-versions/get", name=model, version=str(version))
        return str(found["model_version"]["run_id"])

    def recipe(self, *overrides: str) -> dict[str, Any]:
        return told(load_recipe(self.command.recipe, overrides))

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
        ended = f"run {identity} does not end"
        eventually(lambda: self.run(identity).state.is_final(), ended, self.story)
        return self.run(identity)

    def runs(self, flow: str | None = None) -> list[FlowRun]:
        """The runs of a flow, or of all, that were begun, oldest first; the last ones, if Prefect gives not all."""
        with self.prefect() as client:
            return client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])) if flow else None,
                flow_run_filter=FlowRunFilter(start_time=FlowRunFilterStartTime(is_null_=False)),
                sort=FlowRunSort.START_TIME_DESC,
            )[::-1]

    def ticks(self) -> list[FlowRun]:
        """The retrainings that the schedule began and that ended, oldest first."""
        return [run for run in self.runs("retrain") if run.auto_scheduled and run.state.is_final()]

    def suspended(self) -> list[FlowRun]:
        """The retrainings that wait for a person."""
        return [run for run in self.runs("retrain") if run.state.name == "Suspended"]

    @contextmanager
    def ticking(self, **parameters: Any) -> Iterator[None]:
        """Retrain twice a minute, with other parameters than the deployment's; afterwards as before.

        A tick starts a process of its own, so that a schedule which goes on slows all that is tested beside it.
        """
        with self.prefect() as client:
            deployment = client.read_deployment_by_name("retrain/micro")
            often = [DeploymentScheduleUpdate(schedule=OFTEN, active=True)]
            asked = DeploymentUpdate(parameters=deployment.parameters | parameters, schedules=often)
            client.update_deployment(deployment.id, asked)
            try:
                yield
            finally:
                before = [
                    DeploymentScheduleUpdate(schedule=held.schedule, active=held.active)
                    for held in deployment.schedules
                ]
                as_it_was = DeploymentUpdate(parameters=deployment.parameters, schedules=before)
                client.update_deployment(deployment.id, as_it_was)

    def step(self, name: str) -> FlowRun | None:
        """The step that a worker of the gpu pool is doing now, by the name of its run."""
        return next((run for run in self.runs("gpu-step") if run.name == name and run.state.is_running()), None)

    def waiting(self, pool: str) -> list[FlowRun]:
        """The runs that no worker of the pool has taken yet, but for those of a schedule."""
        scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
        of_pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
        with self.prefect() as client:
            return [
                run
                for run in client.read_flow_runs(
                    sort=FlowRunSort.EXPECTED_START_TIME_ASC, work_pool_filter=of_pool, flow_run_filter=scheduled
                )
                if not run.auto_scheduled
            ]

    def flow_processes(self) -> dict[str, psutil.Process]:
        """The processes of the flow runs that the workers do now, by the id of the run."""
        found = {}
        for child in descendants(psutil.Process(self.process.pid)):
            with suppress(psutil.Error):  # others end while one looks at them
                if "prefect.engine" in child.cmdline():
                    found[child.environ()["PREFECT__FLOW_RUN_ID"]] = child
        return found

    def artifacts(self, run: UUID) -> dict[str, Artifact]:
        """What a run's page shows, by key."""
        with self.prefect() as client:
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
            )
        return {artifact.key: artifact for artifact in found if artifact.key}

    def log(self, run: UUID) -> list[str]:
        """What a run's page shows of its log."""
        with self.prefect() as client:
            return [line.message for line in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run])))]

    def story(self) -> str:
        """The last runs, and how the logs of the workers end."""
        told = [f"{run.start_time:%H:%M:%S} {run.name}: {run.state.name}, {run.state.message}" for run in self.runs()]
        logs = sorted((self.home / "logs").glob("worker-*.log"))
        return "\n".join(told[-40:] + [f"{log.name}:\n{log.read_text()[-4000:]}" for log in logs])

    def trainers(self) -> list[psutil.Process]:
        """The launchers of training that work in this state directory."""
        return self.command.processes("elastic_core.training.launch")


@dataclass(frozen=True)
class Elastified:
    """A run of `elastify` killed in distillation, the one that went on for it, and the progress seen, in percent."""

    killed: UUID
    run: UUID
    progress: list[float]


def elastify(served: Served) -> Elastified:
    """Start a run as the form does, watch it, kill its process in distillation, and wait for what comes of it."""
    killed = served.start("elastify/micro")
    eventually(lambda: served.step("distil stage1"), "distillation does not begin")
    progress: list[float] = []

    def moved() -> bool:
        assert not served.run(killed).state.is_final(), "the run ended before its progress moved"
        shown = served.artifacts(killed).get("stage1")
        if shown is not None and shown.data not in progress:
            progress.append(float(shown.data))
        return len(progress) > 1

    eventually(moved, "progress does not move")
    kill(served.flow_processes()[str(killed)].pid)
    assert served.ended(killed).state.is_crashed()
    began = served.run(killed).start_time
    later = eventually(lambda: [run for run in served.runs("elastify") if run.start_time > began], "none goes on")
    served.ended(later[0].id)
    return Elastified(killed=killed, run=later[0].id, progress=progress)


def assert_made(served: Served, run: UUID, finished: Run) -> None:
    """The first run of the micro recipe ended in the weights of `finished`, registered under aliases."""
    assert served.run(run).state.is_completed(), served.run(run).state.message
    families = (served.home / "workspace").glob("stage2-*/family")
    first = min(families, key=lambda family: family.stat().st_mtime)
    assert weights(first) == weights(finished.family)
    for budget in ("l", "m", "s"):
        assert served.aliases(f"micro-{budget}") == {"candidate": 1, "champion": 1}


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


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
        eventually(lambda: process.poll() is not None or "Ctrl-C" in output.read_text())
        assert process.poll() is None, output.read_text()
        yield Served(command=command, process=process, output=output)
    finally:
        process.terminate()
        process.wait(LIMIT_SECONDS)


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
