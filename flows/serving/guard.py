"""What a flow sees to before anything else where a worker runs it."""

import os
from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext

from elastic_core.parent import die_with_parent
from tasks.running.asked import show_our_lines
from tasks.settings import ServiceError

# So many, one after the other, are a crash loop; over a longer time they may be machines that were taken away.
MOST_CRASHES, WITHIN = 5, timedelta(days=1)


def guard_run() -> None:
    """Follow the worker, and refuse to start after five crashes in a row."""
    follow_worker()
    _refuse_crash_loop()


def follow_worker() -> None:
    """Exit when the worker dies, so that no orphan trains on; our lines of log go where Prefect's go."""
    if "PREFECT__FLOW_RUN_ID" in os.environ:  # Prefect's own, for the process of a run
        die_with_parent()
        show_our_lines()


def _refuse_crash_loop() -> None:
    """ServiceError where the last runs of this deployment crashed one after the other, so that a crash loop ends."""
    context = FlowRunContext.get()
    this = context.flow_run if context is not None else None
    if this is None or this.deployment_id is None:
        return
    with get_client(sync_client=True) as client:
        last = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[this.deployment_id])),
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(not_any_=[this.id])),
            sort=FlowRunSort.START_TIME_DESC,
            limit=MOST_CRASHES,
        )
    since = datetime.now(UTC) - WITHIN
    crashed = [run for run in last if run.state and run.state.is_crashed() and run.state.timestamp > since]
    if len(crashed) == MOST_CRASHES:
        raise ServiceError(
            f"the last {MOST_CRASHES} runs crashed within a day, so this one was not started; look at their logs and "
            "at the machine's memory, then start a new run"
        )
