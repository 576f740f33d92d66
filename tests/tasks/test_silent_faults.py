"""The table of silent faults: what was recorded is no longer so, and nothing else would tell.

Each fault is injected into a small pipeline of real steps beside a real Prefect server. It is named in one line, and
running again ends with what a run to which nothing happened has; or it is refused where only the user can mend it.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from prefect import flow
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from progress import steps_in

from elastic_core.recipe import Evaluation
from elastic_core.schema import to_dict
from flows.serving.gpu_step import gpu_step
from flows.serving.servers import PrefectServer
from tasks.evaluate import Measurement
from tasks.records import Artifact, StageRecord
from tasks.running import code
from tasks.running.digests import artifact, file_digest
from tasks.running.gpu_pool import DEPLOYMENT_VARIABLE
from tasks.running.loopback import free_ports
from tasks.running.steps import FUNCTIONS, MAKINGS, new_directory, run, step, work_directory
from tasks.settings import HOME, ServiceError

pytestmark = pytest.mark.services

RATE = 0.5


# The pipeline


@step()
def take(path: str, identity: str) -> Artifact:
    """What the user gives, as it lies."""
    return artifact(Path(path))


@step(on_gpu=True)
def learn(teacher: Artifact, workspace: str) -> StageRecord:
    """A stage that goes on where it was: it trains no more once its family is there."""
    work = work_directory(workspace, "stage1")
    family, metrics = work / "family", work / "metrics.jsonl"
    if not family.exists():
        family.mkdir(parents=True)
        taught = float((Path(teacher.path) / "weights").read_text())
        (family / "weights").write_text(str(torch.tensor(taught * RATE).item()))
        metrics.write_text(json.dumps({"step": 0, "loss": taught}) + "\n")
    return StageRecord(family=artifact(family), metrics=str(metrics), metrics_sha256=file_digest(metrics))


@step()
def cut(stage: StageRecord, workspace: str) -> Artifact:
    """A slice with its tokenizer."""
    directory = new_directory(workspace, "slice-s")
    directory.mkdir()
    (directory / "weights").write_text((Path(stage.family.path) / "weights").read_text())
    (directory / "tokenizer.json").write_text("{}")
    return artifact(directory)


@step(on_gpu=True)
def judge(slice_: Artifact, settings: Evaluation) -> Measurement:
    """A loss that depends on how it is measured."""
    loss = float((Path(slice_.path) / "weights").read_text()) + settings.heldout_tokens
    return Measurement(cross_entropy=loss, accuracy=None)


@dataclass(frozen=True)
class Done:
    """What a run made, and what it said."""

    stage: StageRecord
    slice_: Artifact
    measured: Measurement
    said: tuple[str, ...]

    @property
    def weights(self) -> list[str]:
        return [(Path(made.path) / "weights").read_text() for made in (self.stage.family, self.slice_)]

    def made(self) -> set[str]:
        """The steps that were not taken from the cache."""
        return {title for title, cached in steps_in("\n".join(self.said)) if not cached}


@dataclass
class Place:
    """A machine: its state directory, what the user gave, and how its runs measure."""

    home: Path
    teacher: Path
    settings: Evaluation
    log: pytest.LogCaptureFixture

    def pipeline(self) -> Done:
        workspace = str(self.home / "workspace")

        @flow
        def whole() -> tuple[StageRecord, Artifact, Measurement]:
            teacher = run(take, path=str(self.teacher), identity="the same")
            stage = run(learn, teacher=teacher, workspace=workspace)
            slice_ = run(cut, stage=stage, workspace=workspace)
            return stage, slice_, run(judge, slice_=slice_, settings=self.settings)

        self.log.clear()
        done = whole()
        lines = tuple(record.getMessage() for record in self.log.records if record.name.startswith("tasks."))
        return Done(*done, said=lines)

    def cached(self, step: str) -> Path:
        """The record of a step's result in Prefect's storage."""
        kind = {"judge": "Measurement", "learn": "StageRecord"}[step]
        (found,) = (path for path in (self.home / "storage").iterdir() if kind in path.read_text())
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("prefect")
    prefect = PrefectServer(home / "prefect", home / "logs", free_ports(1)[0])
    prefect.start()
    try:
        prefect.wait()
        yield f"{prefect.url}/api"
    finally:
        prefect.stop()


@pytest.fixture
def place(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Place]:
    home, teacher = tmp_path / "home", tmp_path / "teacher"
    (home / "workspace").mkdir(parents=True)
    teacher.mkdir()
    (teacher / "weights").write_text("8.0")
    monkeypatch.setenv(HOME, str(home))
    caplog.set_level("INFO", logger="tasks")
    changed = {
        PREFECT_API_URL: server,
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_LOCAL_STORAGE_PATH: home / "storage",
    }
    with temporary_settings(changed):
        yield Place(home=home, teacher=teacher, settings=Evaluation(heldout_tokens=100), log=caplog)
    forget_code()


def forget_code() -> None:
    for known in (code._parsed, code.code_of, code.runs, code.libraries, code._version):
        getattr(known, "cache_clear", lambda: None)()


# The faults


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


def flip_in_secret(file: Path) -> None:
    status = file.stat()
    flip(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(bytes(file.stat().st_size))
    other.replace(file)


def tear(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def in_slice(name: str, fault: Callable[[Path], None]) -> Callable[[Place, Done], None]:
    return lambda place, done: fault(Path(done.slice_.path) / name)


def lose_slice(place: Place, done: Done) -> None:
    Path(done.slice_.path).rename(place.home / "elsewhere")


def in_stage(place: Place, done: Done) -> None:
    flip(Path(done.stage.family.path) / "weights")


def torn_record(place: Place, done: Done) -> None:
    tear(place.cached("judge"))


def no_record(place: Place, done: Done) -> None:
    place.cached("judge").unlink()


def lying_record(place: Place, done: Done) -> None:
    """A bit of a loss that the cache holds."""
    file = place.cached("judge")
    text = file.read_text()
    assert text.count("104.0") == 1, text
    file.write_text(text.replace("104.0", "100.0"))


def record_of_another(place: Place, done: Done) -> None:
    place.cached("judge").write_bytes(place.cached("learn").read_bytes())


def no_notes(place: Place, done: Done) -> None:
    """A disk that was restored without what is known of its files, and lost a bit on the way."""
    for note in (place.home / "hashed").glob("*"):
        note.unlink()
    flip_in_secret(Path(done.slice_.path) / "weights")


DAMAGE = {
    "a flipped bit in a slice": (in_slice("weights", flip), r"slice-s-\w+/weights is damaged: its SHA-256 is", "cut"),
    "a flipped bit, and the old time": (in_slice("weights", flip_in_secret), r"weights is damaged", "cut"),
    "another file of the same size": (in_slice("weights", swap), r"weights is damaged", "cut"),
    "a torn file": (in_slice("weights", tear), r"weights is damaged", "cut"),
    "a slice without its tokenizer": (in_slice("tokenizer.json", Path.unlink), r"tokenizer.json is gone", "cut"),
    "a file that nobody recorded": (
        in_slice("extra", Path.touch),
        r"extra was not there when slice-s-\w+ was recorded",
        "cut",
    ),
    "no slice": (lose_slice, r"slice-s-\w+ is gone", "cut"),
    "a restored disk": (no_notes, r"weights is damaged", "cut"),
    "a flipped bit in a stage": (in_stage, r"stage1-\w+/family/weights is damaged: its SHA-256 is", "learn"),
    "a torn record": (torn_record, r"judge: its record in the cache, \w+, is gone or torn", "judge"),
    "no record": (no_record, r"judge: its record in the cache, \w+, is gone or torn", "judge"),
    "a record with another loss": (lying_record, r"judge: its record in the cache, \w+, is damaged", "judge"),
    "a record of another step": (record_of_another, r"judge: its record in the cache, \w+, is damaged", "judge"),
}


@pytest.mark.parametrize(("fault", "says", "mends"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_in_one_line_and_made_again(fault, says, mends, place: Place) -> None:
    clean = place.pipeline()
    assert (clean.weights, clean.measured.cross_entropy) == (["4.0", "4.0"], 104.0)
    assert place.pipeline().made() == set()
    fault(place, clean)
    mended = place.pipeline()
    told = [line for line in mended.said if re.search(says, line)]
    assert len(told) == 1 and "\n" not in told[0] and re.search("made again|makes it again", told[0])
    assert mended.made() == {mends}
    assert (mended.weights, mended.measured) == (["4.0", "4.0"], clean.measured)
    again = place.pipeline()
    assert again.made() == set() and not [line for line in again.said if re.search(says, line)]


def changed_code(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    read = code._source
    monkeypatch.setattr(code, "_source", lambda name: read(name).replace("taught * RATE", "taught * RATE ** 2"))
    forget_code()


def changed_library(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "9.9" if name == "torch" else version(name))
    forget_code()


def changed_device(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def changed_setting(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.settings = replace(place.settings, heldout_tokens=200)


CHANGES = {
    "changed code": (changed_code, r"learn is made again: \S+\.learn changed", {"learn"}),
    "a changed library": (
        changed_library,
        r"learn is made again: torch was [\d.]+ and is 9.9",
        {"learn"},
    ),
    "a changed device": (
        changed_device,
        r"learn is made again: it was made on cpu, and this is NVIDIA H100 80GB HBM3, CUDA 13.0",
        {"learn", "judge"},
    ),
    "a changed evaluation setting": (changed_setting, None, {"judge"}),
}


@pytest.mark.parametrize(("change", "says", "made"), CHANGES.values(), ids=CHANGES)
def test_what_is_computed_otherwise_is_computed_anew(
    change, says, made, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = place.pipeline()
    change(place, monkeypatch)
    after = place.pipeline()
    assert says is None or len([line for line in after.said if re.fullmatch(says, line)]) == 1, after.said
    assert made <= after.made()
    assert (after.stage.family.path != before.stage.family.path) == ("learn" in made)
    if "judge" in made and "learn" not in made:
        assert after.measured != before.measured


def test_a_comment_is_no_change(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.pipeline()
    read, line = code._source, "family.mkdir(parents=True)"
    monkeypatch.setattr(code, "_source", lambda name: read(name).replace(line, f"{line}  # with its parents"))
    forget_code()
    assert place.pipeline().made() == set()


# What a run cannot mend


def test_a_run_whose_code_is_changed_under_it_stops_before_the_step(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by `git pull`: what is loaded is the old code, what a trainer would load is the new."""
    read = code._source

    def pulled(name: str) -> str:
        return read(name).replace("taught * RATE", "taught * RATE ** 2")

    for function in FUNCTIONS:
        code.runs(function)
    monkeypatch.setattr(code, "_written", lambda name: time.time_ns())
    monkeypatch.setattr(code, "_source", pulled)
    with pytest.raises(ValueError, match=r"learn: \S+\.learn changed while this run was going; run again"):
        place.pipeline()


