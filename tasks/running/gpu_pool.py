"""A step done by the workers of Prefect's gpu pool, each as a run of one deployment."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException

from tasks.running.asked import WORKERS_OF, Asked
from tasks.settings import ServiceError, is_transient

R = TypeVar("R")

DEPLOYMENT_VARIABLE = "ELASTIC_GPU_DEPLOYMENT"
# Set by `elastic up` for the workers on its machine, so that they and `elastic run` there share results.
DEVICE_VARIABLE = "_ELASTIC_GPU_DEVICE"

POLL_SECONDS = 1.0
LONGEST_OUTAGE_SECONDS = 3600.0
AWAY = "Prefect's server does not answer; it is asked again every second, for an hour at most"
ATTEMPTS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuPool:
    """The workers that do the runs of a deployment."""

    deployment: str

    @property
    def name(self) -> str:
        return self.deployment

    def device(self) -> str:
        """The deployment's name, unless `elastic up` named the device that its workers and this run are both on."""
        return os.environ.get(DEVICE_VARIABLE) or f"{WORKERS_OF}{self.deployment}"

    def do(self, asked: Asked) -> None:
        """Have a run of the deployment do the step and leave its result in the cache; a crash is repeated.

        A run that already does the step with this key, for another caller or from before this one was restarted, is
        waited for instead. Waits through outages of Prefect's server. A ServiceError says why where the run fails.
        """
        context = FlowRunContext.get()
        own = context.flow_run if context is not None else None
        caller = own.id if own is not None else None
        parameters = {
            "step": asked.step,
            "inputs": asked.inputs,
            "device": asked.device,
            "runs": dict(asked.runs),
            "show_on": str(caller) if caller else "",
        }
        stage = asked.inputs.get("stage")
        tags = [*(own.tags if own else ()), *([stage["name"]] if stage is not None else ())]
        for attempt in range(1, ATTEMPTS + 1):
            started, joined = start_run(self.deployment, asked.title, parameters, asked.key, tags)
            logger.info(
                "%s waits for %s, as run %s", asked.title, "another's worker" if joined else "a worker", started.name
            )
            state = _final_state(started, asked.title, caller)
            if state.is_completed():
                return
            if not state.is_crashed() and not (joined and state.is_cancelled()):
                ended = state.name or state.type.value
                reason = (state.message or ended).removeprefix("Flow run encountered an exception: ")
                raise ServiceError(f"{asked.title} {ended.lower()} on the worker: {reason}")
            logger.warning(
                "%s crashed on the worker (attempt %d of %d): %s", asked.title, attempt, ATTEMPTS, state.message
            )
        raise ServiceError(
            f"{asked.title} crashed {ATTEMPTS} times on the workers of {self.deployment}; see their logs"
        )


def start_run(
    deployment: str, name: str, parameters: dict[str, Any], key: str, tags: Sequence[str] = ()
) -> tuple[FlowRun, bool]:
    """A run of a deployment that does what `key` stands for, and whether it was there already; else a new one is made.

    The new run is a child of this one. Waits for a server that is away: a new client of Prefect's, other than one that
    has reached its server before, gives up at the first refusal. A ServiceError where there is no such deployment.
    """
    missing = (
        f"Prefect's server has no deployment {deployment!r}; `elastic up` and infra/prefect.yaml make it, or set "
        f"{DEPLOYMENT_VARIABLE} to one that is there"
    )
    return _answer(partial(_found_or_started, deployment, name, parameters, f"key-{key}", tags), name, missing)


def _answer(ask: Callable[[], R], name: str, missing: str) -> R:
    """What Prefect's server answers, however often it has to be asked; `missing` is said where it does not know."""
    asked, told = time.monotonic(), False
    while True:
        try:
            return ask()
        except ObjectNotFound as error:
            raise ServiceError(missing) from error
        except (httpx.HTTPError, PrefectException) as error:
            if not is_transient(error):
                raise
            if time.monotonic() - asked > LONGEST_OUTAGE_SECONDS:
                raise ServiceError(f"Prefect's server stays away: {error}", transient=True) from error
            if not told:
                logger.warning("%s: %s", name, AWAY)
            told = True
            time.sleep(POLL_SECONDS)


def _found_or_started(
    deployment: str, name: str, parameters: dict[str, Any], tag: str, tags: Sequence[str]
) -> tuple[FlowRun, bool]:
    with get_client(sync_client=True) as client:
        of_this = FlowRunFilterDeploymentId(any_=[client.read_deployment_by_name(deployment).id])
        tagged = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]), deployment_id=of_this)
        runs = client.read_flow_runs(flow_run_filter=tagged, sort=FlowRunSort.EXPECTED_START_TIME_DESC)
    under_way = [run for run in runs if run.state is None or not run.state.is_final()]
    if under_way:
        return under_way[-1], True
    # Whoever else finds this run to be the last one asks for the same new run, and gets it.
    last = str(runs[0].id) if runs else "none"
    run = run_deployment(
        deployment,
        parameters=parameters,
        flow_run_name=name,
        timeout=0,
        tags=[*tags, tag],
        idempotency_key=f"{tag}-after-{last}",
    )
    assert isinstance(run, FlowRun), "a coroutine only inside another"
    return run, False


def _final_state(run: FlowRun, name: str, caller: UUID | None) -> State[Any]:
    deleted = (
        f"run {run.name}, which does {name}, was deleted; start this run again, finished steps come from the cache"
    )
    own_deleted = "this run was deleted while it went on; start a new one, finished steps come from the cache"
    with get_client(sync_client=True) as client:
        while True:
            state = _answer(partial(client.read_flow_run, run.id), name, deleted).state
            if state is not None and state.is_final():
                return state
            if caller is not None:
                own = _answer(partial(client.read_flow_run, caller), name, own_deleted).state
                if own is not None and own.is_crashed():
                    raise ServiceError("this run was taken for dead, and another goes on in its place")
            time.sleep(POLL_SECONDS)
