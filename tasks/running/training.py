"""Training runs in processes of its own, under torchrun; this module starts, follows and ends them."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from elastic_core.budget import bytes_text
from elastic_core.recipe import Stage
from elastic_core.schema import to_dict
from elastic_core.training.job import ERROR, METRICS, TrainJob
from tasks.running.processes import ChildProcess
from tasks.settings import LEAST_ROOM, ServiceError

POLL_SECONDS = 0.5
RESTARTS = 3  # torchrun starts all processes again so often when one of them is lost

OnStep = Callable[[dict[str, Any]], None]


class TrainerDied(ServiceError):
    """The training process ended without a cause of its own: killed, out of memory, a lost worker. Worth a retry."""

    def __init__(self, message: str) -> None:
        super().__init__(message, transient=True)


def train(job: TrainJob, *, processes: int | None = None, on_step: OnStep | None = None) -> None:
    """Run a job to its end; `on_step` is called with the metrics of each step, in order.

    There is a process for every CUDA device of this machine, where the stage's batch divides among them. Raises
    ValueError with the job's own message for a fault that a retry would only repeat, TrainerDied for the rest.
    """
    if processes is None:
        processes = processes_for(job.stage, torch.cuda.device_count())
    work = Path(job.work)
    work.mkdir(parents=True, exist_ok=True)
    job_file, log_file, metrics = work / "job.json", work / "train.log", work / METRICS
    job_file.write_text(json.dumps(to_dict(job), indent=2))
    (work / ERROR).unlink(missing_ok=True)
    tail = Tail(metrics)
    tail.skip_to_end()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={RESTARTS}", f"--monitor-interval={POLL_SECONDS}"]
    command += ["-m", "elastic_core.training.job", str(job_file)]
    process = ChildProcess(log_file)
    process.start(command, environment=trainer_environment(processes), directory=Path.cwd())
    try:
        while process.running() and not (work / ERROR).exists():
            _report(tail, on_step)
            time.sleep(POLL_SECONDS)
        _report(tail, on_step)
        exit_code = process.exit_code()
    finally:
        process.stop()
    if (work / ERROR).exists():
        raise ValueError((work / ERROR).read_text())
    if exit_code == 0:
        return
    if (free := shutil.disk_usage(work).free) < LEAST_ROOM:
        raise ServiceError(
            f"training of stage {job.stage.name} ended, and the disk of {work} is full: {bytes_text(free)} left; make "
            "room and run again, it goes on from its last checkpoint",
            transient=True,
        )
    raise TrainerDied(
        f"training of stage {job.stage.name} ended with exit code {exit_code}; run again, it goes on from its last "
        f"checkpoint. Its log: {log_file}"
    )


def processes_for(stage: Stage, devices: int) -> int:
    """As many processes as there are devices, or as few less as divide the stage's micro-batches; one on a CPU."""
    micro_batches = stage.micro_steps(1)
    return max(count for count in range(1, max(devices, 1) + 1) if micro_batches % count == 0)


def trainer_environment(processes: int) -> dict[str, str]:
    """The parent's, with all its cores shared out (torchrun would give one each) and threads that soon stop spinning.

    On a machine that is busy with something else, OpenMP's default spin made the mean step 3.5 times its usual length;
    this one costs nothing on an idle machine. A rendezvous store that outlives a restart gives the new processes the
    addresses of the old ones, and they wait for those (pytorch/pytorch#135712): each start gets a store of its own.
    """
    ours = {
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes)),  # of the cores it may run on
        "GOMP_SPINCOUNT": "20000",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return ours | os.environ


class Tail:
    """The whole lines that are added to a file of JSON lines; what a kill or a full disk tore is passed over."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def skip_to_end(self) -> None:
        """Leave out what the file holds already."""
        self._position = self._path.stat().st_size if self._path.exists() else 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows added since the last call; a line that is not whole yet waits."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                with suppress(json.JSONDecodeError):
                    yield json.loads(line)


def _report(tail: Tail, on_step: OnStep | None) -> None:
    for row in tail.rows():
        if on_step is not None:
            on_step(row)
