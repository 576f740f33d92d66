"""What the tests of the pipeline share: one micro family made by `elastic run`, and one `elastic up`."""

from collections.abc import Iterator

import pytest
from micro import Command, Run, completed, write_micro
from served import SCHEDULE, Elastified, Served, elastify
from served import served as serving


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    directory = tmp_path_factory.mktemp("micro")
    return Command(recipe=write_micro(directory), home=directory / "home")


@pytest.fixture(scope="session")
def finished(command: Command) -> Run:
    """One whole run, which several tests look at."""
    return completed(command)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One `elastic up`, for all that look at what it serves."""
    directory = tmp_path_factory.mktemp("served")
    command = Command(recipe=write_micro(directory), home=directory / "home")
    with serving(command, "--schedule", SCHEDULE, "--max-gpu-hours", "1") as up:
        yield up


@pytest.fixture(scope="session")
def elastified(served: Served) -> Elastified:
    """The first family of `served`, made by its workers."""
    return elastify(served)
