"""Who makes the shards of a corpus: this process, or several, which take one after the other.

The order of tokens is that of the shards. Processes work ahead of what is settled: a shard that begins in the middle of
a source with limits is made as if little had been taken of it, and made again where that was wrong. So the corpus is
the same for any number of processes, and after any kill.
"""

import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any, Protocol

from elastic_core.parent import die_with_parent
from elastic_core.recipe import DataConfig, DataSource
from tasks.corpus.encoding import Encoder
from tasks.corpus.ends import end_tokens
from tasks.corpus.record import SourceRecord
from tasks.corpus.shards import NOTHING, Report, Shard, ShardRecord, Taken, read_shard, write_shard
from tasks.corpus.tokenizer import load_tokenizer
from tasks.running.limits import cores
from tasks.settings import ServiceError

# Bytes of text that give a token, until shards have told.
BYTES_PER_TOKEN = 4.0
LOOK_SECONDS = 0.5

# From above what a process takes that tokenises: its libraries, the tokenizer, and a batch of documents.
PROCESS_BYTES = 1 << 30

# Told the tokens that are made, and how many there will be by the bytes that are left; 0 where nobody knows.
Progress = Callable[[int, int], None]


class Workers(Protocol):
    """Makes shards, up to `count` at a time; `tokens` were made so far. A pool of another machine's is one, too."""

    count: int

    def submit(self, shard: Shard, before: Taken) -> "Future[ShardRecord]":
        """Make a shard into its place."""

    def tokens(self) -> int:
        """The tokens that were made, those of unfinished shards among them."""


