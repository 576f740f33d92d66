"""A step done by a Ray cluster: Ray finds a whole node that is free, and the step runs there as a task of Ray's.

A stage of training has several nodes (ray_nodes.py). These two files alone import Ray, and only where RAY_ADDRESS is
set. A host of the cluster needs what a worker of the gpu pool needs: this package, and the services in its own
environment. None of that, and so no secret, is part of what Ray passes on and its dashboard shows. What hosts make they
share through the workspace in the object store. A host has the step's lease while it works, so that a host that Ray
takes for lost, and its successor, do not make a result twice.
"""

import importlib
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import torch
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.logging.configuration import ensure_logging_setup
from prefect.logging.handlers import APILogWorker
from prefect.results import get_result_store
from prefect.task_runners import ThreadPoolTaskRunner

from elastic_core.recipe import Stage
from elastic_core.schema import build
from tasks.running import code
from tasks.running.asked import WORKERS_OF, Asked, show_our_lines
from tasks.running.nodes import NodeLost, nodes_for
from tasks.settings import (
    EMBEDDED,
    ENDPOINT_S3,
    PREFECT_API,
    TRACKING_URI,
    WORKSPACE,
    ServiceError,
    Settings,
    redact,
)

ADDRESS_VARIABLE = "RAY_ADDRESS"  # Ray's own
ATTEMPTS = 5
CONNECT_SECONDS = 10.0
CANCEL_SECONDS = 30.0  # for a step to end its processes
LOOK_SECONDS = 300.0
RESERVE_SECONDS = 60.0
LAST_LINES_SECONDS = 10.0

# The input of a step that may have several nodes.
LEAST_NODES = "least_nodes"

OUR_LOGGERS = "elastic_core,tasks,flows"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host of a cluster: its GPUs, of so many bytes each; `fault` is why it could not do a step, "" if it could."""

    name: str
    gpus: int
    gpu: str
    gpu_memory: int
    fault: str


@dataclass(frozen=True, slots=True)
class RayCluster:
    """The cluster that a host of it, such as this one, knows by an address: HOST:PORT, or auto."""

    address: str

    @property
    def name(self) -> str:
        return f"the Ray cluster at {redact(self.address)}"

    def device(self) -> str:
        """A name for all of its GPUs, of whatever kind: hosts come and go, and a stage goes on with what comes."""
        return _first_seen(self.address).device

    def do(self, asked: Asked) -> None:
        """Have a host do the step and leave its result in the shared workspace; a lost host's step is done by another.

        A ServiceError says on which host it failed, and why. Whatever ends the wait, Ctrl-C too, ends the step.
        """
        ray, wanted = _connected(self.address), _first_seen(self.address).node
        context = FlowRunContext.get()
        run = context.flow_run.id if context is not None and context.flow_run is not None else None
        given = options(**{"CPU": 0.0, **wanted})
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._reserved(ray, asked, wanted) as there:
                    function = ray.remote(_do_here).options(name=asked.title, max_retries=0, **given, **there)
                    task = function.remote(asked, run)
                    with _cancelled_at_the_end(ray, task):
                        ray.get(task)
                return
            except ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, NodeLost):
                    logger.warning("%s (attempt %d of %d); it goes on with what is left", cause, attempt, ATTEMPTS)
                    continue
                told = isinstance(cause, ServiceError)  # by _do_here
                raise ServiceError(
                    _reason(error) if told else f"{asked.step} cannot be done on {self.name}: {_reason(error)}"
                ) from None
            except ray.exceptions.TaskCancelledError:
                raise ServiceError(f"{asked.step} was cancelled in Ray; run again to go on") from None
            except ray.exceptions.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
                raise ServiceError(f"{asked.step} took all the memory of its host, and would again: {reason}") from None
            except ray.exceptions.RayError as error:
                reason = str(error).partition("\n")[0]
                logger.warning("%s: its host was lost (attempt %d of %d): %s", asked.step, attempt, ATTEMPTS, reason)
        raise ServiceError(f"{asked.step} lost its host {ATTEMPTS} times; look at Ray's logs and at the hosts' memory")

    @contextmanager
    def _reserved(self, ray: Any, asked: Asked, wanted: Mapping[str, float]) -> Iterator[dict[str, Any]]:
        """The options that place a step: none where it has one node, else the first of nodes that it has all at once.

        How many is decided anew whenever they are not free, for nodes come and go.
        """
        while True:
            nodes = sum(_has(node, wanted) for node in _nodes(ray))
            count = count_of_nodes(asked.inputs, nodes, int(wanted.get("GPU", 0)))
            many = f"{count} nodes" if count > 1 else "a node"
            logger.info("%s waits for %s of %s with %s", asked.step, many, self.name, _in_words(wanted))
            if count == 1:
                yield {}
                return
            group = ray.util.placement_group([dict(wanted)] * count, strategy="STRICT_SPREAD")
            try:
                if group.wait(RESERVE_SECONDS):
                    scheduling = ray.util.scheduling_strategies
                    yield {"scheduling_strategy": scheduling.PlacementGroupSchedulingStrategy(group, 0)}
                    return
            finally:
                ray.util.remove_placement_group(group)

    def hosts(self, steps: Mapping[str, Mapping[str, str]], files: Sequence[str]) -> list[Host]:
        """Every host on which Ray may run a step, looked at; a ServiceError where none answers.

        `steps` has what each step runs here, by `module:name`; `files` are the user's own that steps read.
        """
        ray, wanted = _connected(self.address), _first_seen(self.address).node
        looks = []
        for node in _nodes(ray):
            if _has(node, wanted):
                there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                function = ray.remote(_look).options(max_retries=1, **options(CPU=0), scheduling_strategy=there)
                looks.append((node["NodeManagerHostname"], function.remote(steps, files, os.environ[WORKSPACE])))
        found = [host for name, look in looks if (host := _host(ray, name, look)) is not None]
        if not found:
            raise ServiceError(f"no host of {self.name} answers; look at it with `ray status`", transient=True)
        return [_with_its_gpus(host, int(wanted.get("GPU", 0))) for host in found]


def count_of_nodes(inputs: Mapping[str, Any], nodes: int, gpus: int) -> int:
    """On how many of so many nodes, with so many GPUs each, a step is done: one, but for a stage of training.

    A stage waits for as many as it needs where fewer are left.
    """
    if LEAST_NODES not in inputs:
        return 1
    return max(int(inputs[LEAST_NODES]), nodes_for(build(Stage, inputs["stage"]), nodes, gpus))


def check_shared_services() -> None:
    """ValueError unless this process's environment names a workspace, and services that all hosts can reach."""
    if not os.environ.get(WORKSPACE):
        raise ValueError(
            f"{WORKSPACE} is not set, and with {ADDRESS_VARIABLE} it has to be: hosts of a Ray cluster share what they "
            f"make through the object store alone; set {WORKSPACE}=s3://bucket/prefix, the same on all"
        )
    settings = Settings.from_environment()
    own = [name for name in (PREFECT_API, ENDPOINT_S3) if name in json.loads(os.environ.get(EMBEDDED) or "{}")]
    own += [PREFECT_API] if not os.environ.get(PREFECT_API) else []
    own += [TRACKING_URI] if settings.tracking_uri.startswith("sqlite:") else []
    if own:
        raise ValueError(
            f"with {ADDRESS_VARIABLE} steps run on other hosts, and no other host reaches what `elastic` brings along; "
            f"set {' and '.join(own)} to a server that all hosts reach"
        )


