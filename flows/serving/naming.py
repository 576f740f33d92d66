"""What a run is called in Prefect, and its tags: its family and its date, then the version that it made."""

import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, TypeVar, cast

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException
from prefect.states import Completed

from tasks.records import Release

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Names that Prefect and its form make up, such as alpha6-anfalas; a name of any other shape was chosen by a person.
MADE_UP = re.compile(r"[a-z]+[0-9]*-[a-z]+")
STARTED_AT = re.compile(r"[0-9]{2}:[0-9]{2}$")


def called(subject: Callable[[Mapping[str, Any]], str]) -> Callable[[], str]:
    """A flow's `flow_run_name`: what the run is about, by its parameters, and when it began: "nano 2026-12-01 14:02".

    A name that a person gave to the run stays.
    """

    def name() -> str:
        context = FlowRunContext.get()
        assert context is not None and context.flow_run is not None, "Prefect asks for it inside a run"
        given = context.flow_run.name
        if not MADE_UP.fullmatch(given):
            return given
        return f"{subject(context.parameters or {})} {datetime.now().astimezone():%Y-%m-%d %H:%M}"

    return name


def tag_run(*tags: str) -> None:
    """Add tags to this flow run. Its task runs have none: Prefect would ask its server for a place for each tag."""
    _update(tags=tags)


def name_instead(before: str, now: str) -> None:
    """Call a run by another subject, if it is called by `before`: a change may have given the family another name."""
    _update(lambda name: re.sub(rf"{re.escape(before)}(?= \d{{4}}-)", now, name, count=1), tags=())


def name_after(release: Release) -> None:
    """Put the version that a run has made in the place of the time at which it began, and among its tags."""
    version = release.number
    _update(lambda name: STARTED_AT.sub(version, name), tags=[version])


def summed_up(outcome: T, message: str) -> T:
    """A flow's result with a line for its page. Prefect shows the state's message, and hands callers the data."""
    return cast(T, Completed(message=message, data=outcome))


def _update(rename: Callable[[str], str] = str, *, tags: tuple[str, ...] | list[str]) -> None:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    run = context.flow_run
    run.name, run.tags = rename(run.name), [*dict.fromkeys([*run.tags, *tags])]
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(run.id, name=run.name, tags=run.tags)
    except (httpx.HTTPError, PrefectException) as error:  # no run ends for want of a name
        logger.warning("Prefect does not take the name %s: %s", run.name, error)
