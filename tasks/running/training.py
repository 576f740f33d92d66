"""Training runs in processes of its own, under torchrun; this module starts, follows and ends those of one node."""

import json
import logging
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elastic_core.budget import bytes_text
from elastic_core.recipe import Stage
from elastic_core.schema import to_dict
from elastic_core.training.faults import forget_faults, reported_fault
from elastic_core.training.job import FAULT, METRICS, TrainJob
from tasks.running.nodes import ALONE, End, Meeting, Others, of_all, other_nodes
from tasks.running.processes import ChildProcess
from tasks.running.travelling import travelling
from tasks.settings import LEAST_ROOM, ServiceError, is_transient

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
MOST_IDLE = 2  # starts in a row that end before a step is done
MOST_IN_PLACE = 6  # starts in a row that get no further than one before them
TORCHRUN_LINE = re.compile(r"[EWI]\d{4} ")

OnStep = Callable[[dict[str, Any]], None]


class TrainerDied(ServiceError):
    """Training ended again and again without getting any further, or failed by a defect; its log tells more."""


def train(job: TrainJob, *, processes: int | None = None, on_step: OnStep | None = None) -> None:
    """Run a job to its end; `on_step` is called with the metrics of each step, in order.

    There is a process for every CUDA device of this machine, where the stage's batch divides among them, and as many on
    each other node. A job whose processes were killed is started again, as long as it gets on. Raises ValueError with
    the job's own message for what it refuses, a transient ServiceError for a full disk and the like, NodeLost where
    fewer nodes have to go on, TrainerDied for the rest.
    """
    if processes is None:
        processes = processes_for(job.stage, torch.cuda.device_count())
    work, others = Path(job.work), other_nodes.get()
    work.mkdir(parents=True, exist_ok=True)
    tail = Tail(work / METRICS)
    furthest = max((row["step"] for row in tail.rows()), default=-1)
    idle = in_place = 0
    while True:
        with travelling(work, others) as is_complete:
            if (end := _start(job, processes, tail, on_step, others)) is None:
                is_complete.set()
                return
        idle = idle + 1 if end.last_step < 0 else 0
        in_place = in_place + 1 if end.last_step <= furthest else 0
        furthest = max(furthest, end.last_step)
        if not end.may_pass or idle == MOST_IDLE or in_place == MOST_IN_PLACE or _has_full_disk(work):
            raise failure(job, end, idle, in_place) from None
        logger.warning("stage %s: %s; it is started again from its last checkpoint", job.stage.name, end.text())
        time.sleep(random.uniform(0.5, 1.5) * 2**in_place)


def _start(job: TrainJob, processes: int, tail: "Tail", on_step: OnStep | None, others: Others | None) -> End | None:
    """Run the job's processes on this node and the others until they end; None where they have done all of it."""
    last_step = -1

    def follow() -> bool:
        nonlocal last_step
        for row in tail.rows():
            last_step = row["step"]
            if on_step is not None:
                on_step(row)
        return others is None or not others.ended()

    meeting = ALONE if others is None else others.start(job, processes)
    end = run_processes(job, processes, meeting, follow)
    if end is None:
        return None
    ends = [end] if others is None else [end, *others.ends()]
    return replace(of_all(ends), last_step=last_step)


def run_processes(job: TrainJob, processes: int, meeting: Meeting, follow: Callable[[], bool]) -> End | None:
    """Run a node's processes of a job until they end, or until `follow`, asked twice a second, says that they are to.

    None where all was done.
    """
    work = Path(job.work)
    log, exits, file = work / "train.log", work / "exits.json", work / "job.json"
    file.write_text(json.dumps(to_dict(job), indent=2))
    forget_faults(work)
    exits.unlink(missing_ok=True)
    command = [sys.executable, "-m", "elastic_core.training.launch", str(exits), *meeting.arguments]
    command += [f"--nproc-per-node={processes}", "--max-restarts=0", f"--monitor-interval={POLL_SECONDS}"]
    command += ["-m", "elastic_core.training.job", str(file)]
    process = ChildProcess(log)
    process.start(command, environment=trainer_environment(processes), directory=Path.cwd())
    try:
        running = True
        while running:
            running = process.running()
            if not follow():
                break
            time.sleep(POLL_SECONDS if running else 0)
        code = process.exit_code()
    finally:
        process.stop()
    if code == 0:
        return None
    ended = json.loads(exits.read_text()) if exits.exists() else {}
    return End(fault=reported_fault(work), exits=ended, code=code, last_step=-1, said=_last_words(process))


def failure(job: TrainJob, end: End, idle: int, in_place: int) -> Exception:
    """What is raised about a job that is not started again."""
    work, stage = Path(job.work), f"training of stage {job.stage.name}"
    if _has_full_disk(work) or (end.fault is None and FAULT in end.exits.values()):  # no room for a report
        return ServiceError(
            f"{stage} ended, and the disk of {work} is full: {bytes_text(shutil.disk_usage(work).free)} left; make "
            "room and run again, it goes on from its last checkpoint",
            transient=True,
        )
    fault = end.fault
    if fault is not None and fault.checked:
        return ValueError(fault.message)
    if fault is not None and fault.errno is not None and is_transient(OSError(fault.errno, fault.message)):
        return ServiceError(f"{stage}: {fault.message}", transient=True)
    said = f"{stage}: {end.text()}"
    if end.may_pass:
        said += f", {idle or in_place} times in a row without " + ("a step" if idle else "getting further")
    if "SIGKILL" in end.signals.values() or (fault is not None and fault.kind == "memory"):
        said += "; if it was for want of memory, lower micro_batch_size or set recompute: it goes on where it was"
    return TrainerDied(f"{said}; its log: {work / 'train.log'}")


def _has_full_disk(work: Path) -> bool:
    return shutil.disk_usage(work).free < LEAST_ROOM


def _last_words(process: ChildProcess) -> str:
    """The last line of the log that is not torchrun's own: the exception of a process that could not even begin."""
    return process.last_words(skip=TORCHRUN_LINE)


def processes_for(stage: Stage, devices: int) -> int:
    """As many processes as there are devices, or as few less as the stage's batch divides among; one on a CPU."""
    return max(count for count in range(1, max(devices, 1) + 1) if stage.divides_among(count))


def trainer_environment(processes: int) -> dict[str, str]:
    """The parent's, with all its cores shared out (torchrun would give one each) and threads that soon stop spinning.

    On a machine that is busy with something else, OpenMP's default spin made the mean step 3.5 times its usual length;
    this one costs nothing on an idle machine.
    """
    ours = {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),  # of the cores it may run on
        "GOMP_SPINCOUNT": "20000",
    }
    return ours | os.environ


class Tail:
    """The whole lines that are added to a file of JSON lines; what a kill or a bad disk spoiled is passed over."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows added since the last call; a line that is not whole yet waits."""
        if not self._path.exists():
            return
        self._position = min(self._position, self._path.stat().st_size)  # a trainer that resumed may have mended it
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                if row := _row(line):
                    yield row


def _row(line: bytes) -> dict[str, Any] | None:
    """The metrics of a step; None where the line is not the whole of one."""
    try:
        row = json.loads(line)
    except ValueError:  # bytes that are no text among them
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
