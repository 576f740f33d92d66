"""Progress where users look: a bar with an ETA in the terminal, and an artifact that moves in the Prefect UI."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from elastic_core.config import Stage

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0

Report = Callable[[int, int], None]


@contextmanager
def progress_bar(description: str) -> Iterator[Report]:
    """A function of (done, total) that moves a bar, on a terminal; elsewhere a line of log every half minute."""
    if not sys.stderr.isatty():
        yield _logged(description)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _logged(description: str) -> Report:
    began = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done:
            last = now
            left = (now - began) * (total - done) / done
            logger.info("%s: %.0f %%, %.0f s left", description, 100 * done / total, left)

    return report


@contextmanager
def counter(description: str, unit: str) -> Iterator[Callable[[int], None]]:
    """A function of a count whose end nobody knows; on a terminal it is seen to rise."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed:,.0f} " + unit), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(description, total=None)
        yield lambda count: progress.update(bar, completed=count)


@contextmanager
def stage_progress(stage: Stage) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function of a step's metrics that moves the stage's bar."""
    with progress_bar(f"{stage.name}: {stage.steps} steps") as report:
        yield lambda row: report(row["step"] + 1, row["steps"])
