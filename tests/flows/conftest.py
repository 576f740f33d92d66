"""One micro family, made once by the `elastic` command, that the tests of the pipeline look at."""

import pytest
from micro import Command, Run, completed, write_micro


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    directory = tmp_path_factory.mktemp("micro")
    return Command(recipe=write_micro(directory), home=directory / "home")


@pytest.fixture(scope="session")
def finished(command: Command) -> Run:
    """One whole run, which several tests look at."""
    return completed(command)
