"""The shards of a corpus made by the hosts of a Ray cluster: each is a task of Ray's, on a core of a host.

A host reads its shard from S3 or the Hub, and nothing of this host's files. It stores the shard in the workspace, by
digest. This process brings the shard from there to the place where its own processes would have made it, and decides
which host makes which shard: a host that cannot make shards is left out, and a host that is lost is not asked again.
"""

import logging
import os
import queue
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastic_core.recipe import DataConfig
from tasks.artifacts.staging import scratch
from tasks.corpus.encoding import Encoder
from tasks.corpus.hub import HUB
from tasks.corpus.pieces import S3
from tasks.corpus.shards import Shard, ShardRecord, Taken, write_shard
from tasks.corpus.workers import PROCESS_BYTES, ShardMaker, Workers
from tasks.records import Artifact
from tasks.running import code
from tasks.running.digests import artifact
from tasks.running.patience import patiently
from tasks.running.ray_cluster import (
    LOOK_SECONDS,
    RayCluster,
    connected,
    fault_of_host,
    in_short,
    living_nodes,
    options,
    raised_by,
    reason_of,
)
from tasks.running.workspace import shared_workspace, small_files
from tasks.settings import WORKSPACE, ServiceError, home_directory, is_transient

TRIES = 5  # of a shard whose host is lost

logger = logging.getLogger(__name__)


def are_everywhere(config: DataConfig) -> bool:
    """Whether every host can read all sources: none is a file of this one."""
    return all(source.path.startswith((HUB, S3)) for source in config.sources)


def places_of(cluster: RayCluster) -> int:
    """How many shards all hosts of the cluster make at a time: one a core, where there is memory for so many."""
    return sum(map(_places, living_nodes(connected(cluster.address))))


