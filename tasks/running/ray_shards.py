"""The shards of a corpus made by the hosts of a Ray cluster: each is a task of Ray's, on a core of whichever has one.

A host reads the Hub and S3 by itself, no more of them than its shard; of this host's files it knows nothing. What it
makes it stores in the workspace, by digest, and from there this process brings it, into the place where its own
processes would have made it.
"""

import logging
import os
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elastic_core.files.shards import write_json
from elastic_core.recipe import DataConfig
from elastic_core.schema import to_dict
from tasks.corpus.encoding import Encoder
from tasks.corpus.hub import HUB
from tasks.corpus.pieces import Piece
from tasks.corpus.shards import SHARD_FILE, Shard, ShardRecord, Taken, write_shard
from tasks.corpus.workers import PROCESS_BYTES, ShardMaker, Workers
from tasks.records import Artifact
from tasks.running import code
from tasks.running.digests import artifact
from tasks.running.patience import patiently
from tasks.running.ray_cluster import RayCluster, connected, fault_of_host, in_short, living_nodes, options, reason_of
from tasks.running.workspace import at_hand, shared_workspace
from tasks.settings import WORKSPACE, ServiceError, home_directory

TRIES = 5  # of hosts that are lost
S3 = "s3://"

logger = logging.getLogger(__name__)


def are_everywhere(config: DataConfig) -> bool:
    """Whether every host can read all sources: none is a file of this one."""
    return all(source.path.startswith((HUB, S3)) for source in config.sources)


def places_of(cluster: RayCluster) -> int:
    """How many shards all hosts of the cluster make at a time: one a core, where there is memory for so many."""
    found = (node["Resources"] for node in living_nodes(connected(cluster.address)))
    return sum(int(min(has.get("CPU", 0.0), has.get("memory", 0.0) // PROCESS_BYTES)) for has in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A shard that a host has made and stored: its record, and the SHA-256 of its files by their names."""

    record: ShardRecord
    files: Mapping[str, str]
    host: str


@contextmanager
def on_hosts(cluster: RayCluster, tokenizer: Artifact, maker: ShardMaker, count: int) -> Iterator[Workers]:
    """Hosts of the cluster that make shards, up to so many at a time, until the block ends."""
    hosts = _Hosts(cluster, tokenizer, maker, count)
    try:
        yield hosts
    finally:
        hosts.stop()


class _Hosts:
    """Who waits for a shard is a thread of this process."""

    def __init__(self, cluster: RayCluster, tokenizer: Artifact, maker: ShardMaker, count: int) -> None:
        self.count = count
        self._cluster, self._tokenizer, self._maker = cluster, tokenizer, maker
        self._ray = connected(cluster.address)
        self._function = self._ray.remote(_make_there).options(
            name="shard", max_retries=TRIES, memory=PROCESS_BYTES, **options(CPU=1.0)
        )
        self._threads = ThreadPoolExecutor(count, "shard")
        self._lock, self._asked, self._tokens = threading.Lock(), set[Any](), 0
        self._made = Counter[str]()

    def submit(self, shard: Shard, before: Taken) -> "Future[ShardRecord]":
        return self._threads.submit(self._have_made, shard, before)

    def tokens(self) -> int:
        return self._tokens

    def stop(self) -> None:
        """End what is being made; what is whole stays."""
        with self._lock:
            asked = list(self._asked)
        for task in asked:
            self._ray.cancel(task)
        self._threads.shutdown(cancel_futures=True)
        if self._made:
            told = ", ".join(f"{count} on {host}" for host, count in sorted(self._made.items()))
            logger.info("%d shards were made: %s", self._made.total(), told)

    def _have_made(self, shard: Shard, before: Taken) -> ShardRecord:
        made = self._from_a_host(shard, before)
        place, shared = self._maker.place(shard), shared_workspace()
        assert shared is not None, "a Ray cluster has a workspace"
        shutil.rmtree(place, ignore_errors=True)
        patiently(f"bringing shard {shard.number}", partial(shared.blobs.fetch, made.files, place))
        with self._lock:
            self._tokens += made.record.tokens
            self._made[made.host] += 1
        return made.record

    def _from_a_host(self, shard: Shard, before: Taken) -> Made:
        errors, runs = self._ray.exceptions, code.runs(_make_there)
        task = self._function.remote(runs, self._maker.config, self._tokenizer, shard, before, os.environ[WORKSPACE])
        with self._lock:
            self._asked.add(task)
        try:
            made: Made = self._ray.get(task)
        except errors.RayTaskError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, ServiceError | ValueError):
                raise cause from None
            raise ServiceError(
                f"shard {shard.number} cannot be made on {self._cluster.name}: {reason_of(error)}"
            ) from None
        except errors.RayError as error:
            raise ServiceError(f"shard {shard.number} was not made: {in_short(error)}", transient=True) from None
        finally:
            with self._lock:
                self._asked.discard(task)
        return made


# On a host of the cluster


def _make_there(
    runs: Mapping[str, str], config: DataConfig, tokenizer: Artifact, shard: Shard, before: Taken, workspace: str
) -> Made:
    """The task of Ray's: make a shard and store it."""
    host = socket.gethostname()
    fault = fault_of_host({}, (), workspace)
    if changed := code.differences(runs, code.runs(_make_there)):
        fault = f"what it runs is not as in the run that asks: {changed}; install the same in both"
    if fault:
        raise ServiceError(f"{host} cannot make a shard: {fault}")
    os.environ.update({"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})  # other shards have other cores
    shared, place = shared_workspace(), home_directory() / "workspace"
    assert shared is not None, "fault_of_host has looked"
    place.mkdir(parents=True, exist_ok=True)
    with at_hand({"tokenizer": tokenizer}) as here, TemporaryDirectory(dir=place, prefix=".shard-") as work:
        maker = ShardMaker(config=config, tokenizer=Path(here["tokenizer"].path), directory=Path(work))
        parts = tuple(replace(part, pieces=tuple(map(_from_its_origin, part.pieces))) for part in shard.parts)
        there = replace(shard, parts=parts)
        made = write_shard(_encoder(tokenizer.digest, maker), config, there, before, maker.place(shard), _unreported)
        record = replace(made, shard=shard.digest)
        write_json(maker.place(shard) / SHARD_FILE, to_dict(record))
        stored = artifact(maker.place(shard))
        patiently(f"storing shard {shard.number}", partial(shared.blobs.put, maker.place(shard), stored.files))
    return Made(record=record, files=stored.files, host=host)


_encoders: dict[str, Encoder] = {}  # of this process, by the tokenizer's digest; loading one takes a second


def _encoder(digest: str, maker: ShardMaker) -> Encoder:
    if digest not in _encoders:
        _encoders[digest] = maker.encoder()
    return _encoders[digest]


def _from_its_origin(piece: Piece) -> Piece:
    """A piece of an object as that is read in S3, and not in the copy that the asking host has."""
    return replace(piece, path=piece.name) if piece.name.startswith(S3) else piece


def _unreported(tokens: int) -> None:
    """Who asks counts whole shards."""
