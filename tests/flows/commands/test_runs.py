"""`elastic runs`, `logs` and `cancel` on a Prefect server, where a thread stands for the worker that ends a run."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import LogCreate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Crashed, Running
from prefect.testing.utilities import prefect_test_harness
from prefect.types._datetime import now
from typer.testing import CliRunner

from flows.cli import app
from tasks.settings import HOME, PREFECT_API, ServiceError


@flow(name="elastify")
def family() -> None:
    step()


@flow(name="gpu-step")
def step() -> None:
    pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with prefect_test_harness(180):
        yield PREFECT_API_URL.value()


@pytest.fixture
def client(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    """A client of the server that the environment names."""
    monkeypatch.setenv(PREFECT_API, server)
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    with get_client(sync_client=True) as opened:
        yield opened


@pytest.fixture
def begin(client: SyncPrefectClient) -> Callable[[str], FlowRun]:
    """Begins a run of a deployment, under a name."""
    found = client.create_deployment(client.create_flow(family), "micro")

    def run(name: str) -> FlowRun:
        return client.create_flow_run_from_deployment(found, name=name, state=Running())

    return run


def elastic(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result.output


@contextmanager
def worker(run: UUID) -> Iterator[None]:
    """Ends the run once it is to be cancelled, as the worker does that has its process."""
    stop = threading.Event()

    def work() -> None:
        with get_client(sync_client=True) as client:
            while not stop.is_set():
                state = client.read_flow_run(run).state
                if state is not None and state.is_cancelling():
                    client.set_flow_run_state(run, Cancelled(), force=True)
                    return
                time.sleep(0.1)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.services
def test_runs_lists_runs_by_name_and_leaves_out_the_steps_that_are_runs_of_their_own(
    begin: Callable[[str], FlowRun], client: SyncPrefectClient
) -> None:
    run = begin("nano 2026-12-01")
    family()
    rows = json.loads(elastic("runs", "--json"))
    (row,) = (row for row in rows if str(run.id).startswith(row["id"]))
    assert (row["run"], row["flow"], row["state"]) == ("nano 2026-12-01", "elastify", "Running")
    assert {row["flow"] for row in rows} == {"elastify"}
    assert "nano 2026-12-01" in elastic("runs")


@pytest.mark.services
def test_logs_has_the_lines_of_a_run_and_of_its_steps_in_one_order(client: SyncPrefectClient) -> None:
    family()
    mine = client.read_flow_runs(limit=200)
    parent = max((run for run in mine if run.parent_task_run_id is None), key=lambda run: run.created)
    (child,) = (run for run in mine if run.parent_task_run_id and run.created > parent.created)
    said = [(parent, "one"), (child, "two"), (parent, "three")]
    for run, message in said:
        line = LogCreate(name="tasks", level=20, message=message, timestamp=now("UTC"), flow_run_id=run.id)
        client.request("POST", "/logs/", json=[line.model_dump(mode="json")])
    lines = elastic("logs", str(parent.id)[:13]).splitlines()
    ours = [line.partition("INFO    ")[2] for line in lines if line.endswith(("one", "two", "three"))]
    assert ours == ["one", f"{child.name}: two", "three"]


@pytest.mark.services
def test_cancel_returns_when_the_run_has_ended_and_says_where_it_has_already(
    begin: Callable[[str], FlowRun], client: SyncPrefectClient
) -> None:
    run = begin("nano 2026-12-02")
    with worker(run.id):
        said = elastic("cancel", "nano 2026-12-02")
    assert "nano 2026-12-02 is Cancelled" in said
    state = client.read_flow_run(run.id).state
    assert state is not None and state.is_cancelled()
    with pytest.raises(ValueError, match="nano 2026-12-02 has ended: it is Cancelled"):
        elastic("cancel", "nano 2026-12-02")


@pytest.mark.services
def test_a_run_that_crashed_and_goes_on_as_another_is_told_of_with_the_other(
    begin: Callable[[str], FlowRun], client: SyncPrefectClient
) -> None:
    crashed = begin("nano 2026-12-06")
    client.set_flow_run_state(crashed.id, Crashed(), force=True)
    with pytest.raises(ValueError, match=r"has ended: it is Crashed$"):
        elastic("cancel", str(crashed.id))
    assert crashed.deployment_id is not None
    other = client.create_flow_run_from_deployment(crashed.deployment_id)
    with pytest.raises(ValueError, match=f"it is Crashed, and run {str(other.id)[:8]} goes on in its place: cancel"):
        elastic("cancel", str(crashed.id))


@pytest.mark.services
def test_a_run_of_no_deployment_is_ended_where_it_runs(client: SyncPrefectClient) -> None:
    run = client.create_flow_run(family, name="here 2026-12-03", state=Running())
    with pytest.raises(ValueError, match=r"in the process of an `elastic run`: end it there"):
        elastic("cancel", str(run.id))


@pytest.mark.services
def test_a_name_of_none_or_of_several_runs_is_told(begin: Callable[[str], FlowRun]) -> None:
    for none in ("no-such-run", str(uuid4())):
        with pytest.raises(ValueError, match=f"'{none}' is no run; `elastic runs` lists them"):
            elastic("logs", none)
    twice = [begin("nano 2026-12-04") for _ in range(2)]
    with pytest.raises(ValueError, match="is 2 runs: give the id of one") as told:
        elastic("cancel", "nano 2026-12-04")
    assert all(str(run.id)[:8] in str(told.value) for run in twice)


@pytest.mark.parametrize("arguments", [("runs",), ("logs", "a"), ("cancel", "a")], ids=" ".join)
def test_without_a_server_one_line_says_what_to_start(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PREFECT_API, raising=False)
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    raised = CliRunner().invoke(app, list(arguments)).exception
    assert isinstance(raised, ServiceError)
    assert "no Prefect server holds runs here: start `elastic up`" in str(raised) and PREFECT_API in str(raised)
    assert not (tmp_path / "home").exists()
