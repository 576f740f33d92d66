"""Which data, budget, temperature and noise belong to a step: functions of seed, stage, step and micro-step (C6)."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

import torch

from elastic_core.recipe import Optimizer, Stage

# How much of the mean KL stays from step to step: it follows the last ten steps.
KL_MEMORY = 0.9

# Of a step's rows, at least so many are of each budget: one that is hardly trained is hardly measured either.
LEAST_SHARE = 0.05

# Draws of a round in which the sources of the data have their shares.
ROUND = 1000

_GOLDEN = Fraction(6180339887, 10**10)


def generator(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by `key`, the same in every process and on every run."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Need:
    """Shares of the budgets by what each still has to learn, from the measured KL of the steps before.

    The first steps have the stage's own shares, until every budget was measured. Then the full size, which starts at
    KL 0 and has only to be kept there, gets `full_share`, and the others share the rest in proportion to an exponential
    mean of their KL to the teacher, but none has less than LEAST_SHARE: what trains the others moves it, and its KL is
    measured where it has rows. A function of the metrics of earlier steps alone, so that a stage that was killed
    goes on with the same shares (C6).
    """

    def __init__(self, stage: Stage, full: Collection[str]) -> None:
        self._stage, self._full = stage, frozenset(full)
        self._kl: dict[str, float] = {}

    def add(self, kl: Mapping[str, float]) -> None:
        """Take in the KL of each budget that a step has measured, nats a token; 0 where it met nothing to learn."""
        for name, value in ((name, value) for name, value in kl.items() if value > 0):
            self._kl[name] = KL_MEMORY * self._kl.get(name, value) + (1 - KL_MEMORY) * value

    def shares(self) -> dict[str, float]:
        """Each budget's share of the next step, in sum 1."""
        given = self._stage.budgets
        cut = {name: self._kl.get(name, 0.0) for name, share in given.items() if share and name not in self._full}
        if self._stage.shares == "fixed" or not cut or min(cut.values()) <= 0:
            total = sum(given.values())
            return {name: share / total for name, share in given.items()}
        full = [name for name, share in given.items() if share and name in self._full]
        kept = self._stage.full_share if full else 0.0
        shares = _proportional(cut, 1 - kept)
        shares |= dict.fromkeys(full, kept / max(1, len(full)))
        return {name: shares.get(name, 0.0) for name in given}


def _proportional(needs: Mapping[str, float], total: float) -> dict[str, float]:
    """`total` in proportion to the needs, but LEAST_SHARE at least for each, or half of an equal share."""
    least, low = min(LEAST_SHARE, total / (2 * len(needs))), set[str]()
    while True:
        others = {name: need for name, need in needs.items() if name not in low}
        rest, sum_of_needs = total - least * len(low), sum(others.values())
        shares = dict.fromkeys(needs, least) | {name: rest * need / sum_of_needs for name, need in others.items()}
        below = {name for name in others if shares[name] < least}
        if not below:
            return shares
        low |= below


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStep:
    """Rows of the global batch that run at one budget at once: process r has row `first + r` for each of `firsts`."""

    budget: str
    firsts: tuple[int, ...]