# In the process that asks


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes that do steps: what each has, all of which a step asks for, and what stands for their devices."""

    node: Mapping[str, float]
    device: str


@cache
def _first_seen(address: str) -> Nodes:
    """The nodes of a cluster when this process first looked.

    When some are lost, a step waits for one like them: it is not done on less, and its key stays the same.
    """
    return _nodes_for_steps(_nodes(_connected(address)))


def _nodes_for_steps(nodes: list[dict[str, Any]]) -> Nodes:
    """Those with the most GPUs or, where there is no GPU, with the most CPUs."""
    for resource in ("GPU", "CPU"):
        if most := max((node["Resources"].get(resource, 0.0) for node in nodes), default=0.0):
            wanted = {resource: most}
            return Nodes(node=wanted, device=f"{WORKERS_OF}Ray: {resource}")
    raise ServiceError("the Ray cluster has neither GPUs nor CPUs for tasks; add hosts with `ray start --address=...`")


def _nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _has(node: Mapping[str, Any], wanted: Mapping[str, float]) -> bool:
    return all(node["Resources"].get(name, 0.0) >= count for name, count in wanted.items())


def _connected(address: str) -> Any:
    """The module `ray`, with a connection to the cluster; a ValueError or ServiceError where there can be none."""
    check_shared_services()
    import ray
    import ray.util.scheduling_strategies

    if ray.is_initialized():
        return ray
    _check_address(address)
    try:
        with _own_sigterm():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(redact(str(error)).split())
        raise ServiceError(f"Ray at {redact(address)} cannot be joined ({reason}); check {ADDRESS_VARIABLE}") from error
    return ray


def _check_address(address: str) -> None:
    """Find in seconds what Ray itself would try for minutes: an address where nothing listens."""
    if address == "auto":
        return
    found = re.fullmatch(r"\[?([^/\s]+?)\]?:(\d+)", address)
    if found is None:
        raise ValueError(
            f"{ADDRESS_VARIABLE}={redact(address)!r} is not HOST:PORT, such as 10.0.0.1:6379, and not auto"
        )
    try:
        socket.create_connection((found[1], int(found[2])), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ServiceError(
            f"no Ray cluster answers at {ADDRESS_VARIABLE}={address} ({error}); look there with `ray status`",
            transient=True,
        ) from error


def options(**resources: float) -> dict[str, Any]:
    """A task's place, and what of our lines is to be on the run's page, which is no secret."""
    asked = {f"num_{name.lower()}s": count for name, count in resources.items()}
    return {**asked, "runtime_env": {"env_vars": {"PREFECT_LOGGING_EXTRA_LOGGERS": OUR_LOGGERS}}}


def _in_words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{count:g} {name}{'s' * (count > 1)}" for name, count in resources.items())


def _host(ray: Any, name: str, look: Any) -> Host | None:
    """What a look at a host has found; None for one that is lost. A host that cannot even look is at fault."""
    try:
        found: Host = ray.get(look, timeout=LOOK_SECONDS)
    except ray.exceptions.RayTaskError as error:
        return Host(name=name, gpus=0, gpu="", gpu_memory=0, fault=_reason(error))
    except ray.exceptions.RayError as error:
        logger.warning("%s does not answer (%s); the other hosts do the steps", name, type(error).__name__)
        return None
    return found


def _with_its_gpus(host: Host, promised: int) -> Host:
    """A host, at fault where PyTorch there sees fewer GPUs than Ray has: the step would run on the CPU."""
    if host.fault or host.gpus >= promised:
        return host
    return replace(host, fault=f"PyTorch sees {host.gpus} of its {promised} GPUs; install there a build for their CUDA")


def _reason(error: Any) -> str:
    """The last line of what a task raised: the exception itself."""
    cause = getattr(error, "cause", None)
    lines = str(cause if cause is not None else error).strip().splitlines()
    return redact(lines[-1]) if lines else type(cause).__name__


@contextmanager
def _cancelled_at_the_end(ray: Any, task: Any) -> Iterator[None]:
    """End a task that still runs when the block ends: first as Ctrl-C does, so that it ends its own processes."""
    try:
        yield
    finally:
        if not ray.wait([task], timeout=0)[0]:
            ray.cancel(task)
            if not ray.wait([task], timeout=CANCEL_SECONDS)[0]:
                ray.cancel(task, force=True)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's way of ending on SIGTERM, which Ray would replace by its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# On a host of the cluster


def _do_here(asked: Asked, flow_run: UUID | None) -> None:
    """The task of Ray's: do the step, as a part of the flow run that asks, on whose page its progress and lines are."""
    from tasks.running.ray_nodes import with_others  # steps.py itself imports this module, by way of places.py
    from tasks.running.steps import do_asked

    host = socket.gethostname()
    try:
        check_shared_services()
        importlib.import_module(asked.module)
        with part_of(flow_run), with_others(asked, flow_run):
            logger.info("%s is done on %s", asked.title, host)
            do_asked(asked.step, asked.inputs, asked.device, asked.runs)
    except NodeLost:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ServiceError(f"{asked.step} failed on {host}: {reason}") from error


