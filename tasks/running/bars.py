"""Bars in the terminal, each with an ETA; where there is no terminal, now and then a line of log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tasks.reporting.numbers import human_seconds

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
        TextColumn("{task.fields[left]}"),
    )
    pace = Pace()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=None, left="")
        # Not rich's own estimate, which forgets after 30 s: a step of a large model takes longer.
        yield lambda done, total: progress.update(task, completed=done, total=total, left=pace.left(done, total))


def _logged(description: str) -> Report:
    pace, last = Pace(), time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        left, now = pace.left(done, total), time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and left:
            last = now
            logger.info("%s: %.0f %%, %s", description, 100 * done / total, left)

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
    """How fast a count rises, from when and where it first stood: a resumed stage does not begin at zero."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[float, int] | None = None

    def left(self, done: int, total: int) -> str:
        """The time that is left, "2 h 5 min left"; empty until the count has risen, and at its end."""
        now = self._clock()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        began, first = self._first
        if not first < done < total:
            return ""
        return f"{human_seconds(round((now - began) * (total - done) / (done - first)))} left"