# Has shards made, up to so many at a time, by others than this process (ray_shards.py).
Others = Callable[["ShardMaker", int], AbstractContextManager[Workers]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMaker:
    """What every shard of a corpus is made with, and where: `directory` holds a directory a shard."""

    config: DataConfig
    tokenizer: Path
    directory: Path

    def place(self, shard: Shard) -> Path:
        return self.directory / f"{shard.number:05d}"

    def encoder(self) -> Encoder:
        return Encoder(load_tokenizer(self.tokenizer), end_tokens(self.tokenizer))

    def make(self, encoder: Encoder, shard: Shard, before: Taken, report: Report) -> ShardRecord:
        """Make a shard, whatever was in its place."""
        shutil.rmtree(self.place(shard), ignore_errors=True)
        return write_shard(encoder, self.config, shard, before, self.place(shard), report)


@contextmanager
def workers(maker: ShardMaker, count: int, on_tokens: Callable[[int], None]) -> Iterator[Workers]:
    """This process where `count` is 1, else so many others, which end with this one."""
    if count == 1:
        yield _Here(maker, on_tokens)
        return
    context = multiprocessing.get_context("spawn")
    pool = _Pool(maker, count, context)
    try:
        yield pool
    finally:
        pool.stop()


class _Here:
    """This process makes one shard at a time, with as many threads as the tokenizer likes."""

    count = 1

    def __init__(self, maker: ShardMaker, on_tokens: Callable[[int], None]) -> None:
        self._maker, self._encoder, self._tokens, self._on_tokens = maker, maker.encoder(), 0, on_tokens

    def submit(self, shard: Shard, before: Taken) -> "Future[ShardRecord]":
        made: Future[ShardRecord] = Future()
        made.set_result(self._maker.make(self._encoder, shard, before, self._add))
        return made

    def tokens(self) -> int:
        return self._tokens

    def _add(self, tokens: int) -> None:
        self._tokens += tokens
        self._on_tokens(self._tokens)


class _Pool:
    """Processes of this machine, among which its cores are divided."""

    def __init__(self, maker: ShardMaker, count: int, context: SpawnContext) -> None:
        self.count = count
        self._counter, self._stopped = context.Value("q", 0), context.Event()
        threads = max(1, cores() // count)
        self._executor = ProcessPoolExecutor(
            count, context, _begin, (maker, self._counter, self._stopped, threads, os.getpid())
        )

    def submit(self, shard: Shard, before: Taken) -> "Future[ShardRecord]":
        try:
            return self._executor.submit(_make, shard, before)
        except BrokenProcessPool as error:
            raise _process_ended() from error

    def tokens(self) -> int:
        return int(self._counter.value)

    def stop(self) -> None:
        """End what is being made; what is whole stays."""
        self._stopped.set()
        self._executor.shutdown(cancel_futures=True)


def _process_ended() -> ServiceError:
    return ServiceError(
        "a process that tokenises ended, maybe for want of memory; its shards are begun again", transient=True
    )


class _Stopped(Exception):
    """Ends a shard that nobody waits for any more."""


# In a process of the pool: makes a shard.
_make_here: Callable[[Shard, Taken], ShardRecord]


def _begin(maker: ShardMaker, counter: Any, stopped: Any, threads: int, parent: int) -> None:
    """Make this process ready to make shards."""
    global _make_here
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's to handle
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    # At the first shard, whose fault it then is if the tokenizer cannot be loaded; here it would only break the pool.
    encoder = cache(maker.encoder)

    def report(tokens: int) -> None:
        if stopped.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += tokens

    def make(shard: Shard, before: Taken) -> ShardRecord:
        return maker.make(encoder(), shard, before, report)

    _make_here = make


def _make(shard: Shard, before: Taken) -> ShardRecord:
    return _make_here(shard, before)


def make_shards(
    maker: ShardMaker, shards: Sequence[Shard], processes: int, progress: Progress, others: Others | None = None
) -> list[ShardRecord]:
    """Make the shards that are not whole yet, in up to so many processes; the records of all, in order.

    The processes are those of `others`, where these are given, or else of this machine: as many as shards are wanted at
    once, and the cores are divided among them. A record without files is that of a shard of which nothing is wanted.
    """
    state = _State(maker, shards)
    there = sum(record.tokens for record in state.made.values())

    def report(tokens: int) -> None:
        expected = state.expected()
        progress(min(there + tokens, expected or there + tokens), expected)

    if state.settle():
        return state.settled
    count = sum(1 for _ in state.wanted(processes))
    with workers(maker, count, report) if others is None else others(maker, count) as found:
        while not state.settle():
            for shard, before in state.wanted(found.count):
                state.running[found.submit(shard, before)] = shard.number, before
            done, _ = wait(state.running, LOOK_SECONDS, FIRST_COMPLETED)
            for future in done:
                state.take(future)
            report(found.tokens())
    return state.settled


@dataclass
class _State:
    """How far a corpus is. Settled are the first shards whose records are what they will be."""

    maker: ShardMaker
    shards: Sequence[Shard]
    settled: list[ShardRecord] = field(default_factory=list)
    taken: dict[int, Taken] = field(default_factory=dict)
    made: dict[int, ShardRecord] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    running: dict["Future[ShardRecord]", tuple[int, Taken]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = {shard.number: read_shard(self.maker.place(shard), shard) for shard in self.shards}
        self.made = {number: record for number, record in found.items() if record is not None}

    def settle(self) -> bool:
        """Settle what can be; whether that is all."""
        while len(self.settled) < len(self.shards):
            shard = self.shards[len(self.settled)]
            source, before = self._begins(shard)
            record = self.made.get(shard.number)
            if before.rest(source) is None and len(shard.parts) == 1:
                record = ShardRecord(shard=shard.digest, before=before, parts=(SourceRecord(),))
            elif record is None:
                return False
            elif not record.stands(before, source):
                del self.made[shard.number]
                return False
            self.settled.append(record)
            for part, of_part in zip(shard.parts, record.parts, strict=True):
                self.taken[part.source] = self.taken.get(part.source, NOTHING).and_then(of_part)
        return True

    def wanted(self, most: int) -> Iterator[tuple[Shard, Taken]]:
        """The shards to begin with now, where `most` may run at once, each with what is known to be taken before it.

        None is made ahead where those before it are expected to reach the limit of its source; one whose size nobody
        knows is expected to.
        """
        under_way = {number for number, _ in self.running.values()}
        expected: dict[int, float] = {}
        bytes_per_token = self._bytes_per_token()
        for shard in self.shards:
            source, before = self._begins(shard)
            is_needed = (
                source.max_tokens is None
                or len(shard.parts) > 1
                or expected.get(shard.parts[0].source, 0) < source.max_tokens
            )
            if len(under_way) >= most:
                return
            is_open = shard.number >= len(self.settled) and shard.number not in self.made.keys() | under_way
            is_next = shard.number == len(self.settled)
            if is_open and (is_next or (is_needed and shard.number not in self.failed)):
                under_way.add(shard.number)
                yield shard, before
            for part, tokens in zip(shard.parts, self._expected_of(shard, bytes_per_token), strict=True):
                expected[part.source] = expected.get(part.source, 0) + tokens

    def take(self, future: "Future[ShardRecord]") -> None:
        """Take in a shard that has ended. One that was made ahead and failed is made again when it is next."""
        number, before = self.running.pop(future)
        try:
            self.made[number] = future.result()
        except BrokenProcessPool as error:
            raise _process_ended() from error
        except Exception:
            if number == len(self.settled) and before == self._begins(self.shards[number])[1]:
                raise
            self.failed.add(number)

    def expected(self) -> int:
        """The tokens that there will be, by the bytes to read and by the limits; 0 where nobody knows."""
        total: dict[int, float] = {}
        bytes_per_token = self._bytes_per_token()
        for shard in self.shards:
            for part, tokens in zip(shard.parts, self._expected_of(shard, bytes_per_token), strict=True):
                total[part.source] = total.get(part.source, 0) + tokens
        sources = self.maker.config.sources
        count = sum(min(tokens, sources[source].max_tokens or math.inf) for source, tokens in total.items())
        return 0 if math.isinf(count) else round(count)

    def _begins(self, shard: Shard) -> tuple[DataSource, Taken]:
        """The source that a shard begins with, and what the settled shards took of it."""
        first = shard.parts[0].source
        return self.maker.config.sources[first], self.taken.get(first, NOTHING)

    def _expected_of(self, shard: Shard, bytes_per_token: float) -> list[float]:
        """The tokens of each part of a shard: those it was found to have, or as many as its bytes give."""
        ahead = shard.number >= len(self.settled)
        record = self.made.get(shard.number) if ahead else self.settled[shard.number]
        if record is not None:
            return [part.tokens for part in record.parts]
        return [math.inf if part.size is None else part.size / bytes_per_token for part in shard.parts]

    def _bytes_per_token(self) -> float:
        """As it was in the shards that are made, of the sources without limits."""
        found = [
            (part.size, of_part.tokens)
            for number, record in self.made.items()
            for part, of_part in zip(self.shards[number].parts, record.parts, strict=True)
            if part.size is not None and self._is_unlimited(part.source)
        ]
        tokens = sum(tokens for _, tokens in found)
        return sum(size for size, _ in found) / tokens if tokens else BYTES_PER_TOKEN

    def _is_unlimited(self, source: int) -> bool:
        limits = self.maker.config.sources[source]
        return limits.max_documents is None and limits.max_tokens is None
