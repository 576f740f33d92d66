"""Laws of a stage's checkpoints: the same state whoever writes and reads them, whole or not there."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainee import ALONE, STAGE, launch, metrics_of, train_job, write_family, write_tokens

from elastic_core.recipe import Distillation, RouterSchedule
from elastic_core.training import job, resume
from elastic_core.training.job import TrainJob
from elastic_core.training.train import StageRun, StepMetrics, train_stage

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
    stage = replace(STAGE, micro_batch_size=2 // processes, budget_rows=2)
    return train_job(*start, work, stage=stage, distillation=Distillation(ce_weight=1.0))


def stop_after(trained: TrainJob, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train for so many steps, as one process, and stop as a kill would, in the middle of the next one."""

    def generate(run: StageRun, *since: Any):
        for metrics in train_stage(run, *since):
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


@pytest.mark.services
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


@pytest.mark.services
def test_hosts_write_their_own_files_and_go_on_when_each_has_those_of_all(start, tmp_path, monkeypatch):
    whole, source, target = (sized(start, tmp_path / name, count) for name, count in (("whole", 1), ("0", 1), ("1", 2)))
    job.run_job(whole, ALONE)
    stop_after(source, 5, monkeypatch)
    step = "checkpoints/step-000000004"
    shutil.copytree(tmp_path / "0" / step, tmp_path / "0/hosts/1" / step)
    launch(1, source, target, copy=True, hosts=2)
    here, there = (tmp_path / "1" / host / step for host in ("", "hosts/1"))
    assert {path.name for path in here.iterdir()} == {"rank-00000-of-00002.safetensors", job.METRICS, "state.json"}
    assert {path.name for path in there.iterdir()} == {"rank-00001-of-00002.safetensors", "state.json"}
    assert (here / "state.json").read_bytes() == (there / "state.json").read_bytes()
    for path, other in ((here, there), (there, here)):
        for file in other.iterdir():
            shutil.copy(file, path / file.name)
    assert all(torch.equal(rows, state(tmp_path / "1", 4)[name]) for name, rows in state(tmp_path / "0", 4).items())
    launch(1, target, hosts=2)
    for number, row in metrics_of(tmp_path / "whole").items():
        assert metrics_of(tmp_path / "1")[number]["loss"] == pytest.approx(row["loss"], abs=SUM_ORDER), number
    assert Path(target.output).exists() and not there.parent.exists()


@pytest.mark.services
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


def test_a_stage_that_wants_memory_goes_on_with_smaller_micro_batches_and_recomputed(start, tmp_path, monkeypatch):
    """What a user changes after a device was out of memory: the stage goes on, to what it would have reached."""
    frozen = replace(STAGE, micro_batch_size=6, router=RouterSchedule(mode="frozen"))
    saving = replace(frozen, micro_batch_size=1, recompute=True)
    learned = Distillation(ce_weight=1.0)
    whole, stopped = (
        train_job(*start, tmp_path / name, stage=frozen, distillation=learned) for name in ("whole", "stopped")
    )
    job.run_job(whole, ALONE)
    stop_after(stopped, 5, monkeypatch)
    job.run_job(replace(stopped, stage=saving), ALONE)
    expected = metrics_of(tmp_path / "whole")
    for step, row in metrics_of(tmp_path / "stopped").items():
        assert row["loss"] == pytest.approx(expected[step]["loss"], abs=SUM_ORDER), step


def test_a_checkpoint_in_the_making_is_no_checkpoint(start, tmp_path, monkeypatch):
    stopped = sized(start, tmp_path / "work", 1)
    stop_after(stopped, 5, monkeypatch)
    run, _ = job.prepare(stopped, ALONE)
    (tmp_path / "work/checkpoints/step-000000004").rename(tmp_path / "work/checkpoints/.step-000000004.partial")
    done, rows = resume.resume(tmp_path / "work", run)
    assert done == len(rows) == 2


def test_the_latest_two_checkpoints_are_kept_and_none_of_a_finished_stage(start, tmp_path, monkeypatch):
    trained = sized(start, tmp_path / "work", 1)
    stop_after(trained, 7, monkeypatch)
    names = sorted(path.name for path in (tmp_path / "work/checkpoints").iterdir())
    assert names == ["step-000000004", "step-000000006"]
    job.run_job(trained, ALONE)
    assert not (tmp_path / "work/checkpoints").exists()


def test_a_checkpoint_is_written_by_the_clock_too_which_begins_again_with_each(start, tmp_path, monkeypatch):
    """A clock that goes a minute a step, and in every checkpoint half an hour."""
    now, written = [0.0], []

    def save(work: Path, run: StageRun, done: int, rows: list[str]) -> None:
        resume.save_checkpoint(work, run, done, rows)
        written.append(done)
        now[0] += 1800

    def step(*given: Any) -> Iterator[StepMetrics]:
        for metrics in train_stage(*given):
            now[0] += 60
            yield metrics

    monkeypatch.setattr(job, "save_checkpoint", save)
    monkeypatch.setattr(job, "train_stage", step)
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: now[0]))
    trained = sized(start, tmp_path / "work", 1)
    by_clock = replace(trained.stage, checkpoint_every=100, checkpoint_minutes=3.0)
    job.run_job(replace(trained, stage=by_clock), ALONE)
    assert written == [3, 6, STAGE.steps]


