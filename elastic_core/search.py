"""Shapes worth training: the nested subnets whose cut loses least, measured before any training (C4).

At equal parameters the shape decides more than all of the training, and the loss of a trained submodel follows the loss
of its cut. The search measures cuts of the reordered teacher. It starts from the proposals of one or several scores
(losses of single cuts, a router's log-probabilities), of which the integer program of resolve.py gives the best for
each hidden size, Mamba head dim and depth, and goes down from the best of them through neighbours. Budgets are searched
together, for a large subnet limits what can be nested in it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

from elastic_core.budget import Budget
from elastic_core.geometry import Axes
from elastic_core.model import ElasticNemotronH
from elastic_core.resolve import AxisScores, Limits, proposals
from elastic_core.router import ElasticModel
from elastic_core.subnet import Subnet, full_subnet, is_nested, smallest_subnet
from elastic_core.training.losses import distillation_loss
from elastic_core.training.tokens import TokenBatch

# How many subnets of a budget the search of the next smaller one begins in.
KEPT = 4
# Where the search goes down from, and how many neighbours of a subnet it measures at the most.
STARTS, NEIGHBOURS = 3, 48
MEASUREMENTS = 600

# How far the best other choice lies below the chosen one at least in a router's logits, and how far one that was never
# measured lies below all others.
EVEN, MARGIN = 0.01, 1.0

Loss = Callable[[Subnet], float]


class CutLoss:
    """KL(teacher || the teacher cut at a subnet) in nats a token, on the `tokens` of calibration batches that count.

    The teacher is in order of importance. Its last hidden states are kept, so that a measurement is one forward pass at
    the subnet.
    """

    @torch.inference_mode()
    def __init__(self, teacher: ElasticNemotronH, batches: Sequence[TokenBatch]) -> None:
        self._teacher = teacher
        device = teacher.embeddings.weight.device
        self._batches = [batch.to(device) for batch in batches]
        self._hidden = [self._at(batch, full_subnet(teacher.config)) for batch in self._batches]
        self.tokens = sum(batch.learned for batch in batches)
        if not self.tokens:
            raise ValueError("shapes.samples: no token of the sequences is learned, so that no cut can be measured")
        self.measured = 0

    @torch.inference_mode()
    def __call__(self, subnet: Subnet) -> float:
        self.measured += 1
        total = 0.0
        for batch, hidden_TD in zip(self._batches, self._hidden, strict=True):
            parts = distillation_loss(
                self._at(batch, subnet),
                self._teacher.head_weight(subnet.hidden),
                hidden_TD,
                self._teacher.lm_head.weight,
                batch.targets_BT.flatten(),
                kl_weight=1.0,
                ce_weight=0.0,
                learned=batch.learned,
            )
            total += float(parts.kl) * parts.tokens
        return total / self.tokens

    def _at(self, batch: TokenBatch, subnet: Subnet) -> Tensor:
        hidden_BTD: Tensor = self._teacher(batch.inputs_BT, subnet, packing=batch.packing)
        return hidden_BTD.flatten(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A subnet, what it costs in its budget's unit, and the loss of its cut in nats a token."""

    subnet: Subnet
    cost: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The chosen subnet of each budget, and every subnet that was measured for it, the best first."""

    chosen: tuple[Candidate, ...]
    measured: tuple[tuple[Candidate, ...], ...]


@dataclass(slots=True)
class Space:
    """Subnets as points: for every row of every axis the position of its choice, 0 the largest."""

    elastic: ElasticModel
    rows: list[tuple[str, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = [(axis, row) for axis in self.elastic.axes.names for row in range(self.elastic.rows(axis))]

    def choices(self, axis: str) -> tuple[int, ...]:
        return self.elastic.axes.choices(axis)

    def point(self, subnet: Subnet) -> tuple[int, ...]:
        """Where a subnet of these axes lies."""
        positions = []
        for axis, row in self.rows:
            value = getattr(subnet, axis)
            if axis in Axes.WIDTHS:
                layers = self.elastic.config.layers_on(axis)
                members = self.elastic.layers_of(axis, row)
                value = value[layers.index(members[0])] if members else self.choices(axis)[0]
            positions.append(self.choices(axis).index(value))
        return tuple(positions)

    def subnet(self, point: Sequence[int]) -> Subnet:
        values: dict[str, list[int]] = {axis: [] for axis in self.elastic.axes.names}
        for (axis, _), position in zip(self.rows, point, strict=True):
            values[axis].append(self.choices(axis)[position])
        return self.elastic.subnet(values)

    def single_cuts(self) -> Iterator[tuple[str, int, int, Subnet]]:
        """Every choice alone: its axis, row and position, and the full model with that row cut to it."""
        full = [0] * len(self.rows)
        for index, (axis, row) in enumerate(self.rows):
            for position in range(1, len(self.choices(axis))):
                yield axis, row, position, self.subnet([*full[:index], position, *full[index + 1 :]])

    def neighbours(self, subnet: Subnet, fits: Callable[[Subnet], bool]) -> list[Subnet]:
        """What fits and is one step larger on a row; or one step smaller on a row and larger on one or two others."""
        point = self.point(subnet)
        found: dict[tuple[int, ...], Subnet] = {}

        def offer(candidate: Sequence[int]) -> bool:
            key = tuple(candidate)
            if key not in found and fits(made := self.subnet(key)):
                found[key] = made
            return key in found

        for row in range(len(point)):
            self._grown(point, row, offer)
            if point[row] + 1 < len(self.choices(self.rows[row][0])):
                smaller = (*point[:row], point[row] + 1, *point[row + 1 :])
                others = [other for other in range(len(point)) if other != row]
                for first, second in permutations(others, 2) if len(others) <= 8 else ((o, o) for o in others):
                    filled = self._grown(smaller, first, offer)
                    self._grown(filled, second, offer)
        found.pop(point, None)
        return list(found.values())

    def _grown(self, point: Sequence[int], row: int, offer: Callable[[Sequence[int]], bool]) -> tuple[int, ...]:
        """The point with one row as large as fits."""
        for position in range(point[row]):
            larger = (*point[:row], position, *point[row + 1 :])
            if offer(larger):
                return larger
        return tuple(point)


def prior(elastic: ElasticModel, loss: Loss) -> AxisScores:
    """Scores (rows, choices) of every axis: minus the loss of the full model with that row alone cut to that choice.

    Their sum over a subnet's choices ranks subnets as if cuts did not interact.
    """
    space = Space(elastic)
    scores: dict[str, Tensor] = {
        axis: torch.zeros(elastic.rows(axis), len(elastic.axes.choices(axis)), dtype=torch.float64)
        for axis in elastic.axes.names
    }
    for axis, row, position, cut in space.single_cuts():
        scores[axis][row, position] = -loss(cut)
    return scores


def search(
    elastic: ElasticModel,
    budgets: Sequence[Budget],
    loss: Loss,
    scores: Sequence[Sequence[AxisScores]],
    *,
    measurements: int = MEASUREMENTS,
) -> Found:
    """The nested subnets, one a budget, of least geometric mean loss that the search finds.

    Budgets come from the largest. `scores` has, for every budget, the scores whose favourites are measured first; the
    first of them also orders proposals and neighbours. At most `measurements` subnets are measured, though always one a
    budget of a chain; neighbours get half of them. Raises ValueError for a budget below the smallest subnet, and where
    none is nested in those of the larger budgets.
    """
    hunt = _Hunt(elastic, budgets, loss, scores, measurements)
    down = hunt.chains(range(len(budgets)))
    if not down:
        raise hunt.impossible()
    up = hunt.chains(range(len(budgets) - 1, -1, -1))
    best = min(down + up, key=lambda chain: _objective(chain.values()))
    measured = [sorted(seen.values(), key=lambda candidate: candidate.loss) for seen in hunt.seen]
    return Found(chosen=tuple(best[i] for i in range(len(budgets))), measured=tuple(map(tuple, measured)))


_Chain = dict[int, Candidate]  # one candidate a budget, by the budget's number


def _objective(candidates: Iterable[Candidate]) -> float:
    """The sum of log losses: what halves one budget's loss is worth what halves another's."""
    return sum(math.log(max(candidate.loss, 1e-12)) for candidate in candidates)


class _Hunt:
    """One search: what was measured, and how the budgets of a chain limit one another."""

    def __init__(
        self,
        elastic: ElasticModel,
        budgets: Sequence[Budget],
        loss: Loss,
        scores: Sequence[Sequence[AxisScores]],
        measurements: int,
    ) -> None:
        self.elastic, self.budgets, self.scores, self.space = elastic, budgets, scores, Space(elastic)
        self.full = full_subnet(elastic.config)
        self.smallest = smallest_subnet(elastic.config, elastic.axes, elastic.layer_ranking)
        self.costs = [elastic.cost_of(budget) for budget in budgets]
        self.seen: list[dict[Subnet, Candidate]] = [{} for _ in budgets]
        self._loss, self._losses, self._measured, self._most = loss, {self.full: 0.0}, 0, measurements

    def chains(self, order: Iterable[int]) -> list[_Chain]:
        """Chains of all budgets, made one budget after the other in `order`, of which the best few go on.

        None where a budget has no subnet that is nested with those chosen before it.
        """
        chains: list[_Chain] = [{}]
        for index in order:
            longer = [{**chain, index: candidate} for chain in chains for candidate in self._best_within(index, chain)]
            chains = sorted(longer, key=lambda chain: _objective(chain.values()))[:KEPT]
        return chains

    def _best_within(self, index: int, chain: _Chain) -> list[Candidate]:
        """The best few subnets of a budget inside the larger and around the smaller ones of a chain."""
        counted, target = self.costs[index], self.budgets[index].target
        outer, inner = chain.get(index - 1), chain.get(index + 1)
        around, inside = inner.subnet if inner else self.smallest, outer.subnet if outer else self.full
        most = counted.of(self.full) if target is None else target
        if inside == self.full and most >= counted.of(self.full):
            return [self._measure(index, self.full, math.inf)]
        limits = Limits(around, inside, 0, most)

        def fits(subnet: Subnet) -> bool:
            return counted.of(subnet) <= most and is_nested(around, subnet) and is_nested(subnet, inside)

        offered = {
            subnet: None for scores in self.scores[index] for subnet in proposals(self.elastic, counted, scores, limits)
        }
        for rank, subnet in enumerate(self._by_score(index, offered)):
            self._measure(index, subnet, self._most if rank else math.inf)
        starts = [self.seen[index][subnet] for subnet in offered if subnet in self.seen[index]]
        for start in sorted(starts, key=lambda candidate: candidate.loss)[:STARTS]:
            self._descend(index, start, fits)
        mine = [candidate for candidate in self.seen[index].values() if fits(candidate.subnet)]
        return sorted(mine, key=lambda candidate: candidate.loss)[:KEPT]

    def impossible(self) -> ValueError:
        """Why the budgets have no nested subnets."""
        for budget, counted in zip(self.budgets, self.costs, strict=True):
            least = counted.of(self.smallest)
            if budget.target is not None and budget.target < least:
                return ValueError(
                    f"budget {budget.name}: {counted.text(budget.target)} is below the smallest subnet of these axes, "
                    f"{counted.text(least)}; raise the budget or add smaller choices to the axes"
                )
        names = ", ".join(budget.name for budget in self.budgets)
        return ValueError(f"budgets {names}: found no subnets within them that are nested; change one, or the axes")

    def _descend(self, index: int, here: Candidate, fits: Callable[[Subnet], bool]) -> None:
        """Go from neighbour to better neighbour, until none of those that are measured is better."""
        better: Candidate | None = here
        while better is not None:
            here = better
            around = self._by_score(index, self.space.neighbours(here.subnet, fits))[:NEIGHBOURS]
            measured = (self._measure(index, subnet, self._most // 2) for subnet in around)
            better = next((candidate for candidate in measured if candidate.loss < here.loss), None)

    def _by_score(self, index: int, subnets: Iterable[Subnet]) -> list[Subnet]:
        """The best first."""

        def score(subnet: Subnet) -> float:
            scores, point = self.scores[index][0], self.space.point(subnet)
            return sum(float(scores[axis][row, p]) for (axis, row), p in zip(self.space.rows, point, strict=True))

        return sorted(subnets, key=score, reverse=True)

    def _measure(self, index: int, subnet: Subnet, most: float) -> Candidate:
        """Its loss, which is infinite where it was never measured and `most` others were."""
        if subnet not in self._losses:
            if self._measured >= most:
                return Candidate(subnet=subnet, cost=self.costs[index].of(subnet), loss=math.inf)
            self._losses[subnet], self._measured = self._loss(subnet), self._measured + 1
        candidate = Candidate(subnet=subnet, cost=self.costs[index].of(subnet), loss=self._losses[subnet])
        return self.seen[index].setdefault(subnet, candidate)


def loss_table(elastic: ElasticModel, chosen: Candidate, measured: Iterable[Candidate]) -> AxisScores:
    """Scores (rows, choices) that make `chosen` the favourite of every row, and rank the rest by what they lose.

    A choice scores minus the log of its best measured subnet's loss over the chosen one's, and less than every measured
    choice where no measured subnet has it.
    """
    space = Space(elastic)
    here = space.point(chosen.subnet)
    scores = {
        axis: torch.full((elastic.rows(axis), len(elastic.axes.choices(axis))), -math.inf)
        for axis in elastic.axes.names
    }
    for candidate in measured:
        worse = math.log(max(candidate.loss, 1e-12) / max(chosen.loss, 1e-12))
        for (axis, row), position in zip(space.rows, space.point(candidate.subnet), strict=True):
            scores[axis][row, position] = max(float(scores[axis][row, position]), -max(worse, EVEN))
    for (axis, row), position in zip(space.rows, here, strict=True):
        scores[axis][row, position] = 0.0
    lowest = min(float(s[s.isfinite()].min()) for s in scores.values())
    return {axis: torch.where(s.isfinite(), s, lowest - MARGIN) for axis, s in scores.items()}
