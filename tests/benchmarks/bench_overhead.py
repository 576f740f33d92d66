"""A stage of distillation as a step of the pipeline, beside the library's loop alone: what Prefect and MLflow cost.

pytest -m benchmark -s tests/benchmarks/bench_overhead.py

The step runs in a flow, on embedded services: its cache key, its supervised process under torchrun, its progress
artifact, its curves on their way to MLflow. The loop is `python -m elastic_core.training.job` on the same job. Both
begin with a new process and end with the written checkpoint, after ten minutes each. They take turns: one has the
whole machine, its servers too, while the other is stopped, for a shared machine's speed drifts by more than is
measured. The servers live on what training leaves of two cores; with a single core for all, the ratio was 1.04. A
step takes half a second, as in the tiny recipe (0.42 and 0.55 s); what a step costs the pipeline, its metrics, is the
same for a step of a minute. No store runs: a distillation does without.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import psutil
import pytest
from bench import record
from prefect import flow
from trainee import STAGE, train_job, write_family, write_tokens

from elastic_core.files.shards import read_tensors
from elastic_core.recipe import Stage
from elastic_core.schema import build, to_dict
from elastic_core.training.job import METRICS, TrainJob
from flows.serving.services import embedded_services
from tasks import tracking
from tasks.corpus.record import TRAIN_FILE
from tasks.distill import distill
from tasks.records import Artifact, StageRecord
from tasks.running.digests import artifact
from tasks.settings import BUCKET, Settings

SECONDS = 600.0
STEP_SECONDS = 0.5
MICRO_BATCH = 16
TRIAL_STEPS = 50
TURN_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    family: Artifact
    corpus: Artifact
    job: TrainJob


def loop(family: Artifact, corpus: Artifact, stage: Stage, work: Path) -> subprocess.Popen[bytes]:
    """The library alone, in a process of its own, which writes the family into `work`."""
    job = train_job(Path(family.path), Path(corpus.path) / TRAIN_FILE, work, stage=stage)
    (work / "job.json").write_text(json.dumps(to_dict(job)))
    return subprocess.Popen([sys.executable, "-m", "elastic_core.training.job", str(work / "job.json")])


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


def pipeline(family: Artifact, corpus: Artifact, stage: Stage, work: Path) -> subprocess.Popen[bytes]:
    """The same as a step, in a process that has found its servers, and stopped before it begins."""
    job = train_job(Path(family.path), Path(corpus.path) / TRAIN_FILE, work, stage=stage)
    (work / "inputs.json").write_text(json.dumps(to_dict(Inputs(family=family, corpus=corpus, job=job))))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, __file__, str(work)], env=environment)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None
        time.sleep(0.1)
    return process


def main(work: Path) -> None:
    inputs = build(Inputs, json.loads((work / "inputs.json").read_text()))
    uri = Settings.from_environment().tracking_uri
    run_id = tracking.open_run(uri, experiment="overhead", run_key="1", run_name="overhead")
    os.kill(os.getpid(), signal.SIGSTOP)
    done = one_stage(inputs.family, inputs.corpus, inputs.job, run_id, str(work / "workspace"))
    (work / "done.txt").write_text(done.family.path)
    os._exit(0)  # the end of a process is not the step's


class Turns:
    """A process that runs in turns, with the servers that it needs; `seconds` is what it had of them until its end."""

    def __init__(self, process: subprocess.Popen[bytes], servers: Sequence[psutil.Process] = ()) -> None:
        self.process, self.servers, self.seconds = process, servers, 0.0
        self._each(psutil.Process.suspend)

    def take(self) -> bool:
        """Run for one turn; whether it goes on."""
        self._each(psutil.Process.resume)
        start = time.perf_counter()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(TURN_SECONDS)
        self.seconds += time.perf_counter() - start
        if self.process.returncode is None:
            self._each(psutil.Process.suspend)
        return self.process.returncode is None

    def _each(self, do: Callable[[psutil.Process], None]) -> None:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in (root, *root.children(recursive=True), *self.servers):
                with suppress(psutil.NoSuchProcess):
                    do(process)


def step_seconds(metrics: Path) -> float:
    return median(json.loads(line)["seconds"] for line in metrics.read_text().splitlines())


@pytest.mark.benchmark
def test_prefect_and_mlflow_cost_a_distillation_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUCKET, "none")
    (tmp_path / "corpus").mkdir()
    write_tokens(tmp_path / "corpus" / TRAIN_FILE)
    corpus, family = artifact(tmp_path / "corpus"), artifact(write_family(tmp_path / "untrained"))
    trial = replace(
        STAGE, batch_size=480, micro_batch_size=MICRO_BATCH, steps=TRIAL_STEPS, checkpoint_every=TRIAL_STEPS
    )
    assert loop(family, corpus, trial, tmp_path / "trial").wait() == 0
    sequences = STEP_SECONDS / step_seconds(tmp_path / "trial" / METRICS) * trial.batch_size
    steps = round(SECONDS / STEP_SECONDS)
    stage = replace(
        trial, batch_size=round(sequences / MICRO_BATCH) * MICRO_BATCH, steps=steps, checkpoint_every=steps // 10
    )

    with embedded_services(tmp_path / "home", prefect=True), ExitStack() as stack:
        servers = psutil.Process().children()
        ours = Turns(pipeline(family, corpus, stage, tmp_path / "pipeline"), servers)
        stack.callback(ours.process.kill)
        theirs = Turns(loop(family, corpus, stage, tmp_path / "loop"))
        stack.callback(theirs.process.kill)
        going = [ours, theirs]
        while going:
            going = [one for one in going if one.take()]
    assert ours.process.returncode == theirs.process.returncode == 0

    written = Path((tmp_path / "pipeline" / "done.txt").read_text())
    same = [read_tensors(directory / "model.safetensors") for directory in (written, tmp_path / "loop" / "family")]
    assert all(same[0][name].equal(tensor) for name, tensor in same[1].items())
    record(
        benchmark="distillation as a step",
        shape="ten minutes of short steps",
        unit="s",
        ours=ours.seconds,
        theirs=theirs.seconds,
        alternative="python -m elastic_core.training.job",
        target="at most 1.03",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
