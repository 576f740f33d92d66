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
from prefect.states import Pending, Running
from served import eventually

from flows.serving.deployments import BEAT, ensure_automation, silent_runs, stillborn_runs
from flows.serving.servers import PrefectServer, free_ports

ROOT = Path(__file__).parents[3]
SOON = timedelta(seconds=10)  # the least that Prefect takes


def test_automation_yaml_says_what_elastic_up_applies() -> None:
    written = yaml.safe_load((ROOT / "infra/automation.yaml").read_text())["automations"]
    automations = [silent_runs(), stillborn_runs()]
    assert [type(ours).model_validate(it) for ours, it in zip(automations, written, strict=True)] == automations


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SyncPrefectClient]:
    """A server with both automations, which lose patience soon."""
    home = tmp_path_factory.mktemp("prefect")
    server = PrefectServer(home, home, free_ports(1)[0], ui=True)
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

    eventually(seen, 120, "no lost run is seen")


def begun(client: SyncPrefectClient, flow: str) -> UUID:
    """A run that a worker has taken."""
    run = client.create_flow_run(Flow(lambda: None, name=flow)).id
    client.set_flow_run_state(run, Pending())
    return run


def beat(client: SyncPrefectClient, run: UUID, flow: str) -> None:
    event = Event(
        event=BEAT,
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
    others = begun(client, "someone-elses")
    for run in (silent, going):
        client.set_flow_run_state(run, Running())
    beat(client, silent, flow)
    for run, message in ((lost, "never began"), (silent, "no sign of life")):
        eventually(lambda run=run: client.read_flow_run(run).state.is_crashed(), 60, f"the {message} run goes on")
        assert message in client.read_flow_run(run).state.message
    assert client.read_flow_run(going).state.is_running()
    assert client.read_flow_run(others).state.is_pending()
