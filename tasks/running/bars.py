"""Bars in the terminal, each with an ETA; where there is no terminal, now and then a line of log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0

Report = Callable[[int, int], None]


@contextmanager
def bar(description: str) -> Iterator[Report]:
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
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _logged(description: str) -> Report:
    pace, last = Pace(), time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        left, now = pace.seconds_left(done, total), time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and left is not None:
            last = now
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


class Pace:
    """How fast a count rises, from where it first stood: a resumed stage does not begin at zero."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._first: int | None = None

    def seconds_left(self, done: int, total: int) -> float | None:
        """None until the count has risen."""
        if self._first is None:
            self._first = done
        if done <= self._first:
            return None
        return (time.monotonic() - self._began) * (total - done) / (done - self._first)