def micro_steps(stage: Stage, shares: Mapping[str, float], seed: int, step: int, processes: int = 1) -> list[MicroStep]:
    """The micro-steps of a step, the same in every process, which runs at most `micro_batch_size` rows in each."""
    together = stage.rows_together(processes)
    budgets = place_budgets(stage, shares, seed, step, stage.batch_size // together)
    found = []
    for name in dict.fromkeys(budgets):
        places = [place * together for place, budget in enumerate(budgets) if budget == name]
        firsts = [first for place in places for first in range(place, place + together, processes)]
        for start in range(0, len(firsts), stage.micro_batch_size):
            found.append(MicroStep(budget=name, firsts=tuple(firsts[start : start + stage.micro_batch_size])))
    return found


def place_budgets(stage: Stage, shares: Mapping[str, float], seed: int, step: int, places: int) -> list[str]:
    """The budget of each of a global batch's places, whose rows share a budget.

    Budgets are laid out on [0, 1) by their `shares` and read at `places` evenly spaced points. So their counts are
    exact where the shares divide the batch, and within one of it elsewhere. The points shift from step to step by the
    golden ratio, so that the shares hold over the run.
    """
    parts = {name: Fraction(share).limit_denominator(10**6) for name, share in shares.items()}
    total = sum(parts.values())
    offset = (_GOLDEN * (step + 1)) % 1
    ends, end = [], Fraction(0)
    for name, part in parts.items():
        end += part / total
        ends.append((end, name))
    picked = [next(name for end, name in ends if (i + offset) / places < end) for i in range(places)]
    order = torch.randperm(places, generator=generator(seed, stage.name, step, "budgets"))
    return [picked[i] for i in order]


def noise_generator(seed: int, stage: Stage, step: int, micro_step: int) -> torch.Generator:
    """The source of the Gumbel noise of one micro-step."""
    return generator(seed, stage.name, step, micro_step, "gumbel")


class DataOrder:
    """The rows of each global batch: every epoch is a new permutation of all rows, seeded by (seed, stage, epoch).

    Where the rows are of several sources, `drawn` has the number of rows of each and its weight: rows are drawn from
    each in proportion, evenly over the batches, and each source has epochs of its own. ValueError for a source to be
    drawn from without rows.
    """

    def __init__(self, num_rows: int, stage: Stage, seed: int, drawn: Sequence[tuple[int, float]] = ()) -> None:
        drawn = drawn if len(drawn) > 1 else [(num_rows, 1.0)]
        if any(rows < 1 for rows, weight in drawn if weight > 0):
            raise ValueError(
                f"stage {stage.name}: the data holds no sequence of {stage.sequence_length} tokens; "
                "add data or shorten sequence_length"
            )
        self.num_rows, self.stage, self.seed = num_rows, stage, seed
        self._rows = [rows for rows, _ in drawn]
        self._firsts = [0, *accumulate(self._rows)]
        self._turns = turns([weight for _, weight in drawn])
        self._permutations: dict[int, tuple[int, torch.Tensor]] = {}

    def rows(self, step: int) -> list[int]:
        """The `batch_size` rows of a step, in the order of the global batch."""
        first = step * self.stage.batch_size
        return [self._row(index) for index in range(first, first + self.stage.batch_size)]

    def _row(self, index: int) -> int:
        round_, place = divmod(index, len(self._turns))
        turn = self._turns[place]
        epoch, position = divmod(round_ * turn.of + turn.number, self._rows[turn.source])
        if self._permutations.get(turn.source, (-1,))[0] != epoch:
            key = ("order",) if len(self._rows) == 1 else ("order", turn.source)
            permutation = torch.randperm(
                self._rows[turn.source], generator=generator(self.seed, self.stage.name, epoch, *key)
            )
            self._permutations[turn.source] = epoch, permutation
        return self._firsts[turn.source] + int(self._permutations[turn.source][1][position])


class Turn(NamedTuple):
    """One draw of a round: from a source, for which it is the draw `number`, from 0, `of` so many."""

    source: int
    number: int
    of: int


def turns(weights: Sequence[float]) -> list[Turn]:
    """One round of draws from sources: each as often as its weight says, to one in ROUND, and spread evenly.

    A source with any weight at all is drawn from at least once a round.
    """
    if sum(weight > 0 for weight in weights) == 1:
        return [Turn(next(source for source, weight in enumerate(weights) if weight > 0), 0, 1)]
    counts = [max(weight > 0, round(ROUND * weight / sum(weights))) for weight in weights]
    draws = [Turn(source, number, count) for source, count in enumerate(counts) for number in range(count)]
    return sorted(draws, key=lambda turn: ((2 * turn.number + 1) / turn.of, turn.source))


def sample_rows(drawn: Sequence[tuple[int, float]], count: int, draw: torch.Generator) -> list[int]:
    """Up to `count` different rows at random, of each source as many as its weight says."""
    if len(drawn) == 1:
        return torch.randperm(drawn[0][0], generator=draw)[:count].tolist()
    order = turns([weight for _, weight in drawn])
    rounds, rest = divmod(count, len(order))
    chosen, first = [], 0
    for source, (rows, _) in enumerate(drawn):
        wanted = sum(turn.source == source for turn in order) * rounds + sum(t.source == source for t in order[:rest])
        chosen += [first + row for row in torch.randperm(rows, generator=draw)[:wanted].tolist()]
        first += rows
    return [chosen[place] for place in torch.randperm(len(chosen), generator=draw).tolist()]


def temperature(stage: Stage, step: int) -> float:
    """tau, falling exponentially from its first value to its last over the stage."""
    first, last = stage.router.temperature
    return float(first * (last / first) ** _progress(stage, step))


def scale(stage: Stage, step: int) -> float:
    """The multiplier of the router's logits, rising linearly over the stage."""
    first, last = stage.router.scale
    return first + (last - first) * _progress(stage, step)


def learning_rate(optimizer: Optimizer, peak: float, step: int, steps: int) -> float:
    """A linear warm-up to `peak`, then constant, or a half cosine down to `final_fraction` of it at the last step."""
    if step < optimizer.warmup_steps:
        return peak * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return peak
    done = (step - optimizer.warmup_steps) / max(1, steps - 1 - optimizer.warmup_steps)
    low = optimizer.final_fraction
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _progress(stage: Stage, step: int) -> float:
    return step / max(1, stage.steps - 1)
