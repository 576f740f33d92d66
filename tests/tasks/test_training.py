"""Laws of supervised training: what is lost is started again, what is wrong is not."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from trainee import STAGE, metrics_of, train_job, write_family, write_tokens

from elastic_core.config import Optimizer
from tasks.training import processes_for, train


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("start")
    return write_family(directory / "family"), write_tokens(directory / "tokens.safetensors")


@pytest.mark.parametrize(("devices", "processes"), [(0, 1), (1, 1), (2, 2), (4, 4), (5, 4), (8, 6), (64, 12)])
def test_there_is_a_process_for_every_device_that_the_batch_can_be_divided_for(devices, processes):
    assert processes_for(replace(STAGE, batch_size=24, micro_batch_size=2), devices) == processes


def weights(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


def kill_each_once() -> Callable[[dict[str, Any]], None]:
    """As `on_step`: kill -9 the second process once the stage is under way, and the first after a while."""
    waiting = {3: "1", 8: "0"}

    def on_step(row: dict[str, Any]) -> None:
        due = [step for step in waiting if step <= row["step"]]
        if due:
            rank = waiting.pop(due[0])
            for child in psutil.Process().children(recursive=True):
                if child.is_running() and child.environ().get("RANK") == rank:
                    child.send_signal(signal.SIGKILL)

    return on_step


@pytest.mark.slow
def test_a_killed_process_is_started_again_with_the_others_and_the_weights_are_the_same(start, tmp_path):
    stage = replace(STAGE, steps=60, micro_batch_size=1)
    whole, killed = (train_job(*start, tmp_path / name, stage=stage) for name in ("whole", "killed"))
    train(whole, processes=2)
    train(killed, processes=2, on_step=kill_each_once())
    assert (tmp_path / "killed/train.log").read_text().count("goes on after step") == 2 * 2  # processes, kills
    assert weights(killed.output) == weights(whole.output)
    assert metrics_of(tmp_path / "killed").keys() == set(range(stage.steps))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_of_the_job_ends_every_process_at_once_and_for_good(processes, start, tmp_path):
    stage = replace(STAGE, micro_batch_size=1, optimizer=Optimizer(learning_rate=1e30, warmup_steps=0))
    with pytest.raises(ValueError, match=r"stage stage1, step \d: loss .* lower optimizer.learning_rate"):
        train(train_job(*start, tmp_path / "work", stage=stage), processes=processes)
    steps = (tmp_path / "work/metrics.jsonl").read_text().splitlines()
    assert len(steps) == len(set(steps)), "a step was tried again"
    assert not (tmp_path / "work/family").exists()
