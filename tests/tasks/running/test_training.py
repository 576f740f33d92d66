"""Laws of supervised training: what is lost is started again, what is wrong is not."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from disk import fill
from trainee import STAGE, metrics_of, train_job, write_family, write_tokens

from elastic_core.recipe import Optimizer
from elastic_core.training.faults import Fault, describe
from elastic_core.training.job import FAULT, METRICS
from elastic_core.training.launch import of_their_own
from tasks.reporting.history import read_metrics
from tasks.running.nodes import End
from tasks.running.training import Tail, TrainerDied, failure, processes_for, train
from tasks.settings import ServiceError, is_transient


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("start")
    return write_family(directory / "family"), write_tokens(directory / "tokens.safetensors")


@pytest.mark.parametrize(("devices", "processes"), [(0, 1), (1, 1), (2, 2), (4, 4), (5, 4), (8, 6), (64, 12)])
def test_there_is_a_process_for_every_device_that_the_batch_can_be_divided_for(devices, processes):
    assert processes_for(replace(STAGE, batch_size=24, micro_batch_size=2), devices) == processes


@pytest.mark.parametrize(("devices", "processes"), [(2, 1), (4, 3), (8, 3)])
def test_the_rows_of_a_budget_are_divided_among_all_processes(devices, processes):
    assert processes_for(replace(STAGE, batch_size=24, micro_batch_size=1, budget_rows=3), devices) == processes


@pytest.mark.skipif(sys.platform != "linux", reason="binds a process to a core")
def test_trainers_share_the_cores_that_their_parent_may_run_on():
    code = """if True:
        import os
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
        os.environ.pop("OMP_NUM_THREADS", None)
        from tasks.running.training import trainer_environment
        print([trainer_environment(processes)["OMP_NUM_THREADS"] for processes in (1, 4)])
    """
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "['1', '1']\n"


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
                with suppress(psutil.Error):  # others end while one looks at them
                    if child.environ().get("RANK") == rank:
                        child.send_signal(signal.SIGKILL)

    return on_step


@pytest.mark.services
def test_a_killed_process_is_started_again_with_the_others_and_the_weights_are_the_same(start, tmp_path):
    stage = replace(STAGE, steps=60, micro_batch_size=1)
    whole, killed = (train_job(*start, tmp_path / name, stage=stage) for name in ("whole", "killed"))
    train(whole, processes=2)
    train(killed, processes=2, on_step=kill_each_once())
    assert (tmp_path / "killed/train.log").read_text().count("goes on after step") == 2 * 2  # processes, kills
    assert weights(killed.output) == weights(whole.output)
    assert metrics_of(tmp_path / "killed").keys() == set(range(stage.steps))


@pytest.mark.services
@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_of_the_job_ends_every_process_at_once_and_for_good(processes, start, tmp_path):
    stage = replace(STAGE, micro_batch_size=1, optimizer=Optimizer(learning_rate=1e30, warmup_steps=0))
    with pytest.raises(ValueError, match=r"stage stage1, step \d: loss .* lower optimizer.learning_rate"):
        train(train_job(*start, tmp_path / "work", stage=stage), processes=processes)
    steps = (tmp_path / "work/metrics.jsonl").read_text().splitlines()
    assert len(steps) == len(set(steps)), "a step was tried again"
    assert not (tmp_path / "work/family").exists()


COLLECTIVE = Fault(kind="collective", message="DistBackendError: invalid usage")
MEMORY = Fault(kind="memory", message="OutOfMemoryError: CUDA out of memory")


@pytest.mark.parametrize(
    ("fault", "exits", "last_step", "may_pass"),
    [
        (None, {"1": -9}, -1, True),
        (COLLECTIVE, {"0": 2, "1": -9}, -1, True),
        (COLLECTIVE, {"0": 2, "1": 2}, -1, False),
        (COLLECTIVE, {"0": 2, "1": 2}, 40, True),
        (MEMORY, {"0": 2}, -1, False),
        (MEMORY, {"0": 2}, 0, True),
        (describe(ValueError("lower the rate")), {"0": 2, "1": -9}, 40, False),
        (describe(RuntimeError("shapes differ")), {"0": 2}, 40, False),
        (None, {"0": 1}, -1, False),
    ],
)
def test_another_start_helps_the_killed_and_who_was_short_of_something_halfway(fault, exits, last_step, may_pass):
    assert End(fault=fault, exits=exits, code=1, last_step=last_step, said="").may_pass == may_pass


def test_a_process_that_finds_no_room_for_its_report_is_one_on_a_full_disk(tmp_path):
    end = End(fault=None, exits={"0": FAULT}, code=1, last_step=40, said="")
    error = failure(train_job(tmp_path, tmp_path, tmp_path / "work"), end, idle=0, in_place=0)
    assert is_transient(error) and "is full" in str(error)


def in_every_trainer(code: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run code in every process of the job before anything else, and nowhere else."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(f"import os\nif 'RANK' in os.environ:\n    {code}\n")
    monkeypatch.setenv("PYTHONPATH", f"{directory}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def starts_of(work: Path) -> int:
    return (work / "starts").read_text().count("x")


COUNTED = "open({!r}, 'a').write('x');"


@pytest.mark.parametrize(
    ("code", "says", "starts"),
    {
        "import error": (
            "import sys; sys.modules['numpy'] = None",
            r"stage stage1: cannot begin: ModuleNotFoundError: .*numpy.*; its log: ",
            1,
        ),
        "killed before it does a step": (
            "import signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"stage1: process 0 was killed \(SIGKILL\), 2 times in a row without a step; if it was for want of memory",
            2,
        ),
        "no memory": (
            "import resource; resource.setrlimit(resource.RLIMIT_DATA, (600 << 20, 600 << 20))",
            r"(can't allocate memory|MemoryError).*; if it was for want of memory, lower micro_batch_size",
            1,
        ),
    }.values(),
    ids=["import error", "killed", "no memory"],
)
def test_what_comes_again_at_every_start_is_told_in_its_own_words_and_not_tried_again(
    code, says, starts, start, tmp_path, monkeypatch
):
    work = tmp_path / "work"
    in_every_trainer(COUNTED.format(str(work / "starts")) + code, tmp_path / "code", monkeypatch)
    stage = replace(STAGE, batch_size=60_000, micro_batch_size=60_000)
    with pytest.raises(TrainerDied, match=says) as caught:
        train(train_job(*start, work, stage=stage))
    assert "\n" not in str(caught.value) and not is_transient(caught.value)
    assert starts_of(work) == starts


@pytest.mark.services
def test_processes_whose_network_is_set_up_wrongly_are_started_once(start, tmp_path, monkeypatch):
    work = tmp_path / "work"
    in_every_trainer(COUNTED.format(str(work / "starts")), tmp_path / "code", monkeypatch)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    with pytest.raises(TrainerDied, match=r"stage stage1: RuntimeError: .*eth99.*; its log: ") as caught:
        train(train_job(*start, work, stage=replace(STAGE, micro_batch_size=1)), processes=2)
    assert not is_transient(caught.value)
    assert starts_of(work) == 2, "one start of two processes"


@pytest.mark.parametrize(
    ("seen", "kept"),
    [
        ({1: 2, 0: -15}, {1: 2}),  # process 1 failed, and torchrun ended process 0
        ({1: -9, 0: -15}, {1: -9}),
        ({0: -15, 1: 2}, {0: -15, 1: 2}),  # process 0 was told to end, and process 1 lost it
        ({0: -15, 1: -15}, {0: -15, 1: -15}),
        ({0: 2, 1: -9}, {0: 2, 1: -9}),
    ],
)
def test_a_process_that_torchrun_ended_did_not_fail(seen, kept):
    assert of_their_own(seen) == kept


def test_a_torn_line_of_metrics_is_passed_over(tmp_path):
    file = tmp_path / METRICS
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    tail = Tail(file)
    assert list(tail.rows()) == [{"step": 1}]
    with file.open("a") as more:
        more.write('\n{"step": 2}\n')
    assert list(tail.rows()) == [{"step": 2}]


@pytest.mark.parametrize(
    "spoiled",
    [b'{"step": 2, "x": "\xff"}', b"\xff\xfe\x00\xd8", b'{"stfp": 2}', b'{"step": "2"}', b"2", b"[2]", b"null", b""],
    ids=[
        "no text within",
        "no text",
        "another key",
        "a step in words",
        "a number",
        "a list",
        "nothing",
        "an empty line",
    ],
)
def test_a_spoiled_line_of_metrics_does_not_stop_a_stage(spoiled, tmp_path):
    file = tmp_path / METRICS
    file.write_bytes(b'{"step": 1}\n' + spoiled + b'\n{"step": 3}\n')
    assert list(Tail(file).rows()) == [{"step": 1}, {"step": 3}]


def test_a_file_of_metrics_that_was_mended_is_read_on_from_its_end(tmp_path):
    file = tmp_path / METRICS
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "l')
    tail = Tail(file)
    assert len(list(tail.rows())) == 2
    file.write_text('{"step": 1}\n')
    assert list(tail.rows()) == []
    with file.open("a") as more:
        more.write('{"step": 2}\n')
    assert list(tail.rows()) == [{"step": 2}]


@pytest.mark.services
def test_a_disk_that_is_full_is_told_and_training_goes_on_when_it_has_room(start, tmp_path, small_disk):
    stage = replace(STAGE, steps=60)
    whole, cramped = train_job(*start, tmp_path / "whole", stage=stage), train_job(*start, small_disk, stage=stage)
    train(whole)
    filler = small_disk / "filler"
    with pytest.raises(ServiceError, match=r"stage stage1 ended, and the disk of .* is full: \d.* left; make"):
        train(cramped, on_step=lambda row: fill(filler) if row["step"] > 3 and not filler.exists() else None)
    assert not Path(cramped.output).exists()
    filler.unlink()
    train(cramped)
    assert weights(cramped.output) == weights(whole.output)
    assert [row.step for row in read_metrics(small_disk / METRICS)] == [*range(stage.steps)]