@contextmanager
def part_of(flow_run: UUID | None) -> Iterator[None]:
    """Let steps be task runs of a flow run that goes on in another process; all that Prefect is told arrives."""
    ensure_logging_setup()
    show_our_lines()
    try:
        with get_client(sync_client=True) as client:
            if flow_run is None:
                yield
                return
            try:
                run = client.read_flow_run(flow_run)
            except ObjectNotFound:
                raise ValueError(f"{PREFECT_API} names another server than where the run is; set the same") from None
            with FlowRunContext(
                flow=Flow(lambda: None, name="elastic"),  # Prefect takes a run without one for asynchronous
                flow_run=run,
                client=client,
                task_runner=ThreadPoolTaskRunner(),
                result_store=get_result_store(),
                detached=True,
            ):
                yield
    finally:
        with suppress(TimeoutError):
            EventsWorker.drain_all(timeout=LAST_LINES_SECONDS)
            APILogWorker.drain_all(timeout=LAST_LINES_SECONDS)


def _look(steps: Mapping[str, Mapping[str, str]], files: Sequence[str], workspace: str) -> Host:
    """This host, and why it could not do these steps, if so."""
    count = torch.cuda.device_count()
    return Host(
        name=socket.gethostname(),
        gpus=count,
        gpu=torch.cuda.get_device_name(0) if count else "",
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if count else 0,
        fault=fault_of_host(steps, files, workspace),
    )


def fault_of_host(steps: Mapping[str, Mapping[str, str]], files: Sequence[str], workspace: str) -> str:
    from tasks.running.steps import ON_GPU  # as above

    try:
        check_shared_services()
    except ValueError as error:
        return f"where `ray start` was called, {error}"
    if os.environ[WORKSPACE] != workspace:
        return f"its {WORKSPACE} is {os.environ[WORKSPACE]}, and that of the run is {workspace}; set the same"
    if missing := [file for file in files if not Path(file).exists()]:
        return f"it has no {missing[0]}; put it there, at the same path on every host"
    for name, runs in steps.items():
        module, _, step = name.partition(":")
        importlib.import_module(module)
        if step not in ON_GPU:
            return f"it has no step {step}; install the same version of this package"
        if changed := code.differences(runs, code.runs(ON_GPU[step].fn)):
            return f"{step} is not as in the run that asks: {changed}; install the same in both"
    return ""
