"""Laws of a stage's checkpoints: the same state whoever writes and reads them, whole or not there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainee import ALONE, STAGE, launch, metrics_of, train_job, write_family, write_tokens

from elastic_core.recipe import Distillation
from elastic_core.training import job, resume
from elastic_core.training.job import TrainJob
from elastic_core.training.train import StageRun, train_stage

# As in test_parallel.py: two processes sum a gradient in another order than one.
SUM_ORDER = 1e-5


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("start")
    return write_family(directory / "family"), write_tokens(directory / "tokens.safetensors")


def sized(start: tuple[Path, Path], work: Path, processes: int) -> TrainJob:
    """A job whose micro-steps are the same at one process and at two."""
    stage = replace(STAGE, micro_batch_size=2 // processes)
    return train_job(*start, work, stage=stage, distillation=Distillation(ce_weight=1.0))


def stop_after(trained: TrainJob, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for so many steps, as one process, and stop as a kill would, in the middle of the next one."""

    def generate(run: StageRun, first: int = 0):
        for metrics in train_stage(run, first):
            if metrics.step == steps:
                raise Stopped
            yield metrics

    with monkeypatch.context() as patch:
        patch.setattr(job, "train_stage", generate)
        with pytest.raises(Stopped):
            job.run_job(trained, ALONE)


def state(work: Path, done: int) -> dict[str, torch.Tensor]:
    """The state of a checkpoint, put together from its files."""
    files = sorted((work / f"checkpoints/step-{done:09d}").glob("rank-*.safetensors"))
    parts: dict[str, list[torch.Tensor]] = {}
    for file in files:
        for name, rows in load_file(file).items():
            parts.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) if rows[0].ndim else rows[0] for name, rows in parts.items()}


@pytest.mark.slow
def test_any_number_of_processes_reads_and_writes_the_same_state(start, tmp_path, monkeypatch):
    jobs = [sized(start, tmp_path / str(count), 1) for count in (1, 3, 2)]
    stop_after(jobs[0], 5, monkeypatch)
    before = state(tmp_path / "1", 4)
    assert any(name.endswith("exp_avg_sq") for name in before)
    for processes, source, target in ((3, *jobs[:2]), (2, *jobs[1:])):  # rows that three do not divide evenly
        launch(processes, source, target, copy=True)
        after = state(Path(target.work), 4)
        assert after.keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]), name


@pytest.mark.slow
def test_a_stage_goes_on_with_more_processes_and_with_fewer(start, tmp_path, monkeypatch):
    whole, grown, shrunk = (tmp_path / name for name in ("whole", "grown", "shrunk"))
    job.run_job(sized(start, whole, 1), ALONE)
    stop_after(sized(start, grown, 1), 5, monkeypatch)
    launch(2, sized(start, grown, 2), sized(start, shrunk, 2), copy=True)
    launch(2, sized(start, grown, 2))
    job.run_job(sized(start, shrunk, 1), ALONE)
    expected = metrics_of(whole)
    for finished in (grown, shrunk):
        losses = metrics_of(finished)
        assert max(losses) == STAGE.steps - 1
        for step, row in losses.items():
            assert row["loss"] == pytest.approx(expected[step]["loss"], abs=SUM_ORDER), step
        assert (finished / "family").exists()


def test_a_checkpoint_in_the_making_is_no_checkpoint(start, tmp_path, monkeypatch):
    stopped = sized(start, tmp_path / "work", 1)
    stop_after(stopped, 5, monkeypatch)
    run, _ = job.prepare(stopped, ALONE)
    (tmp_path / "work/checkpoints/step-000000004").rename(tmp_path / "work/checkpoints/.step-000000004.partial")
    assert resume.resume(tmp_path / "work", run) == 2


def test_the_latest_two_checkpoints_are_kept_and_none_of_a_finished_stage(start, tmp_path, monkeypatch):
    trained = sized(start, tmp_path / "work", 1)
    stop_after(trained, 7, monkeypatch)
    names = sorted(path.name for path in (tmp_path / "work/checkpoints").iterdir())
    assert names == ["step-000000004", "step-000000006"]
    job.run_job(trained, ALONE)
    assert not (tmp_path / "work/checkpoints").exists()


def test_a_checkpoint_of_another_model_is_refused(start, tmp_path, monkeypatch):
    trained = sized(start, tmp_path / "work", 1)
    stop_after(trained, 3, monkeypatch)
    (file,) = (tmp_path / "work/checkpoints/step-000000002").glob("rank-*")
    tensors = load_file(file)
    save_file(tensors | {"student.norm_f.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"student.norm_f.weight has shapes \[\[3\]\]; expected rows of \[16\] in all"):
        job.run_job(trained, ALONE)
