"""What tests ask of processes that share work: functions of a module that a new process can import."""

import os
import signal
from collections.abc import Sequence

from torch import Tensor


def process_of(share: int) -> tuple[int, int]:
    return share, os.getpid()


def refuse(share: int) -> None:
    raise ValueError(f"share {share} is refused")


def die(made: tuple[int, int]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def total(made: tuple[int, int], tensors: Sequence[Tensor]) -> int:
    return sum(int(tensor.sum()) for tensor in tensors)
