"""What one process says that asks another to do a step, and what that other knows about it."""

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.settings import get_current_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A step, by its name and its module's, and what its run is to be called.

    `inputs` are plain data, by name. `runs` has the code and the libraries that the step has where it is asked for, and
    must have where it is done; `device` stands for the devices of those who may do it. `key` is the result's.
    """

    step: str
    module: str
    title: str
    inputs: Mapping[str, Any]
    key: str
    runs: Mapping[str, str]
    device: str


# What a device of another machine is called: not this one, but any of those that the named workers have.
WORKERS_OF = "workers of "

# The devices that this process does a step for, as the run that asked calls them in the step's key.
device_of_run: ContextVar[str | None] = ContextVar("device_of_run", default=None)

# The flow run on whose page a step shows its progress, where that is another than the one it runs in.
shown_on: ContextVar[UUID | None] = ContextVar("shown_on", default=None)


def show_our_lines() -> None:
    """Prefect adds its handler to extra_loggers but leaves their level at WARNING: set it, or INFO lines are lost."""
    settings = get_current_settings().logging
    for name in settings.extra_loggers or ():
        logging.getLogger(name).setLevel(settings.level)
