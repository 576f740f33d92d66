"""A stage of distillation as a step of the pipeline, beside the library's loop alone: what Prefect and MLflow cost.

pytest -m benchmark -s tests/benchmarks/bench_overhead.py

The step runs in a flow, on embedded services: its cache key, its supervised process under torchrun, its progress
artifact, its curves on their way to MLflow. The loop is `python -m elastic_core.job` on the same job. Both begin with
a new process and end with the written checkpoint. They run at once, for ten minutes or a little more, each with its
processes, and the step with its servers, bound to one half of the CPUs, and change halves every few seconds: on a
shared machine a CPU's speed differs from its neighbour's, and from its own a minute ago, by more than is measured (the
loop beside itself: 0.95 to 1.22 on halves that stay, 0.987 to 0.999 in turns). A step takes a third of a second, less
than in the tiny recipe; what a step costs the pipeline, its metrics, is the same for a step of a minute. No store runs:
a distillation does without.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median

import psutil
import pytest
from bench import record
from prefect import flow
from trainee import STAGE, train_job, write_family, write_tokens

from elastic_core.config import Stage
from elastic_core.job import METRICS, TrainJob
from elastic_core.schema import build, to_dict
from elastic_core.shards import read_tensors
from flows.services import embedded_services
from tasks import tracking
from tasks.data import TRAIN_FILE
from tasks.distill import distill
from tasks.records import Artifact, StageRecord
from tasks.settings import BUCKET, Settings
from tasks.steps import artifact

SECONDS = 600.0
STEP_SECONDS = 1 / 3
MICRO_BATCH = 16
TRIAL_STEPS = 50
TURN_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    family: Artifact
    corpus: Artifact
    job: TrainJob


def loop(family: Artifact, corpus: Artifact, stage: Stage, work: Path) -> Path:
    """The library alone, in a process of its own; the family that it wrote."""
    job: TrainJob = train_job(Path(family.path), Path(corpus.path) / TRAIN_FILE, work, stage=stage)
    (work / "job.json").write_text(json.dumps(to_dict(job)))
    subprocess.run([sys.executable, "-m", "elastic_core.job", str(work / "job.json")], check=True)
    return Path(job.output)


@flow
def one_stage(family: Artifact, corpus: Artifact, job: TrainJob, run_id: str, workspace: str) -> StageRecord:
    return distill(
        family,
        family,
        corpus,
        job.stage,
        job.distillation,
        job.dtype,
        job.seed,
        first_step=0,
        run_id=run_id,
        workspace=workspace,
    )


def pipeline(family: Artifact, corpus: Artifact, stage: Stage, work: Path) -> tuple[float, Path]:
    """The same as a step, in a process that finds its servers running; its seconds and the family that it wrote."""
    job: TrainJob = train_job(Path(family.path), Path(corpus.path) / TRAIN_FILE, work, stage=stage)
    (work / "inputs.json").write_text(json.dumps(to_dict(Inputs(family=family, corpus=corpus, job=job))))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(work)], check=True, env=environment)
    taken, output = json.loads((work / "done.json").read_text())
    return taken, Path(output)


def main(work: Path) -> None:
    inputs = build(Inputs, json.loads((work / "inputs.json").read_text()))
    uri = Settings.from_environment().tracking_uri
    run_id = tracking.open_run(uri, experiment="overhead", run_key="1", run_name="overhead")
    start = time.perf_counter()
    done = one_stage(inputs.family, inputs.corpus, inputs.job, run_id, str(work / "workspace"))
    (work / "done.json").write_text(json.dumps([time.perf_counter() - start, done.family.path]))


def step_seconds(metrics: Path) -> float:
    return median(json.loads(line)["seconds"] for line in metrics.read_text().splitlines())


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextmanager
def bound_to(cpus: Sequence[int]) -> Iterator[None]:
    """Bind this thread, and the threads and processes that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def place(loop_cpus: Sequence[int], other_cpus: Sequence[int]) -> None:
    """Bind the loop, a child of this process, and all else that runs here, each with its threads."""
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.Error, ProcessLookupError):  # others end while one looks at them
            is_loop = process.ppid() == here.pid and "elastic_core.job" in process.cmdline()
            for thread in process.threads():
                os.sched_setaffinity(thread.id, loop_cpus if is_loop else other_cpus)


@contextmanager
def taking_turns(half: Sequence[int], other: Sequence[int]) -> Iterator[None]:
    """Change the halves of the CPUs between the loop and all else, again and again."""
    ended = threading.Event()

    def change() -> None:
        for halves in cycle([(half, other), (other, half)]):
            if ended.wait(TURN_SECONDS):
                return
            place(*halves)

    thread = threading.Thread(target=change, name="turns")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def loop_seconds(cpus: Sequence[int], run: Callable[[], object]) -> float:
    with bound_to(cpus):
        return seconds(run)


@pytest.mark.benchmark
def test_prefect_and_mlflow_cost_a_distillation_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUCKET, "none")
    (tmp_path / "corpus").mkdir()
    write_tokens(tmp_path / "corpus" / TRAIN_FILE)
    corpus, family = artifact(tmp_path / "corpus"), artifact(write_family(tmp_path / "untrained"))
    trial = replace(
        STAGE, batch_size=480, micro_batch_size=MICRO_BATCH, steps=TRIAL_STEPS, checkpoint_every=TRIAL_STEPS
    )
    cpus = sorted(os.sched_getaffinity(0))
    half, other = cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]
    with bound_to(half):
        loop(family, corpus, trial, tmp_path / "trial")
    sequences = STEP_SECONDS / step_seconds(tmp_path / "trial" / METRICS) * trial.batch_size
    steps = round(SECONDS / STEP_SECONDS)
    stage = replace(
        trial, batch_size=round(sequences / MICRO_BATCH) * MICRO_BATCH, steps=steps, checkpoint_every=steps // 10
    )

    with bound_to(half), embedded_services(tmp_path / "home", prefect=True), ThreadPoolExecutor(1) as pool:
        bare = pool.submit(loop_seconds, other, lambda: loop(family, corpus, stage, tmp_path / "loop"))
        with taking_turns(half, other):
            ours, written = pipeline(family, corpus, stage, tmp_path / "pipeline")
            theirs = bare.result()

    same = [read_tensors(directory / "model.safetensors") for directory in (written, tmp_path / "loop" / "family")]
    assert all(same[0][name].equal(tensor) for name, tensor in same[1].items())
    record(
        benchmark="distillation as a step",
        shape="ten minutes of short steps",
        unit="s",
        ours=ours,
        theirs=theirs,
        alternative="python -m elastic_core.job",
        target="at most 1.03",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
