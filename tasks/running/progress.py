"""Progress of a step where users look: a bar in the terminal, an artifact that moves on the run's page in Prefect."""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import TaskRunContext
from prefect.exceptions import PrefectException

from elastic_core.recipe import Stage
from tasks.running.asked import shown_on
from tasks.running.bars import Pace, Report, bar

logger = logging.getLogger(__name__)

FIRST_UPDATE_SECONDS = 0.5
SECONDS_BETWEEN_UPDATES = 10.0
LAST_UPDATE_SECONDS = 5.0
STEPS_OF_A_PACE = 20


@contextmanager
def progress_bar(description: str, unit: str = "") -> Iterator[Report]:
    """A function of (done, total) that moves a bar, and in a run of a step an artifact on the run's page.

    The bar needs a terminal; elsewhere it is a line of log every half minute. A total of 0 is one that nobody knows.
    Where a `unit` is named, they say how many of them are done in a second.
    """
    with _on_the_page(description, unit) as show, bar(description, unit) as move:

        def report(done: int, total: int, note: str = "") -> None:
            move(done, total, note)
            show(done, total, note)

        yield report


@contextmanager
def stage_progress(stage: Stage) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function of a step's metrics that moves the stage's bar, with each budget's loss and the tokens of a second."""
    losses: dict[str, float] = {}  # the last of each budget: few micro-batches do not hold all of them
    recent: deque[tuple[int, float]] = deque(maxlen=STEPS_OF_A_PACE)

    def on_step(row: dict[str, Any]) -> None:
        losses.update({budget: metrics["loss"] for budget, metrics in row["budgets"].items()})
        recent.append((row["tokens"], row["seconds"]))
        report(row["step"] + 1, row["steps"], stage_note(losses, recent))

    with progress_bar(f"{stage.name}: {stage.steps} steps") as report:
        yield on_step


def stage_note(losses: Mapping[str, float], recent: Iterable[tuple[int, float]]) -> str:
    """How a stage goes: "loss l 2.310, m 2.402, s 2.613, 12,300 tokens/s"; `recent` has tokens and seconds of steps."""
    tokens, seconds = map(sum, zip(*recent, strict=True))
    pace = [f"{tokens / seconds:,.0f} tokens/s"] if seconds else []
    return ", ".join([f"loss {', '.join(f'{budget} {loss:.3f}' for budget, loss in losses.items())}", *pace])


class ProgressArtifact:
    """A progress artifact of a run in Prefect, moved from a thread of its own: often at first, then at a steady pace.

    A server that is away holds every call up for more than a minute, and must not hold up the work.
    """

    def __init__(self, description: str, flow_run: UUID, task_run: UUID | None, unit: str = "") -> None:
        self._description, self._flow_run, self._task_run = description, flow_run, task_run
        self._latest: tuple[int, int, str] | None = None
        self._ended = threading.Event()
        self._pace = Pace(unit)
        self._thread = threading.Thread(target=self._send, name="progress", daemon=True)
        self._thread.start()

    def show(self, done: int, total: int, note: str = "") -> None:
        self._latest = done, total, note

    def close(self) -> None:
        """Send the last state; a server that is away is not waited for."""
        self._ended.set()
        self._thread.join(LAST_UPDATE_SECONDS)

    def _send(self) -> None:
        client: SyncPrefectClient | None = None
        artifact: UUID | None = None
        sent: tuple[int, int, str] | None = None
        last, pause = False, FIRST_UPDATE_SECONDS
        with ExitStack() as stack:
            while not last:
                last = self._ended.wait(pause)
                latest = self._latest
                if latest is None or latest == sent or (last and artifact is None):
                    continue  # what ends at once needs no artifact
                pause = min(2 * pause, SECONDS_BETWEEN_UPDATES)
                try:
                    client = client or stack.enter_context(get_client(sync_client=True))
                    artifact = self._put(client, artifact, *latest)
                    sent = latest
                except (httpx.HTTPError, PrefectException) as error:
                    logger.debug("progress is not shown: %s", error)

    def _put(self, client: SyncPrefectClient, artifact: UUID | None, done: int, total: int, note: str = "") -> UUID:
        of_total = f" of {total:,}" if total else ""
        told = (f"{self._description}: {done:,}{of_total}", self._pace.text(done, total), note)
        text = ", ".join(filter(None, told))
        share = 100.0 * done / total if total else 0.0
        if artifact is not None:
            client.update_artifact(artifact, ArtifactUpdate(data=share, description=text))
            return artifact
        wanted = ArtifactCreate(
            type="progress",
            key=re.sub("[^a-z0-9]+", "-", self._description.partition(":")[0].lower()).strip("-"),
            description=text,
            data=share,
            flow_run_id=self._flow_run,
            task_run_id=self._task_run,
        )
        return client.create_artifact(wanted).id


@contextmanager
def _on_the_page(description: str, unit: str) -> Iterator[Report]:
    context = TaskRunContext.get()
    elsewhere = shown_on.get()
    flow_run = elsewhere or (context.task_run.flow_run_id if context is not None else None)
    if context is None or flow_run is None:
        yield lambda done, total, note="": None
        return
    artifact = ProgressArtifact(description, flow_run, None if elsewhere else context.task_run.id, unit)
    try:
        yield artifact.show
    finally:
        artifact.close()
