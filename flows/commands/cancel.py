"""`elastic cancel RUN`: end a run and its steps on other workers; what they finished stays, and a new run goes on."""

import time

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus

from flows.commands.runs import find_run, open_prefect, steps_of
from flows.commands.terminal import wide_console
from tasks.settings import ServiceError

POLL_SECONDS, PATIENCE_SECONDS = 0.5, 120.0


def cancel_run(reference: str) -> None:
    """Cancel a run, then its steps, and return when all have ended.

    ValueError for one that has ended, or that is in the process of `elastic run`, which no worker can end.
    """
    with open_prefect() as client:
        run = find_run(client, reference)
        if run.state is not None and run.state.is_final():
            raise ValueError(f"{run.name} has ended: it is {run.state.name}")
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


def _cancel(client: SyncPrefectClient, run: FlowRun) -> None:
    answer = client.set_flow_run_state(run.id, State(type=StateType.CANCELLING))
    if answer.status == SetStateStatus.ABORT and not _current(client, run).is_final():
        raise ServiceError(f"Prefect does not cancel {run.name}: {getattr(answer.details, 'reason', answer.status)}")


def _current(client: SyncPrefectClient, run: FlowRun) -> State:
    state = client.read_flow_run(run.id).state
    assert state is not None, "every run that was created has a state"
    return state


def _ended(client: SyncPrefectClient, run: FlowRun) -> State:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (state := _current(client, run)).is_final():
        if time.monotonic() > deadline:
            raise ServiceError(
                f"{run.name} is {state.name} for {PATIENCE_SECONDS:.0f} s, and its worker has not ended it; see "
                "`elastic status`"
            )
        time.sleep(POLL_SECONDS)
    return state
