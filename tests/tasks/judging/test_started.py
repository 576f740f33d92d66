"""Laws of an engine that is started to answer a benchmark, with a stand-in for its program: it always ends."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from endpoint import eventually, runs

from elastic_core.judging import Benchmark, Engine, Sampling
from tasks.judging.judge import judge
from tasks.judging.samples import unseen
from tasks.judging.started import Started, check_gpus, program_for
from tasks.records import Score
from tasks.settings import ServiceError

SECONDS = 60  # far beyond what it takes; a test that hangs should end
PLAIN = Sampling(temperature=0, top_p=1, max_new_tokens=9, system=None, thinking=False)
ONE_BY_ONE = Engine(program="vllm", concurrency=1)


@dataclass(frozen=True)
class Stage:
    """Where the stand-in, what it says, and the samples are."""

    directory: Path

    def says(self, **said: Any) -> None:
        (self.directory / "s.json").write_text(json.dumps({"pieces": ["4"]} | said))

    def judged(self, engine: Engine = ONE_BY_ONE, problems: int = 6) -> Score:
        rows = [{"question": f"{i} + {4 - i}?", "answer": "4"} for i in range(problems)]
        file = self.directory / "sums.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        benchmark = Benchmark(name="sums", path=str(file), format="exact", runs=1, sampling=PLAIN)
        program = program_for(engine, "float32")
        started = Started(program, engine, self.directory, "s", self.directory / "log", "digest")
        return judge(benchmark, started, self.directory / "samples.jsonl", report=unseen)

    def samples(self) -> list[str]:
        return [json.loads(line)["request"] for line in (self.directory / "samples.jsonl").read_text().splitlines()]

    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "asked-s.jsonl").read_text().splitlines()]

    def processes(self) -> list[int]:
        file = self.directory / "processes"
        return [int(word) for word in file.read_text().split() if word.isdecimal()] if file.exists() else []

    def devices(self) -> list[str]:
        return sorted((self.directory / "devices").read_text().splitlines())


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm_package: Path) -> Any:
    """Whatever was started must have ended at the end."""
    monkeypatch.setattr("tasks.running.patience.DELAYS", (0.05,))
    monkeypatch.setenv("STANDIN", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for kind in ("vllm", "transformers"):
        standin.write_program(tmp_path, kind)
    stage = Stage(tmp_path)
    stage.says()
    yield stage
    assert stage.processes()
    eventually(lambda: not any(map(runs, stage.processes())))  # a kill takes a moment


def test_a_benchmark_is_answered_by_an_engine_that_is_started_for_it_and_not_where_nothing_is_missing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody is there, and it is not asked for this machine
    with caplog.at_level("INFO"):
        found = stage.judged(Engine())
    assert (found.accuracy, found.problems) == (1.0, 6)
    assert "vllm 0.99: starting an engine for s, log " in caplog.text and "vllm 0.99 answers for s after" in caplog.text
    assert {body["model"] for body in stage.asked()} == {"s"} and len(stage.asked()) == 6
    assert stage.judged(Engine()) == found
    assert len(stage.processes()) == 2  # the engine and its child, once
    stage.judged(Engine(), problems=7)
    assert len(stage.processes()) == 4 and len(stage.asked()) == 7


def test_transformers_is_asked_one_request_at_a_time_by_the_models_directory(stage: Stage) -> None:
    (stage.directory / "gated").touch()
    (stage.directory / f"{stage.directory.name}.json").write_text(json.dumps({"pieces": ["4"]}))
    asked = stage.directory / f"asked-{stage.directory.name}.jsonl"
    code = "import time, os, sys; time.sleep(1); print(len(open(sys.argv[1]).readlines())); os.remove(sys.argv[2])"
    script = f"import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.02)\n{code}"
    opens = subprocess.Popen(
        [sys.executable, "-c", script, str(asked), str(stage.directory / "gated")], stdout=subprocess.PIPE, text=True
    )
    assert stage.judged(Engine(program="transformers")).accuracy == 1
    assert opens.communicate()[0] == "1\n"
    assert json.loads(asked.read_text().splitlines()[0])["model"] == str(stage.directory)


@pytest.mark.parametrize(
    ("gpus", "visible", "devices"),
    [(1, "", ["0", "1", "2"]), (2, "", ["0,1"]), (2, "7,5", ["7,5"])],
    ids=["a GPU each", "two each", "those named"],
)
def test_there_are_as_many_replicas_as_the_gpus_allow_and_all_are_asked(
    gpus: int, visible: str, devices: list[str], stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert stage.judged(replace(ONE_BY_ONE, gpus=gpus), problems=3 * len(devices)).accuracy == 1
    assert [line.partition(" ")[0] for line in stage.devices()] == devices
    assert all(("--tensor-parallel-size 2" in line) == (gpus == 2) for line in stage.devices())


def test_an_engine_that_does_not_start_says_why_and_is_not_tried_again(stage: Stage) -> None:
    (stage.directory / "s.fails").touch()
    said = r"vllm 0.99 did not start \(exit code 1\): RuntimeError: there is no device; its log is .*log-0.log"
    with pytest.raises(ServiceError, match=said) as raised:
        stage.judged()
    assert not raised.value.transient


def test_an_engine_that_ends_is_tried_again_where_it_got_further_and_no_sample_is_made_twice(stage: Stage) -> None:
    stage.says(dies_at=4)
    said = r"vllm 0.99 ended while it answered \(exit code 1\): MemoryError: the cache is full; its log is"
    with pytest.raises(ServiceError, match=said) as raised:
        stage.judged()
    assert raised.value.transient
    before = stage.samples()
    assert len(before) == 3
    assert stage.judged().accuracy == 1
    assert stage.samples()[:3] == before and len(set(stage.samples())) == 6
    assert len(stage.asked()) == 4 + 3


def test_an_engine_that_ends_before_it_has_answered_is_not_tried_again(stage: Stage) -> None:
    stage.says(dies_at=1)
    with pytest.raises(ServiceError, match="MemoryError: the cache is full") as raised:
        stage.judged()
    assert not raised.value.transient


KILLED = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from test_started import Stage
Stage(Path(sys.argv[1])).judged()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "Ctrl-C"])
def test_no_engine_outlives_a_step_that_is_ended_while_it_answers(how: signal.Signals, stage: Stage) -> None:
    (stage.directory / "gated").touch()  # the answer never comes
    paths = [str(Path(__file__).parent), str(Path(standin.__file__).parent)]
    with (stage.directory / "step.log").open("w") as log:
        step = subprocess.Popen([sys.executable, "-c", KILLED, str(stage.directory), *paths], stderr=log)
    try:
        eventually((stage.directory / "asked-s.jsonl").exists)
        step.send_signal(how)
        assert step.wait(SECONDS) != 0
    finally:
        step.kill()
    eventually(lambda: not any(map(runs, stage.processes())))
    assert len(stage.processes()) == 2 and stage.samples() == []


def test_an_engine_for_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpus(Engine(gpus=2))  # on a CPU there is one replica, whatever a GPU would have
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"evaluation.engine.gpus is 2, and this machine has 1; ask for fewer"):
        check_gpus(Engine(gpus=2))
