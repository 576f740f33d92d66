"""The nodes of a Ray cluster that train a stage with the one whose step it is: an actor on each runs a launcher there.

The step has a placement group with a bundle for each node, and runs in the first. torchrun joins the processes of all;
Ray says that a node is lost. What the job reads every node brings to its own disk, by digest, and of a checkpoint each
stores what its own processes wrote. The actors end with the step, however that ends, and with them their processes.
"""

import logging
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from elastic_core.training.job import TrainJob
from tasks.records import Artifact
from tasks.running.asked import Asked
from tasks.running.digests import recorded
from tasks.running.nodes import End, Meeting, NodeLost, other_nodes
from tasks.running.places import device_to_oneself
from tasks.running.ray_cluster import fault_of_host, in_short, options, part_of, raised_by
from tasks.running.steps import own_inputs
from tasks.running.training import run_processes
from tasks.running.travelling import bring_last, store_part, stored_checkpoints
from tasks.running.workspace import at_hand
from tasks.settings import WORKSPACE, ServiceError, home_directory

PORTS = range(20_000, 30_000)  # neither Ray's own nor those of outgoing connections
LAST_SECONDS = 10.0  # from a failure on one node to the end of all, if they end by themselves
LOST_SECONDS = 180.0  # Ray knows of a lost node after half a minute

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one node does in a start: the job as the first node has it, and the artifacts of whose files it is made."""

    asked: Asked
    flow_run: UUID | None
    job: TrainJob
    reads: tuple[Artifact, ...]
    processes: int
    meeting: Meeting
    workspace: str


class Node:
    """On a node of the cluster: the actor that does its part. Its methods run beside one another."""

    def __init__(self) -> None:
        self._stop, self._ended = threading.Event(), threading.Event()
        self._work, self._key = Path(), ""

    def run(self, part: Part) -> End | None:
        """Run this node's processes until they end; None where all was done."""
        asked, host = part.asked, socket.gethostname()
        self._stop.clear()
        self._ended.clear()
        if fault := fault_of_host({f"{asked.module}:{asked.step}": asked.runs}, (), part.workspace):
            raise ServiceError(f"{host} cannot train with the others: {fault}")
        with part_of(part.flow_run), device_to_oneself(home_directory()), at_hand({"reads": part.reads}) as here:
            job = _on_this_node(part.job, part.reads, here["reads"])
            self._work, self._key = Path(job.work), asked.key
            self._work.mkdir(parents=True, exist_ok=True)
            if (stored := stored_checkpoints(self._work, asked.key)) is not None:
                bring_last(stored, self._work)
            meeting = part.meeting
            logger.info("%s: node %d of %d is %s", asked.title, meeting.number + 1, meeting.nodes, host)
            try:
                end = run_processes(job, part.processes, meeting, lambda: not self._stop.is_set())
            finally:
                self._ended.set()
        if end is None:
            shutil.rmtree(self._work)
        return end

    def store(self, done: int) -> bool:
        """Store this node's files of a checkpoint; whether that was done."""
        stored = stored_checkpoints(self._work, self._key)
        assert stored is not None, "a Ray cluster has a workspace"
        return store_part(stored, self._work, done, self._ended)

    def stop(self) -> None:
        """End the processes; `run` then returns."""
        self._stop.set()


@contextmanager
def with_others(asked: Asked, flow_run: UUID | None) -> Iterator[None]:
    """Let a step that has several nodes train on all of them."""
    import ray
    from ray.util import get_current_placement_group

    if (group := get_current_placement_group()) is None:
        yield
        return
    nodes = RayNodes(ray, group, asked, flow_run)
    token = other_nodes.set(nodes)
    try:
        yield
    finally:
        other_nodes.reset(token)
        nodes.end()


