"""One retraining of a family at a time: a run of a schedule leaves it to the one under way, a person's waits for it."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectAlreadyExists

from flows.serving.ceiling import has_asked

PATIENCE = 10.0  # seconds in which a free place is got
LEASE = 120.0  # seconds after which the place of a run whose process is gone is free

logger = logging.getLogger(__name__)


@contextmanager
def only_one(name: str) -> Iterator[bool]:
    """Hold the one place of that name among the runs of this server. Gives False to a run that has to leave it.

    A run of the schedule leaves it where another has the place, unless a person resumed it. Prefect's limit of a
    deployment would cancel, or queue, whichever run comes second, a person's too. Without a deployment nothing is held.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    if run is None or run.deployment_id is None:
        yield True
        return
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):  # by a run of the same moment
        client.upsert_global_concurrency_limit_by_name(name, 1)
    # An outage of the server ends no training: a lease that lapses in it is no error.
    place = partial(concurrency, name, lease_duration=LEASE, strict=True, raise_on_lease_renewal_failure=False)
    with ExitStack() as held:
        try:
            held.enter_context(place(timeout_seconds=PATIENCE))
            mine = True
        except TimeoutError:
            mine = not run.auto_scheduled or has_asked(run)
            if mine:
                logger.info("%s is under way: this run waits until it has ended", name)
                held.enter_context(place())
        yield mine
