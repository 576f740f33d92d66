"""One step done by a Ray cluster, for whoever asks: an actor on the head node finds the hosts and waits for them.

It outlives the process that asks. A flow that is killed while a stage trains on many hosts, and begins again wherever,
finds the actor by the step's key, and waits for what is under way. The actor ends with the step, or when the last who
waits for it leaves, and with it all that it began.
"""

import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID, uuid4

from prefect.context import FlowRunContext

from elastic_core.recipe import Stage
from elastic_core.schema import build
from tasks.running.asked import Asked
from tasks.running.nodes import NodeLost, nodes_for
from tasks.running.ray_cluster import (
    RayCluster,
    check_shared_services,
    connected,
    first_seen,
    has,
    in_short,
    in_words,
    living_nodes,
    options,
    part_of,
    raised_by,
    reason_of,
)
from tasks.settings import WORKSPACE, ServiceError

ATTEMPTS = 5
CANCEL_SECONDS = 30.0  # for a step to end its processes
RESERVE_SECONDS = 60.0
LOOK_SECONDS = 2.0  # between two looks at how the step does
GONE_SECONDS = 15.0  # after which one who has not looked waits no longer

# The input of a step that may have several nodes.
LEAST_NODES = "least_nodes"

HEAD = {"node:__internal_head__": 0.001}  # Ray's own name for it

logger = logging.getLogger(__name__)


def have_done(cluster: RayCluster, asked: Asked) -> None:
    """Wait until the cluster has done a step, which it may have begun for another process; show what is said of it."""
    ray, wanted = connected(cluster.address), first_seen(cluster.address).node
    context = FlowRunContext.get()
    run = context.flow_run.id if context is not None and context.flow_run is not None else None
    for attempt in range(1, ATTEMPTS + 1):
        actor = ray.remote(Doing).options(
            name=f"{asked.step}-{asked.key[:16]}",
            namespace=os.environ[WORKSPACE],  # another workspace's step of this key has another result
            lifetime="detached",
            get_if_exists=True,
            max_concurrency=64,
            resources=HEAD,
            **options(CPU=0.0),
        )
        try:
            _wait(ray, actor.remote(cluster.address, dict(wanted)), asked, run)
            return
        except ray.exceptions.RayTaskError as error:
            raise raised_by(error, reason_of(error)) from None
        except ray.exceptions.RayError as error:
            lost = "%s: who had it done was lost (attempt %d of %d): %s"
            logger.warning(lost, asked.title, attempt, ATTEMPTS, in_short(error))
    raise ServiceError(f"{asked.title} lost the head of {cluster.name} {ATTEMPTS} times; look at Ray's logs")


def _wait(ray: Any, actor: Any, asked: Asked, run: UUID | None) -> None:
    """Wait for the actor to have the step done; leave it when the wait ends, however it does."""
    mine, shown = uuid4().hex, 0
    first: UUID | None = ray.get(actor.ask.remote(mine, run))
    if first != run:
        logger.info("%s is under way already; its progress is on the page of the run %s", asked.title, first)
    task = actor.do.remote(asked)
    try:
        while True:
            done, _ = ray.wait([task], timeout=LOOK_SECONDS)
            lines = ray.get(actor.look.remote(mine, shown))
            for level, line in lines:
                logger.log(level, "%s", line)
            shown += len(lines)
            if done:
                break
        ray.get(task)
    finally:
        with suppress(ray.exceptions.RayError):
            if ray.get(actor.leave.remote(mine)):  # the last one
                ray.wait([task], timeout=CANCEL_SECONDS)
                ray.kill(actor)


