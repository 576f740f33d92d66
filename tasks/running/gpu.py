"""Steps that need a GPU: one at a time has the devices of a machine, here or where a pool of workers has them."""

import gc
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException

from elastic_core.files.locks import held
from elastic_core.schema import to_dict
from tasks.running.code import kernels
from tasks.settings import ServiceError, is_transient

R = TypeVar("R")

DEPLOYMENT_VARIABLE = "ELASTIC_GPU_DEPLOYMENT"
# Set by `elastic up` for the workers on its machine, so that they and `elastic run` there share results.
DEVICE_VARIABLE = "_ELASTIC_GPU_DEVICE"
WORKERS_OF = "workers of "

POLL_SECONDS = 1.0
LONGEST_OUTAGE_SECONDS = 3600.0
AWAY = "Prefect's server does not answer; it is asked again every second, for an hour at most"
ATTEMPTS = 5

# The flow run on whose page a step shows its progress, where that is another than the one it runs in.
shown_on: ContextVar[UUID | None] = ContextVar("shown_on", default=None)

# The deployment that this process does a step for. In the step's key its name stands for the device.
device_of_run: ContextVar[str | None] = ContextVar("device_of_run", default=None)

# Whether a step that has the devices runs here: the steps inside it have them too.
_has_devices: ContextVar[bool] = ContextVar("has_devices", default=False)

logger = logging.getLogger(__name__)


def asked_deployment() -> str | None:
    """The deployment that does this process's steps for a GPU; None where they are done here.

    A worker that does a step for another run asks nobody, even if its environment names a deployment: it would find
    its own run, and wait for itself.
    """
    return None if device_of_run.get() else os.environ.get(DEPLOYMENT_VARIABLE) or None


def device() -> str:
    """What a step for a GPU is done on: the device of this machine, or what stands for the devices of its workers.

    The machine of a run may have no GPU, and its workers have. So that it finds what they made without asking them, a
    deployment's name stands for their devices, unless `elastic up` named the device that both are on. How many there
    are is no part of it, for a stage goes on with more of them and with fewer.
    """
    if asked := device_of_run.get():
        return asked
    if deployment := asked_deployment():
        return os.environ.get(DEVICE_VARIABLE) or f"{WORKERS_OF}{deployment}"
    return this_device()


def this_device() -> str:
    """The device of this machine, and the kernels that run on it."""
    if not torch.cuda.is_available():
        return "cpu"
    return ", ".join(filter(None, (torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", kernels())))


@contextmanager
def device_to_oneself(home: Path) -> Iterator[None]:
    """Hold the devices of this machine against every other process of this state directory.

    A step inside a step has what that one holds. The end of a process frees what it held, however it ends. A pool's
    limit does not do it alone: a server that was away may believe that a run has ended which goes on.
    """
    if _has_devices.get():
        yield
        return
    with ExitStack() as stack:
        for device in _devices():
            file = home / "locks" / f"{socket.gethostname()}-{device}"
            stack.enter_context(held(file, waits=f"waiting for {device}, which another run has"))
        stack.callback(_has_devices.reset, _has_devices.set(True))
        yield


def give_back_memory() -> None:
    """Free the device's memory that this process keeps without using it: trainers and other processes come next."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _devices() -> list[str]:
    """Names of the devices, always in one order, so that two runs cannot wait for each other."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return sorted(f"cuda-{number.strip()}" for number in numbers) if torch.cuda.is_available() else ["cpu"]


def run_on_workers(
    deployment: str, name: str, step: str, inputs: Mapping[str, Any], key: str, runs: Mapping[str, str]
) -> None:
    """Have a run of `deployment`, called `name`, do the step and leave its result in the cache; a crash is repeated.

    A run that already does the step with this `key`, for another caller or from before this one was restarted, is
    waited for instead. `runs` is the code and the libraries that the step has here, and must have there. Waits through
    outages of Prefect's server. Raises a ServiceError that says why where the run fails.
    """
    context = FlowRunContext.get()
    own = context.flow_run if context is not None else None
    caller = own.id if own is not None else None
    parameters = {
        "step": step,
        "inputs": to_dict(inputs),
        "device": device(),
        "runs": dict(runs),
        "show_on": str(caller) if caller else None,
    }
    stage = inputs.get("stage")
    tags = [*(own.tags if own else ()), *([stage.name] if stage is not None else ())]
    for attempt in range(1, ATTEMPTS + 1):
        started, joined = start_run(deployment, name, parameters, key, tags)
        logger.info("%s waits for %s, as run %s", step, "another's worker" if joined else "a worker", started.name)
        state = _final_state(started, name, caller)
        if state.is_completed():
            return
        if not state.is_crashed() and not (joined and state.is_cancelled()):
            ended = state.name or state.type.value
            reason = (state.message or ended).removeprefix("Flow run encountered an exception: ")
            raise ServiceError(f"{step} {ended.lower()} on the worker: {reason}")
        logger.warning("%s crashed on the worker (attempt %d of %d): %s", step, attempt, ATTEMPTS, state.message)
    raise ServiceError(f"{step} crashed {ATTEMPTS} times on the workers of {deployment}; see their logs")


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
