"""When a run is not started."""

from datetime import timedelta
from types import SimpleNamespace
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Crashed
from served import Served

from flows.serving import guard
from tasks.settings import ServiceError

pytestmark = pytest.mark.services


def enter(client: SyncPrefectClient, deployment: UUID, state: State) -> None:
    run = client.create_flow_run_from_deployment(deployment)
    client.set_flow_run_state(run.id, state, force=True)


def test_runs_that_only_crash_are_not_begun_for_ever(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with served.prefect() as client, temporary_settings({PREFECT_API_URL: str(client.api_url)}):
        deployment = client.create_deployment(client.create_flow_from_name("crashing"), name="crashing")
        this = client.create_flow_run_from_deployment(deployment)
        context = SimpleNamespace(flow_run=this)
        monkeypatch.setattr(guard, "FlowRunContext", SimpleNamespace(get=lambda: context))
        for _ in range(guard.MOST_CRASHES):
            guard.guard_run()
            enter(client, deployment, Crashed())
        with pytest.raises(ServiceError, match=r"the last 5 runs crashed within a day.*start a new run"):
            guard.guard_run()
        with monkeypatch.context() as patch:
            patch.setattr(guard, "WITHIN", timedelta(0))
            guard.guard_run()
        enter(client, deployment, Completed())
        guard.guard_run()
