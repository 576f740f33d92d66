"""`elastic logs RUN`: what a run and its steps on other workers have logged, in one order."""

import logging
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from uuid import UUID

import typer
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterTimestamp
from prefect.client.schemas.objects import Log
from prefect.client.schemas.sorting import LogSort

from flows.commands.runs import find_run, open_prefect, steps_of
from tasks.settings import redact

A_PAGE = 200  # the limit of one answer of Prefect's
POLL_SECONDS = 2.0
LATE = timedelta(seconds=30)  # workers send their lines in batches: so old may a line be that arrives now


def print_logs(reference: str, *, follow: bool) -> None:
    """Print the lines that there are; with `follow` also those that come, until the run has ended."""
    seen: set[UUID] = set()
    since: datetime | None = None
    with open_prefect() as client:
        run = find_run(client, reference)
        while True:
            state = client.read_flow_run(run.id).state  # before its lines, so that the last of them are seen
            steps = {run.id: ""} | {step.id: f"{step.name}: " for step in steps_of(client, run)}
            for line in lines(client, list(steps), since):
                since = line.timestamp if since is None else max(since, line.timestamp)
                if line.id not in seen and line.flow_run_id is not None:
                    seen.add(line.id)
                    typer.echo(text_of(line, steps[line.flow_run_id]))
            if not follow or state is None or state.is_final():
                break
            time.sleep(POLL_SECONDS)
    if not seen:
        typer.echo(f"{run.name} has logged nothing yet")


def lines(client: SyncPrefectClient, runs: Sequence[UUID], since: datetime | None) -> Iterator[Log]:
    """The lines of these runs, the oldest first; those from a little before `since` on, if it is given."""
    of_these = LogFilter(
        flow_run_id=LogFilterFlowRunId(any_=list(runs)),
        timestamp=None if since is None else LogFilterTimestamp(after_=since - LATE),
    )
    offset = 0
    while page := client.read_logs(of_these, limit=A_PAGE, offset=offset, sort=LogSort.TIMESTAMP_ASC):
        yield from page
        offset += len(page)


def text_of(line: Log, step: str) -> str:
    at = line.timestamp.astimezone().strftime("%H:%M:%S")
    return f"{at} {logging.getLevelName(line.level):<7} {step}{redact(line.message)}"
