"""Runs whose process is gone, on a real Prefect server: each is crashed, wherever in its life the process was lost."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import Event
from prefect.states import Cancelling, Pending, Running, Suspended
from served import eventually

from flows.serving.ceiling import WAITS
from flows.serving.deployments import BEAT, end_orphans, ensure_automation, silent_runs, stillborn_runs
from flows.serving.servers import GIVES_UP, PrefectServer
from tasks.running.loopback import free_ports

ROOT = Path(__file__).parents[3]
SOON = timedelta(seconds=10)  # the least that Prefect takes
LATER = timedelta(seconds=20)


def test_automation_yaml_says_what_elastic_up_applies() -> None:
    written = yaml.safe_load((ROOT / "infra/automation.yaml").read_text())["automations"]
    automations = [silent_runs(), stillborn_runs()]
    assert [type(ours).model_validate(it) for ours, it in zip(automations, written, strict=True)] == automations


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """A server with both automations, which lose patience soon."""
    home = tmp_path_factory.mktemp("prefect")
    server = PrefectServer(home, home, free_ports(1)[0], ui=True)
    with pytest.MonkeyPatch.context() as patch:
        for variable in GIVES_UP:
            patch.setenv(variable, str(LATER.total_seconds()))
        server.start()
    try:
        server.wait()
        with SyncPrefectClient(api=f"{server.url}/api") as client:
            for automation in (silent_runs(SOON), stillborn_runs(SOON)):
                ensure_automation(client, automation)
            watching(client)
            yield client
    finally:
        server.stop()


def watching(client: SyncPrefectClient) -> None:
    """Wait until the server sees lost runs: it takes an automation up a moment after it was made."""
    runs: list[UUID] = []

    def seen() -> bool:
        runs.append(begun(client, "elastify"))
        return any(client.read_flow_run(run).state.is_crashed() for run in runs)

    eventually(seen, "no lost run is seen")


def begun(client: SyncPrefectClient, flow: str) -> UUID:
    """A run that a worker has taken."""
    run = client.create_flow_run(Flow(lambda: None, name=flow)).id
    client.set_flow_run_state(run, Pending())
    return run


def beat(client: SyncPrefectClient, run: UUID, flow: str, name: str = BEAT) -> None:
    event = Event(
        event=name,
        resource={"prefect.resource.id": f"prefect.flow-run.{run}"},
        related=[
            {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow", "prefect.resource.name": flow}
        ],
    )
    answer = client.request("POST", "/events", json=[event.model_dump(mode="json")])
    answer.raise_for_status()


@pytest.mark.services
@pytest.mark.parametrize("flow", ["elastify", "gpu-step"])
def test_a_run_is_crashed_whose_process_died_before_it_began_or_after(client: SyncPrefectClient, flow: str) -> None:
    lost, silent, going = begun(client, flow), begun(client, flow), begun(client, flow)
    others, asking = begun(client, "someone-elses"), begun(client, flow)
    for run in (silent, going, asking):
        client.set_flow_run_state(run, Running())
    for run in (asking, silent):
        beat(client, run, flow)
    client.set_flow_run_state(asking, Suspended(timeout_seconds=3600), force=True)  # it has no deployment
    beat(client, asking, flow, WAITS)
    for run, message in ((lost, "never began"), (silent, "no sign of life")):
        eventually(lambda run=run: client.read_flow_run(run).state.is_crashed(), f"the {message} run goes on")
        assert message in client.read_flow_run(run).state.message
    assert client.read_flow_run(going).state.is_running()
    assert client.read_flow_run(asking).state.is_paused(), "it waits for a person"
    assert client.read_flow_run(others).state.is_pending()


@pytest.mark.services
def test_a_run_that_was_to_be_cancelled_when_its_process_was_lost_ends_cancelled_and_is_not_started_again(
    client: SyncPrefectClient,
) -> None:
    silent, cancelled = begun(client, "elastify"), begun(client, "elastify")
    for run in (silent, cancelled):
        client.set_flow_run_state(run, Running())
        beat(client, run, "elastify")
    client.set_flow_run_state(cancelled, Cancelling())
    for run in (silent, cancelled):
        eventually(lambda run=run: client.read_flow_run(run).state.is_final(), "the run goes on")
    assert client.read_flow_run(silent).state.is_crashed()
    assert [state.type.value for state in client.read_flow_run_states(cancelled)][-2:] == ["CANCELLING", "CANCELLED"]


@pytest.mark.services
def test_runs_that_elastic_up_left_behind_are_crashed_and_those_that_were_to_be_cancelled_are_cancelled(
    client: SyncPrefectClient,
) -> None:
    deployment = client.create_deployment(client.create_flow_from_name("elastify"), "micro")
    cancelled, running = (
        client.create_flow_run_from_deployment(deployment, state=state).id for state in (Running(), Running())
    )
    client.set_flow_run_state(cancelled, Cancelling())
    end_orphans(client)
    assert client.read_flow_run(cancelled).state.is_cancelled()
    assert client.read_flow_run(running).state.is_crashed()
