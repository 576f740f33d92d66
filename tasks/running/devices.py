"""A step's work on every GPU of this machine: a process a device, each with its share.

Processes, not threads: the kernels' autotuners keep their state in the process. What goes from one to another is
pickled to bytes by ourselves, for torch would keep a file open, and shared memory, for every tensor.
"""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import torch

from elastic_core.parent import die_with_parent
from tasks.settings import ServiceError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")


def devices() -> int:
    """How many processes share a step's work: one a CUDA device of this machine, and one on a CPU."""
    return max(1, torch.cuda.device_count())


def visible() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",")] if named else [str(i) for i in range(torch.cuda.device_count())]


def dealt(items: Sequence[T], count: int) -> list[list[T]]:
    """The items dealt out to `count` shares in turn; no share is empty."""
    return [list(items[first::count]) for first in range(min(count, len(items)))]


def gathered(shares: Sequence[Sequence[T]]) -> list[T]:
    """Dealt items, or what was made of each, in their first order."""
    return [shares[at % len(shares)][at // len(shares)] for at in range(sum(map(len, shares)))]


class Shares(Generic[S]):
    """What was made of each share, each on a device of its own."""

    def __init__(self, ask: Callable[[Callable[..., Any], Any, Any], list[Any]]) -> None:
        self._ask = ask

    def ask(self, function: Callable[Concatenate[S, P], R], *args: P.args, **named: P.kwargs) -> list[R]:
        """`function` of what was made of each share, on all devices at once; the answers in order.

        Raises what the function raises; a transient ServiceError where a process is gone.
        """
        return self._ask(function, args, named)


@contextmanager
def shared(make: Callable[[T], S], shares: Sequence[T]) -> Iterator[Shares[S]]:
    """`make` of each share, where the functions that are asked find it: the first device's with the first share.

    A single share is made in this process. Several are made in processes of their own, which end with the block and
    with this process; `make` and what is asked must then be functions of a module.
    """
    if len(shares) == 1:
        made = make(shares[0])
        yield Shares(lambda function, args, named: [function(made, *args, **named)])
        return
    threads = max(1, torch.get_num_threads() // len(shares))
    with ExitStack() as stack:
        pools = [
            stack.enter_context(
                ProcessPoolExecutor(
                    1,
                    mp_context=multiprocessing.get_context("spawn"),
                    initializer=_begin,
                    initargs=(number, threads, os.getpid()),
                )
            )
            for number in range(len(shares))
        ]
        _answers(pool.submit(_make, pickle.dumps((make, share))) for pool, share in zip(pools, shares, strict=True))

        def ask(function: Callable[..., Any], args: Any, named: Any) -> list[Any]:
            asked = pickle.dumps((function, args, named))
            return _answers(pool.submit(_ask, asked) for pool in pools)

        yield Shares(ask)


def on_devices(function: Callable[[T], R], shares: Sequence[T]) -> list[R]:
    """`function` of each share, each on a device of its own; see `shared`."""
    with shared(function, shares) as everywhere:
        return everywhere.ask(_itself)


def _itself(made: R) -> R:
    return made


def _answers(asked: Iterable["Future[bytes]"]) -> list[Any]:
    try:
        answers = [future.result() for future in list(asked)]
    except BrokenProcessPool as error:
        raise ServiceError("a process that shared the step's work ended too early", transient=True) from error
    return [pickle.loads(answer) for answer in answers]


# In a process that shares the work: what was made of its share.
_made: list[Any] = []


def _begin(number: int, threads: int, parent: int) -> None:
    die_with_parent(parent)
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number)


def _make(sent: bytes) -> bytes:
    make, share = pickle.loads(sent)
    _made.append(make(share))
    return pickle.dumps(None)


def _ask(asked: bytes) -> bytes:
    function, args, named = pickle.loads(asked)
    return pickle.dumps(function(_made[0], *args, **named))