def test_a_checkpoint_of_another_model_is_refused(start, tmp_path, monkeypatch):
    trained = sized(start, tmp_path / "work", 1)
    stop_after(trained, 3, monkeypatch)
    directory = tmp_path / "work/checkpoints/step-000000002"
    (file,) = directory.glob("rank-*")
    save_file(load_file(file) | {"student.norm_f.weight": torch.ones(3)}, file)
    state = json.loads((directory / resume.STATE_FILE).read_text())
    state["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    (directory / resume.STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"student.norm_f.weight has shapes \[\[3\]\]; expected rows of \[16\] in all"):
        job.run_job(trained, ALONE)


# Damage


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def tear(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


WEIGHTS = "rank-00000-of-00001.safetensors"

DAMAGE = {
    "a flipped bit": (flip, WEIGHTS, r"rank-00000-of-00001.safetensors is damaged: its SHA-256 is \w+, and was \w+"),
    "a torn file": (tear, WEIGHTS, r"rank-00000-of-00001.safetensors is torn: it has \d+ bytes of \d+"),
    "a missing file": (Path.unlink, WEIGHTS, r"rank-00000-of-00001.safetensors: there is no such file"),
    "a torn state": (tear, resume.STATE_FILE, r"state.json is damaged: is not valid JSON"),
    "no state": (Path.unlink, resume.STATE_FILE, r"state.json: there is no such file"),
    "rows with a flipped bit": (flip, resume.ROWS_FILE, r"metrics.jsonl is damaged: its SHA-256 is"),
}


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The work of a stage to which nothing happened."""
    work = tmp_path_factory.mktemp("whole") / "work"
    job.run_job(sized(start, work, 1), ALONE)
    return work


def assert_same(work: Path, whole: Path) -> None:
    """The same weights, and the same metrics of every step, but for its time; no line of them torn."""
    for file in (whole / "family").iterdir():
        assert (work / "family" / file.name).read_bytes() == file.read_bytes(), file.name
    found, expected = metrics_of(work), metrics_of(whole)
    for rows in (found, expected):
        for row in rows.values():
            row.pop("seconds")
    assert found == expected
    assert found.keys() == set(range(STAGE.steps))


@pytest.mark.parametrize(("damage", "name", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    damage, name, says, start, whole, tmp_path, monkeypatch, caplog
):
    trained = sized(start, tmp_path / "work", 1)
    stop_after(trained, 7, monkeypatch)
    damage(tmp_path / "work/checkpoints/step-000000006" / name)
    caplog.set_level("INFO")
    job.run_job(trained, ALONE)
    assert re.search(f"step-000000006/{says}.*; it is passed over for the checkpoint before it", caplog.text)
    assert "goes on after step 4 of 8" in caplog.text
    assert_same(tmp_path / "work", whole)


def test_a_stage_whose_checkpoints_are_all_damaged_begins_again(start, whole, tmp_path, monkeypatch, caplog):
    trained = sized(start, tmp_path / "work", 1)
    stop_after(trained, 7, monkeypatch)
    for directory in (tmp_path / "work/checkpoints").iterdir():
        flip(directory / WEIGHTS)
    job.run_job(trained, ALONE)
    assert caplog.text.count("it is passed over") == 2
    assert_same(tmp_path / "work", whole)


@pytest.mark.services
def test_a_damaged_part_of_any_process_is_passed_over_by_all(start, whole, tmp_path, monkeypatch):
    stopped, copied = sized(start, tmp_path / "stopped", 1), sized(start, tmp_path / "copied", 2)
    stop_after(stopped, 5, monkeypatch)
    launch(2, stopped, copied, copy=True)
    damaged = tmp_path / "copied/checkpoints/step-000000004"
    flip(damaged / "rank-00001-of-00002.safetensors")
    (tmp_path / "stopped/checkpoints/step-000000002").rename(damaged.with_name("step-000000002"))
    launch(2, copied)
    assert metrics_of(tmp_path / "copied").keys() == set(range(STAGE.steps))
    for step, row in metrics_of(whole).items():
        assert metrics_of(tmp_path / "copied")[step]["loss"] == pytest.approx(row["loss"], abs=SUM_ORDER), step


def test_a_torn_checkpoint_never_costs_one_of_the_two_whole_ones(start, tmp_path, monkeypatch):
    trained = sized(start, tmp_path / "work", 1)
    stop_after(trained, 5, monkeypatch)
    tear(tmp_path / "work/checkpoints/step-000000004" / WEIGHTS)
    run, _ = job.prepare(trained, ALONE)
    resume.save_checkpoint(tmp_path / "work", run, 6, [])
    names = sorted(path.name for path in (tmp_path / "work/checkpoints").iterdir())
    assert names == ["step-000000002", "step-000000004", "step-000000006"]


@pytest.mark.parametrize("damage", [tear, flip, Path.unlink])
def test_metrics_that_were_torn_or_lost_are_written_again(damage, start, whole, tmp_path, monkeypatch):
    trained = sized(start, tmp_path / "work", 1)
    stop_after(trained, 7, monkeypatch)
    damage(tmp_path / "work" / job.METRICS)
    job.run_job(trained, ALONE)
    assert_same(tmp_path / "work", whole)


@pytest.mark.parametrize("times", [1, 2])
def test_the_last_checkpoint_is_read_back_before_the_export(times, start, whole, tmp_path, monkeypatch):
    """A disk that spoils what is written to it, once and always."""
    trained, spoils = sized(start, tmp_path / "work", 1), [flip] * times

    def save(work: Path, run: StageRun, done: int, rows: list[str]) -> None:
        resume.save_checkpoint(work, run, done, rows)
        if done == STAGE.steps and spoils:
            spoils.pop()(work / f"checkpoints/step-{done:09d}" / WEIGHTS)

    monkeypatch.setattr(job, "save_checkpoint", save)
    if times == 1:
        job.run_job(trained, ALONE)
        assert_same(tmp_path / "work", whole)
    else:
        with pytest.raises(ValueError, match=r"work: does not give back what is written to it; look at the disk"):
            job.run_job(trained, ALONE)
        assert not Path(trained.output).exists()
