"""`elastic cancel RUN`: end a run and its steps on other workers; what they finished stays, and a new run goes on."""

import time

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.client.schemas.sorting import FlowRunSort

from flows.commands.runs import SHORT, find_run, open_prefect, steps_of
from flows.commands.terminal import wide_console
from tasks.settings import ServiceError

POLL_SECONDS = 0.5
# A worker takes half a minute at most. Where there is none, Prefect calls the run cancelled: after five minutes, and
# the server of `elastic up` after a minute and a half.
WORKER_SECONDS, PATIENCE_SECONDS = 40.0, 360.0


def cancel_run(reference: str) -> None:
    """Cancel a run, then its steps, and return when all have ended.

    ValueError for one that has ended, or that is in the process of `elastic run`, which no worker can end.
    """
    with open_prefect() as client:
        run = find_run(client, reference)
        if run.state is not None and run.state.is_final():
            other = gone_on(client, run)
            then = f", and run {str(other.id)[:SHORT]} goes on in its place: cancel that" if other is not None else ""
            raise ValueError(f"{run.name} has ended: it is {run.state.name}{then}")
        if run.deployment_id is None:
            raise ValueError(f"{run.name} is in the process of an `elastic run`: end it there, with Ctrl-C")
        _cancel(client, run)  # first of all, so that it starts no step again
        ended = _ended(client, run)
        for step in steps_of(client, run):
            if step.deployment_id is not None and not _current(client, step).is_final():
                _cancel(client, step)
                _ended(client, step)
    wide_console().print(
        f"{run.name} is {ended.name}; a new run of the same recipe goes on where it was",
        soft_wrap=True,
        highlight=False,
    )


def gone_on(client: SyncPrefectClient, run: FlowRun) -> FlowRun | None:
    """The run that an automation has started in place of one that crashed; None once that has ended too."""
    if run.deployment_id is None or run.state is None or not run.state.is_crashed():
        return None
    later = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id])),
        flow_run_filter=FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime(after_=run.state.timestamp)),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
    )
    alike = (other for other in later if other.parameters == run.parameters and not other.auto_scheduled)
    return next((other for other in alike if other.state is not None and not other.state.is_final()), None)


def _cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    answer = client.set_flow_run_state(run.id, State(type=StateType.CANCELLING))
    if answer.status == SetStateStatus.ABORT and not _current(client, run).is_final():
        raise ServiceError(f"Prefect does not cancel {run.name}: {getattr(answer.details, 'reason', answer.status)}")


def _current(client: SyncPrefectClient, run: FlowRun) -> State:
    state = client.read_flow_run(run.id).state
    assert state is not None, "every run that was created has a state"
    return state


def _ended(client: SyncPrefectClient, run: FlowRun) -> State:
    began, told = time.monotonic(), False
    while not (state := _current(client, run)).is_final():
        waited = time.monotonic() - began
        if waited > WORKER_SECONDS and not told:
            told = True
            wide_console().print(f"{run.name}: no worker ends it; Prefect will call it cancelled", soft_wrap=True)
        if waited > PATIENCE_SECONDS:
            raise ServiceError(
                f"{run.name} is {state.name} for {PATIENCE_SECONDS:.0f} s, and its worker has not ended it; see "
                "`elastic status`"
            )
        time.sleep(POLL_SECONDS)
    return state
