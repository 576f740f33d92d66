"""Which data, budget, temperature and noise belong to a step: functions of seed, stage, step and micro-step (C6)."""

import hashlib
import math
from fractions import Fraction

import torch

from elastic_core.recipe import Optimizer, Stage

_GOLDEN = Fraction(6180339887, 10**10)


def generator(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by `key`, the same in every process and on every run."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def micro_step_budgets(stage: Stage, seed: int, step: int, micro_steps: int) -> list[str]:
    """The budget of each micro-step of a step, the same on every rank.

    Budgets are laid out on [0, 1) by their shares and read at `micro_steps` evenly spaced points, so that their counts
    are exact where the shares divide the batch and within one of it elsewhere; the points shift from step to step by
    the golden ratio, so that the shares hold over the run.
    """
    total = sum(Fraction(share).limit_denominator(10**6) for share in stage.budgets.values())
    offset = (_GOLDEN * (step + 1)) % 1
    ends, end = [], Fraction(0)
    for name, share in stage.budgets.items():
        end += Fraction(share).limit_denominator(10**6) / total
        ends.append((end, name))
    picked = [next(name for end, name in ends if (i + offset) / micro_steps < end) for i in range(micro_steps)]
    order = torch.randperm(micro_steps, generator=generator(seed, stage.name, step, "budgets"))
    return [picked[i] for i in order]


def noise_generator(seed: int, stage: Stage, step: int, micro_step: int) -> torch.Generator:
    """The source of the Gumbel noise of one micro-step."""
    return generator(seed, stage.name, step, micro_step, "gumbel")


class DataOrder:
    """The rows of each global batch: every epoch is a new permutation of all rows, seeded by (seed, stage, epoch)."""

    def __init__(self, num_rows: int, stage: Stage, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(
                f"stage {stage.name}: the data holds no sequence of {stage.sequence_length} tokens; "
                "add data or shorten sequence_length"
            )
        self.num_rows, self.stage, self.seed = num_rows, stage, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def rows(self, step: int) -> list[int]:
        """The `batch_size` rows of a step, in the order of the global batch."""
        first = step * self.stage.batch_size
        return [self._row(index) for index in range(first, first + self.stage.batch_size)]

    def _row(self, index: int) -> int:
        epoch, position = divmod(index, self.num_rows)
        if epoch != self._epoch:
            self._permutation = torch.randperm(
                self.num_rows, generator=generator(self.seed, self.stage.name, epoch, "order")
            )
            self._epoch = epoch
        return int(self._permutation[position])


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
