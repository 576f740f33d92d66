"""What a process of a training job leaves when it fails, for whoever decides whether to start the job again."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from elastic_core.schema import build

# The variable by which a process of a job knows its launcher, however long it took to start.
LAUNCHER = "ELASTIC_LAUNCHER_PID"

# own: comes again at every start. memory: comes again too, unless other programs had the memory. collective: the
# processes cannot reach each other, because one of them is gone or because their network is set up wrongly.
Kind = Literal["own", "memory", "collective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An exception that ended a process: its text on one line, and the system's number of it where it has one."""

    kind: Kind
    message: str
    errno: int | None = None
    checked: bool = False  # one of our own refusals, whose text says what to do


def report_fault(work: Path, rank: int, error: Exception) -> None:
    """Write the fault of this process to a file in `work`, whole or not at all."""
    part = work / f".error-{rank}.{os.getpid()}"
    part.write_text(json.dumps(asdict(describe(error))))
    part.replace(work / f"error-{rank}.json")


def reported_fault(work: Path) -> Fault | None:
    """The fault that the processes reported; of several, one of its own, since the others only lost their peer."""
    files = sorted(work.glob("error-*.json"))
    faults = [build(Fault, json.loads(file.read_text()), str(file)) for file in files]
    return min(faults, key=lambda fault: fault.kind != "own", default=None)


def forget_faults(work: Path) -> None:
    """Remove the reports of an earlier start."""
    for file in (*work.glob("error-*.json"), *work.glob(".error-*")):
        file.unlink(missing_ok=True)


def describe(error: Exception) -> Fault:
    """An exception as a fault. Exceptions that are not of this package carry their type in front."""
    checked = isinstance(error, ValueError | FloatingPointError)
    text = " ".join(str(error).split())
    if not checked:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    errno = error.errno if isinstance(error, OSError) else None
    return Fault(kind=_kind(error), message=text[:1000], errno=errno, checked=checked)


def _kind(error: Exception) -> Kind:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "memory"
    if isinstance(error, dist.DistError):
        return "collective"
    if isinstance(error, RuntimeError):  # neither the CPU's allocator nor gloo has a class of its own
        text = str(error).lower()
        if "defaultcpuallocator" in text or "out of memory" in text:
            return "memory"
        return "collective" if "gloo" in text else "own"
    return "own"
