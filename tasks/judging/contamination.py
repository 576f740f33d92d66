"""Problems that stand in the training corpus: those of which a run of N tokens is there, token by token.

Runs of tokens, not of words, because a corpus is kept as tokens: 110 billion of them are read at the speed of the disk,
and to spell them out as words first would take twenty times as long. N is about the 13 words that are usual. A problem
that was written otherwise there, in other case or other white space, is not found.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from elastic_core.files.token_stream import TokenStream
from tasks.judging.samples import unseen
from tasks.running.bars import Report

N = 20
# Of N tokens so many are different: a rule, or a number of zeros, is no sign of a problem.
DIFFERENT = N // 2
READ_AT_ONCE = 1 << 22
BITS = 26  # of a hash, by which nearly all of the corpus is passed over; a table of 64 MiB
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; of the golden ratio

Run = tuple[int, ...]
K = TypeVar("K", bound=Hashable)


def runs_of(tokens: Sequence[int]) -> set[Run]:
    """The runs of N tokens in a problem that would tell it; of a shorter problem there are none."""
    found = (tuple(tokens[i : i + N]) for i in range(len(tokens) - N + 1))
    return {run for run in found if len(set(run)) >= DIFFERENT}


def found_in_stream(
    problems: Mapping[K, Sequence[int]], stream: TokenStream, threads: int, report: Report = unseen
) -> set[K]:
    """Which problems, tokens by name, have a run of tokens in the stream."""
    owners: dict[Run, list[K]] = {}
    for name, tokens in problems.items():
        for run in runs_of(tokens):
            owners.setdefault(run, []).append(name)
    if not owners:
        return set()
    hashes = np.unique(hashed(np.array(list(owners), dtype=np.int32).reshape(-1))[::N])
    table = np.zeros(1 << BITS, dtype=np.bool_)
    table[_place(hashes)] = True

    def search(first: int) -> set[Run]:
        tokens = stream.tokens(first, min(first + READ_AT_ONCE + N - 1, len(stream)))
        return set(_matches(tokens, hashes, table, owners))

    found = set[Run]()
    starts = range(0, len(stream) - N + 1, READ_AT_ONCE)
    with ThreadPoolExecutor(threads, thread_name_prefix="contamination") as pool:
        for done, runs in enumerate(pool.map(search, starts), 1):
            found |= runs
            report(done, len(starts))
    return set(chain.from_iterable(owners[run] for run in found))


def hashed(tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
    """A hash of the N tokens from each place on: the sum of token x FACTOR^i, modulo 2^64."""
    wide = tokens.astype(np.uint64)
    count = max(0, len(tokens) - N + 1)
    total = np.zeros(count, dtype=np.uint64)
    for place in range(N):
        total *= FACTOR
        total += wide[place : place + count]
    return total


def _place(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return ((hashes * FACTOR) >> np.uint64(64 - BITS)).astype(np.int64)


def _matches(
    tokens: NDArray[np.int32],
    hashes: NDArray[np.uint64],
    table: NDArray[np.bool_],
    owners: Collection[Run],
) -> Iterator[Run]:
    """The runs that are in these tokens; equal hashes are compared token by token."""
    every = hashed(tokens)
    likely = np.flatnonzero(table[_place(every)])
    places = np.searchsorted(hashes, every[likely]).clip(max=len(hashes) - 1)
    for at in likely[hashes[places] == every[likely]].tolist():
        run = tuple(tokens[at : at + N].tolist())
        if run in owners:
            yield run
