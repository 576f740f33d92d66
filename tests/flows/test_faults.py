"""Whatever dies or fails on the way, a run ends with the same weights, every metric once, and nothing half made."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from disk import fill
from laws import Outcome, Place, watching
from micro import Command, Run, completed
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from progress import STEP
from proxy import FAULTS, fault_proxy
from served import Served, eventually
from served import served as serving

from flows.serving.servers import MlflowServer, ObjectStore
from flows.serving.services import embedded_services
from tasks.artifacts import Store, open_store
from tasks.running.loopback import free_ports
from tasks.settings import BUCKET, ENDPOINT_S3, TRACKING_URI, Settings

pytestmark = pytest.mark.faults

SHARE = 0.2
SPARED = 3  # short steps at the end, which a server that is warm does sooner than the clean run did


@pytest.fixture(scope="module")
def alone(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """In a state directory that holds nothing else."""
    return replace(command, home=tmp_path_factory.mktemp("clean") / "home")


@pytest.fixture(scope="module")
def finished(alone: Command) -> Run:
    """A run to which nothing happens."""
    return completed(alone)


@pytest.fixture(scope="module")
def clean(finished: Run, alone: Command) -> Outcome:
    """What it made."""
    return outcome_in(alone.home)


def outcome_in(home: Path) -> Outcome:
    """What was registered in a state directory."""
    with embedded_services(home):
        settings = Settings.from_environment()
        with closing((store := open_store(settings)).client):
            return Place(settings.tracking_uri, store).outcome("micro")


@pytest.fixture(scope="module")
def up(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An `elastic up` of our own, since others need theirs whole."""
    with serving(replace(command, home=tmp_path_factory.mktemp("killed") / "home")) as running:
        yield running


@pytest.fixture(scope="module")
def place(up: Served) -> Iterator[Place]:
    server = ObjectStore(up.home / "s3", up.home / "logs")
    settings = Settings(tracking_uri=up.services()["MLflow"].where, bucket="elastic", endpoint_url=server.url)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        store = open_store(settings)
    with closing(store.client):
        yield Place(settings.tracking_uri, store)


def test_a_run_killed_in_every_step_ends_the_same(clean: Outcome, finished: Run, up: Served, place: Place) -> None:
    took = [float(seconds) for _, seconds in STEP.findall(finished.stderr)]
    with watching(place):
        killed = [kill_after(up.command, done, seconds / 2) for done, seconds in enumerate(took)]
        assert killed.count(False) <= SPARED, killed
        assert not up.trainers()
        completed(up.command)
    assert place.outcome("micro") == clean
    assert_gc_leaves_nothing(up.command, place)


def kill_after(command: Command, steps: int, seconds: float) -> bool:
    """Start the run, and kill -9 it so many seconds after so many steps; False where it ended well before that."""
    process = command.start("run", str(command.recipe))
    for _ in range(steps):
        next(filter(STEP.match, process.stderr))
    eventually((command.home / "workspace").exists)
    time.sleep(seconds)
    process.kill()
    _, said = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