def _places(node: Mapping[str, Any]) -> int:
    has = node["Resources"]
    return int(min(has.get("CPU", 0.0), has.get("memory", 0.0) // PROCESS_BYTES))


@contextmanager
def on_hosts(cluster: RayCluster, tokenizer: Artifact, maker: ShardMaker, count: int) -> Iterator[Workers]:
    """Hosts of the cluster that make shards, up to so many at a time, until the block ends.

    A ServiceError where no host can make a shard.
    """
    hosts = _Hosts(cluster, tokenizer, maker, count)
    try:
        yield hosts
    finally:
        hosts.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """A shard that a host has made and stored: its record, and the SHA-256 of its files by their names."""

    record: ShardRecord
    files: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Node:
    """A host of the cluster, as Ray and as people know it."""

    id: str
    name: str


class _Lost(Exception):
    """A task ended with its host."""


class _Hosts:
    """Who waits for a shard is a thread of this process."""

    def __init__(self, cluster: RayCluster, tokenizer: Artifact, maker: ShardMaker, count: int) -> None:
        self._cluster, self._tokenizer, self._maker = cluster, tokenizer, maker
        self._ray = connected(cluster.address)
        # One entry a place; None where no host is left, or nobody waits any more.
        self._free = queue.SimpleQueue[_Node | None]()
        self._left = 0
        for node, places in self._able():
            self._left += places
            for _ in range(places):
                self._free.put(node)
        self.count = min(count, self._left)
        self._threads = ThreadPoolExecutor(self.count, "shard")
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._asked, self._tokens, self._made = set[Any](), 0, Counter[str]()

    def submit(self, shard: Shard, before: Taken) -> "Future[ShardRecord]":
        return self._threads.submit(self._have_made, shard, before)

    def tokens(self) -> int:
        return self._tokens

    def stop(self) -> None:
        """End what is being made; what is whole stays."""
        with self._lock:
            self._stopped.set()
            asked = list(self._asked)
        self._free.put(None)
        for task in asked:
            self._ray.cancel(task)
        self._threads.shutdown(cancel_futures=True)
        if self._made:
            told = ", ".join(f"{count} on {host}" for host, count in sorted(self._made.items()))
            logger.info("%d shards were made: %s", self._made.total(), told)

    def _able(self) -> list[tuple[_Node, int]]:
        """The hosts that can make shards, each with its places; a line for those that cannot."""
        nodes = [(node, places) for node in living_nodes(self._ray) if (places := _places(node))]
        runs, workspace = code.runs(_make_there), os.environ[WORKSPACE]
        looks = [
            self._task(_fault_there, _Node(node["NodeID"], ""), CPU=0.0).remote(runs, workspace) for node, _ in nodes
        ]
        found, faults = [], []
        for (node, places), look in zip(nodes, looks, strict=True):
            name = node["NodeManagerHostname"]
            if fault := self._seen(look):
                faults.append(f"{name} makes no shards: {fault}")
                logger.warning(faults[-1])
            else:
                found.append((_Node(node["NodeID"], name), places))
        if not found:
            raise ServiceError(
                faults[0] if faults else f"no host of {self._cluster.name} has a core and a GiB for data"
            )
        return found

    def _seen(self, look: Any) -> str:
        """What a look at a host has found to be wrong there; "" if nothing is."""
        try:
            fault: str = self._ray.get(look, timeout=LOOK_SECONDS)
        except self._ray.exceptions.RayTaskError as error:
            return reason_of(error)
        except self._ray.exceptions.RayError as error:
            return in_short(error)
        return fault

    def _task(self, function: Any, node: _Node, **resources: float) -> Any:
        """A task of Ray's for one host alone, which Ray does not try again."""
        there = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.id, soft=False)
        return self._ray.remote(function).options(max_retries=0, scheduling_strategy=there, **options(**resources))

    def _have_made(self, shard: Shard, before: Taken) -> ShardRecord:
        for attempt in range(1, TRIES + 1):
            node = self._free.get()
            if node is None:
                self._free.put(None)  # the others wait too
                raise ServiceError(f"no host of {self._cluster.name} is left that makes shards", transient=True)
            try:
                made = self._make(node, shard, before)
            except _Lost as lost:
                self._drop(node)
                line = "shard %d: %s was lost (attempt %d of %d): %s"
                logger.warning(line, shard.number, node.name, attempt, TRIES, lost)
            except BaseException:
                self._free.put(node)
                raise
            else:
                self._free.put(node)
                self._bring(shard, made)
                with self._lock:
                    self._tokens += made.record.tokens
                    self._made[node.name] += 1
                return made.record
        raise ServiceError(f"shard {shard.number} lost its host {TRIES} times; look at Ray's logs")

    def _drop(self, node: _Node) -> None:
        """Count the place of a lost host out; who waits for the last one waits in vain."""
        with self._lock:
            self._left -= 1
            if not self._left:
                self._free.put(None)

    def _make(self, node: _Node, shard: Shard, before: Taken) -> _Made:
        arguments = self._maker.config, self._tokenizer, shard, before
        with self._lock:
            self._check_awaited()
            task = self._task(_make_there, node, CPU=1.0).remote(*arguments)
            self._asked.add(task)
        errors = self._ray.exceptions
        try:
            made: _Made = self._ray.get(task)
        except errors.RayTaskError as error:
            told = f"shard {shard.number} cannot be made on {node.name}: {reason_of(error)}"
            raise raised_by(error, told) from None
        except errors.OutOfMemoryError as error:
            took = f"shard {shard.number} took all the memory of {node.name} ({in_short(error)})"
            raise ServiceError(f"{took}; divide its files, or give Ray fewer cores there") from None
        except errors.RayError as error:
            self._check_awaited()
            raise _Lost(in_short(error)) from None
        finally:
            with self._lock:
                self._asked.discard(task)
        return made

    def _bring(self, shard: Shard, made: _Made) -> None:
        place, shared = self._maker.place(shard), shared_workspace()
        assert shared is not None, "a Ray cluster has a workspace"
        shutil.rmtree(place, ignore_errors=True)

        def attempt() -> None:
            self._check_awaited()
            shared.blobs.fetch(made.files, place)

        patiently(f"bringing shard {shard.number}", attempt)

    def _check_awaited(self) -> None:
        if self._stopped.is_set():
            raise ServiceError("nobody waits for this shard any more")


# On a host of the cluster


def _fault_there(runs: Mapping[str, str], workspace: str) -> str:
    """Why this host could not make a shard as the run that asks would; "" if it could."""
    changed = code.differences(runs, code.runs(_make_there))
    return f"what it runs is not as in the run that asks: {changed}" if changed else fault_of_host({}, (), workspace)


def _make_there(config: DataConfig, tokenizer: Artifact, shard: Shard, before: Taken) -> _Made:
    """The task of Ray's: make a shard and store it."""
    os.environ.update({"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})  # other shards have other cores
    shared = shared_workspace()
    assert shared is not None, "_fault_there has looked"
    try:
        with scratch(home_directory() / "workspace", "shard") as work:
            maker = ShardMaker(config=config, tokenizer=small_files(tokenizer), directory=work)
            place = maker.place(shard)
            record = write_shard(_encoder(tokenizer.digest, maker), config, shard, before, place, _unreported)
            files = artifact(place).files
            patiently(f"storing shard {shard.number}", partial(shared.blobs.put, place, files))
    except ServiceError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and not is_transient(error):
            raise  # input that cannot be used
        reason = " ".join(str(error).split()) or type(error).__name__
        told = f"shard {shard.number} failed on {socket.gethostname()}: {reason}"
        raise ServiceError(told, transient=is_transient(error)) from error
    return _Made(record=record, files=files)


_encoders: dict[str, Encoder] = {}  # of this process, by the tokenizer's digest; loading one takes a second


def _encoder(digest: str, maker: ShardMaker) -> Encoder:
    if digest not in _encoders:
        _encoders[digest] = maker.encoder()
    return _encoders[digest]


def _unreported(tokens: int) -> None:
    """Who asks counts whole shards."""
