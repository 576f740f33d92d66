"""Where a step for a GPU runs. The environment of the run says it, and the first that is set counts:

    RAY_ADDRESS              on a host of that Ray cluster, which Ray chooses (ray_cluster.py)
    ELASTIC_GPU_DEPLOYMENT   on a worker of the gpu pool, as a run of that deployment (gpu_pool.py)
    neither                  here

All other steps run here, but for shards of the data, which Ray's hosts make (ray_shards.py). One step at a time has the
devices of a machine, wherever it was asked for.
"""

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

import torch

from elastic_core.files.locks import held
from tasks.running.asked import Asked, device_of_run
from tasks.running.code import kernels
from tasks.running.devices import visible
from tasks.running.gpu_pool import DEPLOYMENT_VARIABLE, GpuPool
from tasks.running.ray_cluster import ADDRESS_VARIABLE, RayCluster

# Whether a step that has the devices runs here: the steps inside it have them too.
_has_devices: ContextVar[bool] = ContextVar("has_devices", default=False)


class Place(Protocol):
    """Other processes that do steps for this one."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def device(self) -> str:
        """What stands for its devices in the key of a step."""

    def do(self, asked: Asked) -> None:
        """Return when the step is done, its result in the cache; a ServiceError says in one line why it is not."""


def elsewhere() -> Place | None:
    """Who does this process's steps for a GPU; None where they are done here.

    A process that does a step for another run asks nobody, whatever its environment names: it might find its own run,
    and wait for itself.
    """
    if device_of_run.get():
        return None
    if address := os.environ.get(ADDRESS_VARIABLE):
        return RayCluster(address)
    if deployment := os.environ.get(DEPLOYMENT_VARIABLE):
        return GpuPool(deployment)
    return None


def device() -> str:
    """What a step for a GPU is done on: the device of this machine, or what stands for the devices of others.

    The machine of a run may have no GPU, and its workers have. A name stands for their devices, so that the run finds
    in the cache what they made. The number of devices is no part of the name: a stage goes on with more and with fewer.
    """
    if asked := device_of_run.get():
        return asked
    place = elsewhere()
    return this_device() if place is None else place.device()


def this_device() -> str:
    """The device of this machine, and the kernels that run on it."""
    if not torch.cuda.is_available():
        return "cpu"
    return ", ".join(filter(None, (torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}", kernels())))


@contextmanager
def device_to_oneself(home: Path) -> Iterator[None]:
    """Hold the devices of this machine against every other process of this state directory.

    A step inside a step has what that one holds. The end of a process frees what it held, however it ends. Neither a
    pool's limit nor Ray's count does it alone: a server that was away may believe that a run has ended which goes on.
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
    return sorted(f"cuda-{name}" for name in visible()) or ["cpu"]
