"""`elastic runs`: the latest runs on Prefect's server, and what `elastic logs` and `elastic cancel` share with it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from uuid import UUID

import httpx
import typer
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterName,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterParentTaskRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectException

from flows.commands.terminal import text_table, wide_console
from flows.serving.running import read_running
from flows.serving.services import applied, basic_environment
from tasks.reporting.numbers import human_age, human_seconds
from tasks.settings import PREFECT_API, ServiceError, home_directory, redact, remedy

FLOWS = ["elastify", "retrain", "export", "evaluate"]  # those that people start; gpu-step is a part of one
LOOKED_THROUGH = 200  # runs, the limit of one answer of Prefect's, in which the beginning of an id is looked for
SHORT = 8  # characters of an id that tell runs apart


@contextmanager
def open_prefect() -> Iterator[SyncPrefectClient]:
    """A client of the server of the environment, or of the `elastic up` that runs here; ServiceError without one."""
    home = home_directory()
    running = read_running(home)
    url = os.environ.get(PREFECT_API) or (running.environment.get(PREFECT_API) if running is not None else None)
    if not url:
        raise ServiceError(
            f"no Prefect server holds runs here: start `elastic up`, which has those of `elastic run` in {home} too, "
            f"or set {PREFECT_API}"
        )
    with applied(basic_environment(home) | {PREFECT_API: url}), SyncPrefectClient(api=url) as client:
        try:
            yield client
        except (httpx.HTTPError, PrefectException) as error:
            raise ServiceError(f"Prefect at {redact(url)} fails: {error}; {remedy(PREFECT_API)}") from error


def list_runs(limit: int, *, as_json: bool) -> None:
    """Print the latest runs that people or schedules started, the newest first; runs to come are left out."""
    with open_prefect() as client:
        flows = {flow.id: flow.name for flow in client.read_flows(flow_filter=of_ours())}
        begun = FlowRunFilterState(type=FlowRunFilterStateType(not_any_=[StateType.SCHEDULED]))
        waiting = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
        found = [
            *(run for run in latest(client, LOOKED_THROUGH, waiting) if not run.auto_scheduled),
            *latest(client, limit, begun),
        ][:limit]
    rows = [described(run, flows[run.flow_id]) for run in found]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        wide_console().print(text_table(rows))
    else:
        wide_console().print("no run was started yet")


def latest(client: SyncPrefectClient, limit: int, state: FlowRunFilterState | None = None) -> list[FlowRun]:
    own = FlowRunFilterParentTaskRunId(is_null_=True)  # not a part of another run
    return client.read_flow_runs(
        flow_filter=of_ours(),
        flow_run_filter=FlowRunFilter(state=state, parent_task_run_id=own),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=limit,
    )


def of_ours() -> FlowFilter:
    return FlowFilter(name=FlowFilterName(any_=FLOWS))


def described(run: FlowRun, flow: str) -> dict[str, str]:
    now = datetime.now(UTC)
    begun = run.start_time
    return {
        "run": run.name,
        "id": str(run.id)[:SHORT],
        "flow": flow,
        "state": run.state.name or run.state.type.value if run.state is not None else "-",
        "started": f"{human_age((now - begun).total_seconds())} ago" if begun else "not yet",
        "took": human_seconds(((run.end_time or now) - begun).total_seconds()) if begun else "-",
    }


def find_run(client: SyncPrefectClient, reference: str) -> FlowRun:
    """The run with this id, or the one whose id begins so, or the one with this name; ValueError unless it is one."""
    by_name = FlowRunFilter(
        name=FlowRunFilterName(any_=[reference]), parent_task_run_id=FlowRunFilterParentTaskRunId(is_null_=True)
    )
    named = client.read_flow_runs(flow_filter=of_ours(), flow_run_filter=by_name)
    found = named or [run for run in latest(client, LOOKED_THROUGH) if str(run.id).startswith(reference.lower())]
    if not found and (identity := _as_id(reference)):
        with suppress(ObjectNotFound):
            found = [client.read_flow_run(identity)]
    if len(found) != 1:
        which = (
            f"{len(found)} runs: give the id of one, {', '.join(str(r.id)[:SHORT] for r in found)}"
            if found
            else "no run"
        )
        raise ValueError(f"{reference!r} is {which}; `elastic runs` lists them")
    return found[0]


def _as_id(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def steps_of(client: SyncPrefectClient, run: FlowRun) -> list[FlowRun]:
    """The runs that do steps of this one: on the gpu pool, or in its own process."""
    parent = FlowRunFilterParentFlowRunId(any_=[run.id])
    children = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))
    return [found for child in children for found in (child, *steps_of(client, child))]