class RayNodes:
    """The other nodes of a placement group, as nodes.py has them."""

    def __init__(self, ray: Any, group: Any, asked: Asked, flow_run: UUID | None) -> None:
        self._ray, self._asked, self._flow_run = ray, asked, flow_run
        self._runs: list[Any] = []
        self._failed_at: float | None = None
        self._nodes = []
        for bundle, resources in enumerate(group.bundle_specs[1:], start=1):
            there = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group, bundle)
            given = options(**{"CPU": 0.0, **resources})
            self._nodes.append(ray.remote(Node).options(max_concurrency=3, scheduling_strategy=there, **given).remote())

    def start(self, job: TrainJob, processes: int) -> Meeting:
        address = self._ray.util.get_node_ip_address()
        first = Meeting(nodes=1 + len(self._nodes), address=address, port=_free_port(address))
        part = Part(
            asked=self._asked,
            flow_run=self._flow_run,
            job=job,
            reads=tuple(made for made in recorded(own_inputs()) if isinstance(made, Artifact)),
            processes=processes,
            meeting=first,
            workspace=os.environ[WORKSPACE],
        )
        parts = [replace(part, meeting=replace(first, number=number)) for number in range(1, first.nodes)]
        self._runs = [node.run.remote(each) for node, each in zip(self._nodes, parts, strict=True)]
        self._failed_at = None
        return first

    def ended(self) -> bool:
        done, _ = self._ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        if self._failed_at is None and any(map(self._has_failed, done)):
            self._failed_at = time.monotonic()
        return self._failed_at is not None and time.monotonic() - self._failed_at > LAST_SECONDS

    def ends(self) -> list[End]:
        _, left = self._ray.wait(self._runs, num_returns=len(self._runs), timeout=LAST_SECONDS)
        for node, run in zip(self._nodes, self._runs, strict=True):
            if run in left:
                node.stop.remote()
        errors = self._ray.exceptions
        found = []
        for run in self._runs:
            try:
                end: End | None = self._ray.get(run, timeout=LOST_SECONDS)
            except errors.RayTaskError as error:
                raise raised_by(error, str(error)) from None
            except (errors.RayError, TimeoutError) as error:
                count = 1 + len(self._runs)
                raise NodeLost(f"{self._asked.title} lost one of its {count} nodes: {in_short(error)}") from None
            found += [end] if end is not None else []
        return found

    def store(self, done: int) -> "Storing":
        return Storing(self._ray, [node.store.remote(done) for node in self._nodes])

    def end(self) -> None:
        """End the actors, and with them their processes."""
        for node in self._nodes:
            self._ray.kill(node)

    def _has_failed(self, run: Any) -> bool:
        try:
            return self._ray.get(run) is not None
        except self._ray.exceptions.RayError:
            return True


@dataclass(frozen=True, slots=True)
class Storing:
    """Nodes that store their files of a checkpoint."""

    ray: Any
    answers: Sequence[Any]

    def done(self, seconds: float) -> bool | None:
        _, left = self.ray.wait(list(self.answers), num_returns=len(self.answers), timeout=seconds)
        if left:
            return None
        try:
            return all(self.ray.get(list(self.answers)))
        except self.ray.exceptions.RayTaskError as error:
            raise ServiceError(f"another node cannot store its files ({error.cause})", transient=True) from None
        except self.ray.exceptions.RayError:
            return False


def _on_this_node(job: TrainJob, before: Sequence[Artifact], after: Sequence[Artifact]) -> TrainJob:
    """A job of another node with this one's paths."""

    def here(path: str) -> str:
        for old, new in zip(before, after, strict=True):
            if Path(path).is_relative_to(old.path):
                return str(Path(new.path) / Path(path).relative_to(old.path))
        raise AssertionError(f"{path} is in none of {[artifact.path for artifact in before]}")

    work = home_directory() / "workspace" / Path(job.work).name
    return replace(
        job,
        student=here(job.student),
        teacher=here(job.teacher) if job.teacher is not None else None,
        tokens=here(job.tokens),
        work=str(work),
        output=str(work / Path(job.output).name),
    )


def _free_port(address: str) -> int:
    """A port of this node on which nothing listens."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise ServiceError(f"no port of {address} from {PORTS[0]} to {PORTS[-1]} is free", transient=True)
