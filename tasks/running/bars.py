"""Bars in the terminal, each with an ETA; where there is no terminal, now and then a line of log."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tasks.reporting.numbers import human_seconds

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0


class Report(Protocol):
    """Told how much of how much is done, and perhaps a note on how it goes, such as the loss."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def bar(description: str, unit: str = "") -> Iterator[Report]:
    """A function of (done, total) that moves a bar, on a terminal; elsewhere a line of log every half minute.

    A total of 0 is one that nobody knows. Where a `unit` is named, the bar says how many of them are done in a second.
    """
    if not sys.stderr.isatty():
        yield _logged(description, unit)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[note]}"),
    )
    pace = Pace(unit)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=None, left="", note="")
        # Not rich's own estimate, which forgets after 30 s: a step of a large model takes longer.
        yield lambda done, total, note="": progress.update(
            task, completed=done, total=total or None, left=pace.text(done, total), note=note
        )


def _logged(description: str, unit: str) -> Report:
    pace, last = Pace(unit), time.monotonic()

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last
        text, now = pace.text(done, total), time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and text:
            last = now
            share = f"{100 * done / total:.0f} %" if total else f"{done:,}"
            logger.info("%s: %s", description, ", ".join(filter(None, (share, text, note))))

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
    """How fast a count of some `unit` rises, from when and where it first stood: what resumes does not begin at 0."""

    def __init__(self, unit: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._unit, self._clock = unit, clock
        self._first: tuple[float, int] | None = None

    def text(self, done: int, total: int) -> str:
        """The pace, where a unit is named, and the time that is left: "350,000 tokens/s, 2 h 5 min left".

        Empty until the count has risen; without a time where the total is not known, which is 0, or is reached.
        """
        now = self._clock()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        began, first = self._first
        if done <= first or now <= began:
            return ""
        a_second = (done - first) / (now - began)
        pace = f"{a_second:,.0f} {self._unit}/s" if self._unit else ""
        left = f"{human_seconds(round((total - done) / a_second))} left" if done < total else ""
        return ", ".join(filter(None, (pace, left)))
