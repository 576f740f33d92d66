"""A step done by a Ray cluster: Ray finds a whole node that is free, and the step runs there as a task of Ray's.

An actor has it done for whoever asks (ray_steps.py), and a stage of training has several nodes (ray_nodes.py). Ray is
imported by this file and ray_nodes.py alone, and only where RAY_ADDRESS is set. A host of the cluster needs what a
worker of the gpu pool needs: this package, and the services in its own environment. None of that, and so no secret, is
part of what Ray passes on and its dashboard shows. What hosts make they share through the workspace in the object
store. A host has the step's lease while it works, so that a host that Ray takes for lost, and its successor, do not
make a result twice.
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

from tasks.reporting.numbers import counted
from tasks.running import code
from tasks.running.asked import WORKERS_OF, Asked, show_our_lines
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
CONNECT_SECONDS = 10.0
LOOK_SECONDS = 300.0
LAST_LINES_SECONDS = 10.0

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
        return first_seen(self.address).device

    def do(self, asked: Asked) -> None:
        """Have a host do the step and leave its result in the shared workspace.

        A ServiceError says on which host it failed, and why. Whatever ends the wait, Ctrl-C too, ends the step; the
        sudden end of this process does not.
        """
        from tasks.running.ray_steps import have_done  # which imports this module

        have_done(self, asked)

    def hosts(self, steps: Mapping[str, Mapping[str, str]], files: Sequence[str]) -> list[Host]:
        """Every host on which Ray may run a step, looked at; a ServiceError where none answers.

        `steps` has what each step runs here, by `module:name`; `files` are the user's own that steps read.
        """
        ray, wanted = connected(self.address), first_seen(self.address).node
        looks = []
        for node in living_nodes(ray):
            if has(node, wanted):
                there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                function = ray.remote(_look).options(max_retries=1, **options(CPU=0), scheduling_strategy=there)
                looks.append((node["NodeManagerHostname"], function.remote(steps, files, os.environ[WORKSPACE])))
        found = [host for name, look in looks if (host := _host(ray, name, look)) is not None]
        if not found:
            raise ServiceError(f"no host of {self.name} answers; look at it with `ray status`", transient=True)
        return [_with_its_gpus(host, int(wanted.get("GPU", 0))) for host in found]


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
def first_seen(address: str) -> Nodes:
    """The nodes of a cluster when this process first looked.

    When some are lost, a step waits for one like them: it is not done on less, and its key stays the same.
    """
    return _nodes_for_steps(living_nodes(connected(address)))


def _nodes_for_steps(nodes: list[dict[str, Any]]) -> Nodes:
    """Those with the most GPUs or, where there is no GPU, with the most CPUs."""
    for resource in ("GPU", "CPU"):
        if most := max((node["Resources"].get(resource, 0.0) for node in nodes), default=0.0):
            wanted = {resource: most}
            return Nodes(node=wanted, device=f"{WORKERS_OF}Ray: {resource}")
    raise ServiceError("the Ray cluster has neither GPUs nor CPUs for tasks; add hosts with `ray start --address=...`")


def living_nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def has(node: Mapping[str, Any], wanted: Mapping[str, float]) -> bool:
    return all(node["Resources"].get(name, 0.0) >= count for name, count in wanted.items())


def connected(address: str) -> Any:
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


def in_words(resources: Mapping[str, float]) -> str:
    return " and ".join(counted(count, name) for name, count in resources.items())


def _host(ray: Any, name: str, look: Any) -> Host | None:
    """What a look at a host has found; None for one that is lost. A host that cannot even look is at fault."""
    try:
        found: Host = ray.get(look, timeout=LOOK_SECONDS)
    except ray.exceptions.RayTaskError as error:
        return Host(name=name, gpus=0, gpu="", gpu_memory=0, fault=reason_of(error))
    except ray.exceptions.RayError as error:
        logger.warning("%s does not answer (%s); the other hosts do the steps", name, type(error).__name__)
        return None
    return found


def _with_its_gpus(host: Host, promised: int) -> Host:
    """A host, at fault where PyTorch there sees fewer GPUs than Ray has: the step would run on the CPU."""
    if host.fault or host.gpus >= promised:
        return host
    return replace(host, fault=f"PyTorch sees {host.gpus} of its {promised} GPUs; install there a build for their CUDA")


def reason_of(error: Any) -> str:
    """The last line of what a task raised: the exception itself."""
    cause = getattr(error, "cause", None)
    lines = str(cause if cause is not None else error).strip().splitlines()
    return redact(lines[-1]) if lines else type(cause).__name__


def raised_by(error: Any, otherwise: str) -> Exception:
    """What a task of ours raised, where that is one line for people; else a ServiceError that says `otherwise`."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, ServiceError | ValueError) else ServiceError(otherwise)


def in_short(error: Exception) -> str:
    """The first sentence of what Ray says of a lost host or process; advice on its dashboard follows it."""
    return re.split(r"\n|(?<=\.) ", str(error), maxsplit=1)[0]


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
