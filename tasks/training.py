"""Training runs in a process of its own, under torchrun; this module starts it, follows it and tells how it ended."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from elastic_core.config import to_dict
from elastic_core.job import ERROR, METRICS, TrainJob
from tasks.processes import ChildProcess
from tasks.settings import ServiceError

POLL_SECONDS = 0.5

OnStep = Callable[[dict[str, Any]], None]


class TrainerDied(ServiceError):
    """The training process ended without a cause of its own: killed, out of memory, a lost worker. Worth a retry."""

    def __init__(self, message: str) -> None:
        super().__init__(message, transient=True)


def train(job: TrainJob, *, processes: int = 1, on_step: OnStep | None = None) -> None:
    """Run a job to its end; `on_step` is called with the metrics of each step, in order.

    Raises ValueError with the job's own message for a fault that a retry would only repeat, TrainerDied for the rest.
    """
    work = Path(job.work)
    work.mkdir(parents=True, exist_ok=True)
    job_file, log_file, metrics = work / "job.json", work / "train.log", work / METRICS
    job_file.write_text(json.dumps(to_dict(job), indent=2))
    (work / ERROR).unlink(missing_ok=True)
    tail = Tail(metrics)
    tail.skip_to_end()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "elastic_core.job", str(job_file)]
    process = ChildProcess(log_file)
    process.start(command, environment=_environment(), directory=Path.cwd())
    try:
        while process.running():
            _report(tail, on_step)
            time.sleep(POLL_SECONDS)
        _report(tail, on_step)
        exit_code = process.exit_code()
    finally:
        process.stop()
    if exit_code == 0:
        return
    if (work / ERROR).exists():
        raise ValueError((work / ERROR).read_text())
    raise TrainerDied(
        f"training of stage {job.stage.name} ended with exit code {exit_code}; run again, it goes on from its last "
        f"checkpoint. Its log: {log_file}"
    )


class Tail:
    """The whole lines that are added to a file of JSON lines."""

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
                if line.strip():
                    yield json.loads(line)


def _report(tail: Tail, on_step: OnStep | None) -> None:
    for row in tail.rows():
        if on_step is not None:
            on_step(row)


def _environment() -> dict[str, str]:
    """The parent's, with all cores (torchrun would take one) and threads that soon stop spinning for one another.

    On a machine that is busy with something else, OpenMP's default spin made the mean step 3.5 times its usual length;
    this one costs nothing on an idle machine.
    """
    return {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "GOMP_SPINCOUNT": "20000", **os.environ}
