"""`elastic run`: the whole pipeline in this process, on the services that the environment names or on its own."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.commands.recipes import load_recipe
from flows.serving.services import embedded_services
from tasks.settings import PREFECT_API, ServiceError, make_home, remedy

# The terminal shows steps and progress; Prefect's own lines, and ours, are on the run in its UI.
PREFECT_LOGGING = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "elastic_core,tasks,flows",
}


@contextmanager
def own_services() -> Iterator[None]:
    """The services that the environment names, or own ones while the block runs; only then is Prefect to be imported.

    Prefect reads the address of its server when it is imported.
    """
    for name, value in PREFECT_LOGGING.items():
        os.environ.setdefault(name, value)
    with embedded_services(make_home(), prefect=True):
        yield


def run_recipe(recipe: Path, overrides: Sequence[str]) -> None:
    """Carry out a recipe and print what came of it; a ServiceError where Prefect's server fails."""
    import httpx  # of the extra that Prefect is of: where that is not installed, no server starts

    loaded = load_recipe(recipe, overrides)
    with own_services():
        from prefect.exceptions import PrefectException

        from flows.commands.outcome import print_outcome
        from flows.elastify import elastify
        from tasks.running.preflight import check_services

        check_services()
        try:
            evaluation, orders, release, verdict = elastify(loaded)
        except (PrefectException, httpx.HTTPError) as error:
            look = remedy(PREFECT_API)
            raise ServiceError(f"Prefect fails: {error}; {look}, then run this again to go on") from error
        print_outcome(evaluation, orders, release, verdict)
