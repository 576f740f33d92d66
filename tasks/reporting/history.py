"""The steps of a run's stages, read back from the lines that training wrote."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from elastic_core.training.train import BudgetMetrics, StepMetrics

_log = logging.getLogger(__name__)

Pick = Callable[[BudgetMetrics], float | None]


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps of a stage in order, from JSON lines.

    A run that was killed and resumed writes some steps twice, of which the last counts, and may leave a line
    unfinished, which is passed over, as is one that holds no step.
    """
    steps: dict[int, StepMetrics] = {}
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # bytes that are no text among them
            record = None
        if not isinstance(record, dict) or type(record.get("step")) is not int or "budgets" not in record:
            _log.info("%s: passed over a line that is not a whole step", path)
            continue
        budgets = {name: BudgetMetrics(**budget) for name, budget in record.pop("budgets").items()}
        steps[record["step"]] = StepMetrics(budgets=budgets, **record)
    return [steps[step] for step in sorted(steps)]


@dataclass(frozen=True, slots=True)
class StageHistory:
    """A stage's steps, and how many steps came before it."""

    name: str
    first: int
    metrics: Sequence[StepMetrics]

    @property
    def end(self) -> int:
        return self.first + self.metrics[-1].step + 1

    @property
    def tokens(self) -> int:
        return sum(m.tokens for m in self.metrics)

    @property
    def seconds(self) -> float:
        return sum(m.seconds for m in self.metrics)

    def curve(self, budget: str, pick: Pick) -> tuple[np.ndarray, np.ndarray]:
        """Steps, counted over all stages, and the finite values that `pick` finds of a budget."""
        values = [(self.first + m.step, pick(m.budgets[budget])) for m in self.metrics if budget in m.budgets]
        points = [(step, value) for step, value in values if value is not None and math.isfinite(value)]
        return np.array([x for x, _ in points]), np.array([y for _, y in points])


def read_stages(metrics: Sequence[tuple[str, Path]]) -> list[StageHistory]:
    """Every stage that has taken a step, from its name and its file of metrics, in order."""
    read = [(name, steps) for name, path in metrics if (steps := read_metrics(path))]
    firsts = accumulate((steps[-1].step + 1 for _, steps in read), initial=0)
    return [StageHistory(name, first, steps) for (name, steps), first in zip(read, firsts, strict=False)]
