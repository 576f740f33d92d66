"""Finished samples: a line of a file each, so that none is lost when a run is killed, and none is made twice."""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Literal

from elastic_core.files.locks import held
from elastic_core.judging import Sampling
from elastic_core.schema import build
from tasks.judging.problems import Problem
from tasks.running.bars import Report

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a model is asked once: everything that its completion depends on.

    `model` tells one model from another of the same name, as a digest does.
    """

    model: str
    problem: str
    prompt: str
    sampling: Sampling
    seed: int

    def digest(self) -> str:
        """SHA-256 of the request: the name of its sample."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a model wrote, of how many tokens, and whether it came to its end or to the limit."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The completion of a request, whose digest it carries; `problem` and `run` tell readers of the file which."""

    request: str
    problem: str
    run: int
    completion: Completion


# A problem, the number of the run, and what is asked.
Wanted = tuple[Problem, int, Request]


class SampleFile:
    """The samples of a JSONL file, held against other processes; get it from `open_samples`.

    In memory is only where each line stands: the thoughts of a large benchmark are gigabytes.
    """

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}  # offset and bytes of the line, by the digest of its request
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request: str) -> bool:
        return request in self._places

    def __getitem__(self, request: str) -> Sample:
        offset, size = self._places[request]
        return _parsed(os.pread(self._descriptor, size, offset))

    def add(self, sample: Sample) -> None:
        """Write a sample that is not there yet; it is on the disk when this returns, or not at all."""
        line = json.dumps(asdict(sample), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            assert sample.request not in self._places, f"the sample {sample.request} is there already"
            before = os.fstat(self._descriptor).st_size
            try:
                if os.write(self._descriptor, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, before)
                raise
            self._places[sample.request] = before, len(line)

    def _index(self) -> None:
        """Find each line. A last one that a kill cut off is no sample, and is taken off the file."""
        offset = 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    logger.warning("%s: its last line was cut off; that sample is made again", self._path)
                    os.ftruncate(self._descriptor, offset)
                    return
                try:
                    self._places[_parsed(line).request] = offset, len(line)
                except ValueError as error:
                    where = f"{self._path} line {number} is no sample ({error})"
                    raise ValueError(f"{where}; remove the line, and the sample is made again") from error
                offset += len(line)


@contextmanager
def open_samples(path: Path, waits: str | None = None) -> Iterator[SampleFile]:
    """The samples of a file, which is made where there is none. One process at a time: others are IsHeld, or wait and
    say so.

    ValueError names a line that is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.with_name(f".{path.name}.lock"), waits=waits):
        samples = SampleFile(path)
        try:
            yield samples
        finally:
            samples.close()


def requests(problems: Iterable[Problem], runs: int, model: str, sampling: Sampling) -> list[Wanted]:
    """Each problem's request in each run, run by run, so that a first run is whole before a second begins."""
    asked = list(problems)

    def request(problem: Problem, run: int) -> Request:
        seed = _seed(problem.id, run)
        return Request(model=model, problem=problem.id, prompt=problem.prompt, sampling=sampling, seed=seed)

    return [(problem, run, request(problem, run)) for run in range(runs) for problem in asked]


def missing_from(samples: SampleFile, wanted: Iterable[Wanted]) -> list[Wanted]:
    """What has not been asked yet."""
    return [each for each in wanted if each[2].digest() not in samples]


def keep(samples: SampleFile, each: Wanted, completion: Completion) -> None:
    """Write what a model answered."""
    problem, run, request = each
    samples.add(Sample(request=request.digest(), problem=problem.id, run=run, completion=completion))


def unseen(done: int, total: int, note: str = "") -> None:
    """Shows nobody how far it is."""


def _nothing() -> None: ...


def fill(
    samples: SampleFile,
    wanted: Sequence[Wanted],
    complete: Callable[[Request], Completion],
    concurrency: int,
    report: Report = unseen,
    break_off: Callable[[], None] = _nothing,
) -> int:
    """Make the samples that are missing, so many at a time, and say how many were.

    Where one fails, no further one is begun, those under way are finished and kept, and the error is raised. Where this
    process is told to end, `break_off` is called: those under way are waited for, and it may let them fail at once.
    """
    missing, begun = missing_from(samples, wanted), len(samples)

    def make(each: Wanted) -> None:
        keep(samples, each, complete(each[2]))

    with ThreadPoolExecutor(concurrency, thread_name_prefix="sample") as pool:
        ahead = iter(missing)
        running = {pool.submit(make, each) for each in islice(ahead, concurrency)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                running |= {pool.submit(make, each) for each in islice(ahead, len(done))}
                report(len(wanted) - len(missing) + len(samples) - begun, len(wanted))
        except BaseException as error:
            if not isinstance(error, Exception):
                break_off()
            raise
    return len(missing)


def _parsed(line: bytes) -> Sample:
    return build(Sample, json.loads(line.decode("utf-8", "surrogatepass")))


def _seed(problem: str, run: int) -> int:
    """A seed of 31 bits for the run of a problem, the same whatever else is asked."""
    return int.from_bytes(hashlib.sha256(f"{run}\0{problem}".encode()).digest()[:4]) >> 1