def assert_gc_leaves_nothing(command: Command, place: Place) -> None:
    """`elastic gc` finds all that is in the bucket for nothing; what it leaves belongs to a version."""
    lost = place.unreferenced()
    listed = command("gc", "--older-than", "0")
    assert listed.returncode == 0, listed.stderr
    assert all(key in listed.stdout or key.split("/")[2] in listed.stdout for key in lost), (lost, listed.stdout)
    removed = command("gc", "--older-than", "0", "--delete", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert not place.unreferenced()


# A step of the pipeline, and what shows that it is under way.
SIGNS = {
    "train_tokenizer": "workspace",
    "prepare_data": "workspace/tokenizer-*",
    "pretrain_teacher": "workspace/pretrain-*/metrics.jsonl",
    "rotate_teacher": "workspace/pretrain-*/checkpoint",
    "rank_importance": "workspace/rotated-*",
    "reorder_teacher": "workspace/importance-*",
    "choose_shapes": "workspace/reordered-*",
    "compare_orders": "workspace/shaped-*",
    "distil stage1": "workspace/stage1-*/metrics.jsonl",
    "distil stage2": "workspace/stage2-*/metrics.jsonl",
    "slice_budget": "workspace/stage2-*/family",
    "evaluate": "workspace/slice-s-*",
    "register": "workspace/report-*",
    "promote": "workspace/curves-*",
}
# Each dies at every step, together with the others of its row; in the last the runs live on without Prefect's server.
VICTIMS = {
    "processes": ("S3", "run", "trainer"),
    "services": ("MLflow", "Prefect", "cpu worker", "gpu worker"),
    "server": ("Prefect",),
}


@pytest.mark.parametrize("victims", VICTIMS)
def test_a_run_around_which_all_dies_at_every_step_ends_the_same(
    clean: Outcome, up: Served, place: Place, victims: str
) -> None:
    for known in ("workspace", "prefect/storage"):
        shutil.rmtree(up.home / known, ignore_errors=True)
    recipe = up.recipe(f"family={victims}")
    up.start("elastify/micro-whole-recipe", recipe=recipe)

    def reached(sign: str) -> bool:
        answered(lambda: go_on(up, recipe))
        return any(up.home.glob(sign))

    def ended() -> bool:
        return answered(lambda: go_on(up, recipe).state.is_completed())

    with watching(place):
        for step, sign in SIGNS.items():
            eventually(lambda sign=sign: reached(sign), f"{step} never began")
            for victim in VICTIMS[victims]:
                strike(up, victim)
        eventually(ended, "no run completed")
    eventually(lambda: up.command("status").returncode == 0)
    outcome = place.outcome(victims)
    assert (outcome.weights, outcome.curves) == (clean.weights, clean.curves)
    assert_gc_leaves_nothing(up.command, place)


def go_on(up: Served, recipe: dict[str, Any]) -> FlowRun:
    """The last run; where runs crashed too often for it to be begun, do what a user does, and start another."""
    last = asked_for(up)[-1]
    if last.state.is_failed():
        assert "start a run to go on" in last.state.message, last.state.message
        up.start("elastify/micro-whole-recipe", recipe=recipe)
    return last


def asked_for(up: Served) -> list[FlowRun]:
    """The runs of `elastify`, begun or not, oldest first."""
    with up.prefect() as client:
        deployment = client.read_deployment_by_name("elastify/micro-whole-recipe").id
        runs = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        return [run for run in runs if run.deployment_id == deployment]


def answered(question: Callable[[], Any]) -> Any:
    """The answer, or None of a server that is away."""
    try:
        return question()
    except httpx.HTTPError:
        return None


def strike(up: Served, victim: str) -> None:
    """Kill -9; nothing where the victim has just ended by itself, or of another's death."""
    with suppress(psutil.NoSuchProcess):
        for process in processes_of(up, victim):
            process.kill()


def processes_of(up: Served, victim: str) -> list[psutil.Process]:
    """The processes of a victim, of which there may be none just now."""
    if victim == "trainer":
        return up.trainers()
    if victim == "run":
        return list(up.flow_processes().values())
    return [psutil.Process(up.services()[victim].pid)]


def test_a_disk_that_fills_up_stops_a_run_which_goes_on_when_it_has_room(
    clean: Outcome, command: Command, small_disk: Path
) -> None:
    cramped = replace(command, home=small_disk / "home")
    process = cramped.start("run", str(command.recipe))
    begun = cramped.home / "workspace"
    eventually(lambda: process.poll() is not None or list(begun.glob("stage1-*/checkpoints/step-*")))
    assert process.poll() is None, process.stderr.read()
    filler = fill(small_disk / "filler")
    (first,) = cramped.processes("elastic_core.training.job")
    eventually(lambda: set(cramped.processes("elastic_core.training.job")) - {first}, "training went on without room")
    process.kill()
    process.communicate(timeout=60)
    told = cramped.run()
    assert told.returncode == 1
    assert re.fullmatch(
        r"elastic: the state directory .* cannot be written \(No space left on device\); .*\n", told.stderr
    )
    filler.unlink()
    completed(cramped)
    assert outcome_in(cramped.home) == clean


def test_a_run_whose_network_spoils_one_request_in_five_ends_the_same(
    clean: Outcome, command: Command, settings: Settings, store: Store, tmp_path: Path
) -> None:
    database, port = f"sqlite:///{tmp_path}/mlflow.db", free_ports(1)[0]
    server = MlflowServer(tmp_path, tmp_path / "logs", port, database=database, bucket=settings.bucket)
    with ExitStack() as stack:
        stack.callback(server.stop)
        server.start()
        server.wait()
        s3 = stack.enter_context(fault_proxy(settings.endpoint_url, SHARE))
        mlflow = stack.enter_context(fault_proxy(server.url, SHARE))
        spoilt = Command(
            recipe=command.recipe,
            home=tmp_path / "home",
            extra={
                **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
                ENDPOINT_S3: s3.url,
                "MLFLOW_S3_ENDPOINT_URL": s3.url,
                TRACKING_URI: mlflow.url,
                BUCKET: settings.bucket,
            },
        )
        place = Place(server.url, store)
        with watching(place):
            completed(spoilt)
            pulled = spoilt("pull", "micro-s", "-o", str(tmp_path / "pulled"))
        assert pulled.returncode == 0, pulled.stderr
        assert place.outcome("micro") == clean
        assert_gc_leaves_nothing(spoilt, place)
        assert all((s3.seen + mlflow.seen)[fault] for fault in FAULTS), (s3.seen, mlflow.seen)