class Doing:
    """On the head node: the actor that has one step done. Its methods run beside one another."""

    def __init__(self, address: str, wanted: Mapping[str, float]) -> None:
        self._cluster, self._wanted = RayCluster(address), wanted
        self._lock, self._end, self._began = threading.Lock(), Future[None](), False
        self._run: UUID | None = None
        self._asking: dict[str, float] = {}
        self._task: Any = None
        self._left = threading.Event()
        self._lines = _Lines()
        logger.setLevel(logging.INFO)
        logger.addHandler(self._lines)

    def ask(self, who: str, run: UUID | None) -> UUID | None:
        """Begin to wait; on the page of which flow run the step's progress is."""
        with self._lock:
            if not self._asking and not self._began:
                self._run = run
            self._asking[who] = time.monotonic()
            return self._run

    def look(self, who: str, shown: int) -> list[tuple[int, str]]:
        """The lines, with their levels, that `who` has not seen."""
        self._asking[who] = time.monotonic()
        return self._lines.said[shown:]

    def leave(self, who: str) -> bool:
        """Wait no longer; True where nobody needs this actor any more. A step that the last one leaves is cancelled."""
        self._asking.pop(who, None)
        if self._end.done():
            return True
        if self._is_awaited():
            return False
        self._left.set()
        if self._task is not None:
            connected(self._cluster.address).cancel(self._task)
        return True

    def do(self, asked: Asked) -> None:
        """Return when the step is done, for everyone who asks; a ServiceError says why it is not."""
        with self._lock:
            begins, self._began = not self._began, True
        if not begins:
            self._end.result()
            return
        try:
            self._have_done(asked)
        except BaseException as error:
            self._end.set_exception(error)
            raise
        else:
            self._end.set_result(None)
        finally:
            threading.Thread(target=self._end_when_alone, daemon=True).start()

    def _end_when_alone(self) -> None:
        """End this process: whoever asked and was killed finds the result in the cache."""
        while self._is_awaited():
            time.sleep(LOOK_SECONDS)
        os._exit(0)

    def _is_awaited(self) -> bool:
        return any(time.monotonic() - seen < GONE_SECONDS for seen in self._asking.values())

    def _have_done(self, asked: Asked) -> None:
        """Have a host do the step; one that a lost host did is done by another."""
        ray = connected(self._cluster.address)
        given = options(**{"CPU": 0.0, **self._wanted})
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._reserved(ray, asked) as there:
                    function = ray.remote(_do_here).options(name=asked.title, max_retries=0, **given, **there)
                    self._task = function.remote(asked, self._run)
                    ray.get(self._task)
                return
            except ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, NodeLost):
                    logger.warning("%s (attempt %d of %d); it goes on with what is left", cause, attempt, ATTEMPTS)
                    continue
                told = isinstance(cause, ServiceError)  # by _do_here
                raise ServiceError(
                    reason_of(error)
                    if told
                    else f"{asked.title} cannot be done on {self._cluster.name}: {reason_of(error)}"
                ) from None
            except ray.exceptions.TaskCancelledError:
                raise ServiceError(f"{asked.title} was cancelled in Ray; run again to go on") from None
            except ray.exceptions.OutOfMemoryError as error:
                raise ServiceError(
                    f"{asked.title} took all the memory of its host, and would again: {in_short(error)}"
                ) from None
            except ray.exceptions.RayError as error:
                lost = "%s: its host was lost (attempt %d of %d): %s"
                logger.warning(lost, asked.title, attempt, ATTEMPTS, in_short(error))
        raise ServiceError(f"{asked.title} lost its host {ATTEMPTS} times; look at Ray's logs and at the hosts' memory")

    @contextmanager
    def _reserved(self, ray: Any, asked: Asked) -> Iterator[dict[str, Any]]:
        """The options that place a step: none where it has one node, else the first of nodes that it has all at once.

        How many is decided anew whenever they are not free, for nodes come and go.
        """
        while not self._left.is_set():
            nodes = sum(has(node, self._wanted) for node in living_nodes(ray))
            count = count_of_nodes(asked.inputs, nodes, int(self._wanted.get("GPU", 0)))
            many = f"{count} nodes" if count > 1 else "a node"
            logger.info("%s waits for %s of %s with %s", asked.title, many, self._cluster.name, in_words(self._wanted))
            if count == 1:
                yield {}
                return
            group = ray.util.placement_group([dict(self._wanted)] * count, strategy="STRICT_SPREAD")
            try:
                if group.wait(RESERVE_SECONDS):
                    scheduling = ray.util.scheduling_strategies
                    yield {"scheduling_strategy": scheduling.PlacementGroupSchedulingStrategy(group, 0)}
                    return
            finally:
                ray.util.remove_placement_group(group)
        raise ServiceError(f"{asked.title} was cancelled while it waited; run again to go on")


class _Lines(logging.Handler):
    """The lines that were logged, in their order, with their levels."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))


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
        raise ServiceError(f"{asked.title} failed on {host}: {reason}") from error


def count_of_nodes(inputs: Mapping[str, Any], nodes: int, gpus: int) -> int:
    """On how many of so many nodes, with so many GPUs each, a step is done: one, but for a stage of training.

    A stage waits for as many as it needs where fewer are left.
    """
    if LEAST_NODES not in inputs:
        return 1
    return max(int(inputs[LEAST_NODES]), nodes_for(build(Stage, inputs["stage"]), nodes, gpus))