def test_a_teacher_that_changed_under_a_run_is_refused_and_mended_by_the_user(place: Place) -> None:
    clean = place.pipeline()
    flip_in_secret(place.teacher / "weights")
    for _ in range(2):
        with pytest.raises(ServiceError, match=r"teacher/weights is damaged: .*; put it back, or touch a file of it"):
            place.pipeline()
    flip_in_secret(place.teacher / "weights")
    assert place.pipeline().weights == clean.weights


def test_the_metrics_of_a_whole_stage_are_not_bought_by_training_it_again(place: Place) -> None:
    clean = place.pipeline()
    tear(Path(clean.stage.metrics))
    with pytest.raises(ServiceError, match=r"metrics.jsonl is damaged: .*; put it back, or remove .*/stage1-\w+ and"):
        place.pipeline()


def test_a_second_host_that_has_other_bytes_at_the_same_path_does_not_use_them(place: Place, tmp_path: Path) -> None:
    record = place.pipeline().stage
    recorded = replace(record.family, files={"weights": hashlib.sha256(b"of the first host").hexdigest()})
    with pytest.raises(ServiceError, match=r"family/weights is damaged: .*; run again, it is made again"):
        cut.fn(stage=replace(record, family=recorded), workspace=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "there", "says"),
    [
        (f"{learn.fn.__module__}.learn", "0" * code.DIGEST_LENGTH, r"\S+\.learn changed"),
        ("torch", "1.0", r"torch was 1.0 and is [\d.]+"),
    ],
    ids=["code", "library"],
)
def test_a_worker_with_other_code_or_libraries_does_not_work(
    name: str, there: str, says: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = artifact(place.teacher)
    monkeypatch.setenv(DEPLOYMENT_VARIABLE, "gpu-step/gpu")
    inputs = {"teacher": teacher, "workspace": str(place.home / "workspace")}
    runs = {**MAKINGS["learn"](inputs).runs, name: there}
    monkeypatch.delenv(DEPLOYMENT_VARIABLE)
    with pytest.raises(ValueError, match=f"learn: the worker is not as the run that asks: {says}; install the same"):
        gpu_step(step="learn", inputs=to_dict(inputs), device="workers of gpu-step/gpu", runs=runs)


def test_a_run_finds_what_a_worker_made_and_asks_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's machine has no GPU; in the key the deployment's name stands for those of its workers."""
    monkeypatch.setenv(DEPLOYMENT_VARIABLE, "gpu-step/gpu")
    inputs = {"teacher": artifact(place.teacher), "workspace": str(place.home / "workspace")}
    making = MAKINGS["learn"](inputs)
    with monkeypatch.context() as worker:
        worker.delenv(DEPLOYMENT_VARIABLE)
        changed_device(place, worker)
        gpu_step(step="learn", inputs=to_dict(inputs), device="workers of gpu-step/gpu", runs=making.runs)

    @flow
    def asks() -> StageRecord:
        return run(learn, **inputs)

    assert Path(asks().family.path).parent.name == f"stage1-{making.key[:16]}"
