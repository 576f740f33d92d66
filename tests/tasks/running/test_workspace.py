"""Laws of the workspace that hosts share: what one made no other makes again, and nobody takes what is not right."""

import hashlib
import re
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from objects import contents, make, noise, requests_of, stored
from prefect import Task, flow
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from records import evaluated, measured
from trainee import STAGE, train_here, train_job, write_family, write_tokens

from elastic_core.comparison import Cut
from tasks.artifacts import Store, leases
from tasks.artifacts.documents import documents, remove_objects
from tasks.records import Artifact, OrderComparison, Release, StageRecord
from tasks.running import travelling, usage, workspace
from tasks.running.digests import artifact, file_digest
from tasks.running.stale import stale
from tasks.running.steps import MAKINGS, new_directory, own_key, run, step, work_directory
from tasks.running.training import train
from tasks.running.usage import noting
from tasks.running.workspace import claimed, shared_workspace, small_files, store_result, stored_result
from tasks.settings import CACHE_SIZE, HOME, WORKSPACE, ServiceError, Settings

SIZE = 100_000

R = TypeVar("R")


@dataclass(frozen=True)
class Host:
    """A state directory of its own, which is there while something is done `with host.here():`, and for no other."""

    home: Path
    results: Path

    @contextmanager
    def here(self) -> Iterator[Path]:
        away, results, own = self.home.with_suffix(".away"), self.results, self.home / "results"
        if away.exists():
            away.rename(self.home)
        (self.home / "runs").mkdir(parents=True, exist_ok=True)
        own.mkdir(exist_ok=True)
        own.rename(results)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(HOME, str(self.home))
                with noting(self.home, "toy"):
                    yield self.home / "workspace"
        finally:
            results.rename(own)
            self.home.rename(away)


@pytest.fixture
def hosts(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Host]]:
    """Three hosts that share nothing but a bucket."""
    monkeypatch.setenv(WORKSPACE, f"s3://{settings.bucket}/shared")
    done.clear()
    yield [Host(tmp_path / name, tmp_path / "results") for name in ("one", "two", "three")]
    shared().store.client.close()
    workspace._opened.cache_clear()


# What was really done, by host
done: list[tuple[str, Path]] = []


def note(name: str, workspace: str) -> None:
    done.append((name, Path(workspace).parent))


@step()
def teach(seed: int, workspace: str) -> Artifact:
    """Weights that depend on a seed."""
    note("teach", workspace)
    directory = new_directory(workspace, "teacher")
    return artifact(make(directory, {"config.json": b"{}", "model.safetensors": noise(SIZE, seed)}))


@step()
def reverse(teacher: Artifact, workspace: str) -> StageRecord:
    """The weights the other way round, and a file of metrics."""
    note("reverse", workspace)
    weights = (Path(teacher.path) / "model.safetensors").read_bytes()[::-1]
    directory = new_directory(workspace, "reversed")
    family = artifact(make(directory / "family", {"model.safetensors": weights}))
    make(directory, {"metrics.jsonl": b'{"step": 0}\n'})
    metrics = directory / "metrics.jsonl"
    return StageRecord(family=family, metrics=str(metrics), metrics_sha256=file_digest(metrics))


@step()
def measure(family: Artifact, stages: list[StageRecord], workspace: str) -> dict[str, float]:
    """A digest of weights and metrics as a number."""
    note("measure", workspace)
    read = (Path(family.path) / "model.safetensors").read_bytes() + Path(stages[0].metrics).read_bytes()
    return {"measured": float(int(hashlib.sha256(read).hexdigest()[:8], 16))}


def do(step: Task[..., R], **inputs: Any) -> R:
    """What running a step comes to between hosts, without Prefect."""
    key, hint = MAKINGS[step.name](inputs).key, typing.get_type_hints(step.fn)["return"]
    with claimed(step.name, key, lambda: stored_result(step.name, key, hint) is not None):
        record = stored_result(step.name, key, hint)
        if record is None:
            record = step.fn(**inputs)
            store_result(step.name, key, record, made=True)
    usage.note(key, record)
    return record


def carry_out(do: Any, workspace: Path, seed: int = 0) -> tuple[Artifact, StageRecord, dict[str, float]]:
    """A pipeline of three steps."""
    place = str(workspace)
    teacher = do(teach, seed=seed, workspace=place)
    stage = do(reverse, teacher=teacher, workspace=place)
    return teacher, stage, do(measure, family=stage.family, stages=[stage], workspace=place)


def shared() -> workspace.Workspace:
    found = shared_workspace()
    assert found is not None
    return found


def test_the_second_host_makes_nothing_again_and_reads_no_file_that_no_step_needs(hosts: list[Host]) -> None:
    one, two, _ = hosts
    with one.here() as place:
        teacher, _, measured = carry_out(do, place)
    assert [name for name, _ in done] == ["teach", "reverse", "measure"]
    done.clear()
    with two.here() as place, requests_of(shared().store) as sent:
        taken, _, same = carry_out(do, place)
        assert not done and same == measured and taken.digest == teacher.digest
        assert not [of["Key"] for name, of in sent if name == "GetObject" and "/blobs/" in of["Key"]]
        assert contents(small_files(taken)) == {"config.json": b"{}"}
        do(reverse, teacher=do(teach, seed=1, workspace=str(place)), workspace=str(place))
    done.clear()
    with one.here() as place:
        carry_out(do, place, seed=1)
    assert done == [("measure", one.home)], "its input was brought from the other host"


@pytest.fixture(scope="module")
def prefect_results(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Prefect keeps the results of the host that is here."""
    results = tmp_path_factory.mktemp("prefect") / "results"
    changed = {
        PREFECT_API_URL: prefect_api,
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_LOCAL_STORAGE_PATH: results,
    }
    with temporary_settings(changed):
        yield results


@pytest.mark.services
def test_steps_that_prefect_runs_are_done_once_on_whichever_host(
    prefect_results: Path, hosts: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three = (replace(host, results=prefect_results) for host in hosts)

    @flow
    def on_three_hosts() -> None:
        with monkeypatch.context() as alone:
            alone.delenv(WORKSPACE)
            with one.here() as place:
                made = carry_out(run, place)
        with one.here() as place:
            assert carry_out(run, place) == made, "it joins the others with what it has"
        for host in (two, two, three):
            with host.here() as place:
                teacher, stage, measured = carry_out(run, place)
                assert (teacher.digest, measured) == (made[0].digest, made[2])
                assert not Path(teacher.path).exists(), "no step had to read it"
        assert len(done) == 3 and {home for _, home in done} == {one.home}
        with one.here() as place:
            (Path(made[0].path) / "model.safetensors").write_bytes(noise(SIZE, 5))
            Path(made[1].metrics).unlink()
            assert carry_out(run, place)[0].digest == made[0].digest
            assert len(done) == 3, "what is damaged here is whole in the store"
            assert measure.fn(family=stage.family, stages=[made[1]], workspace=str(place)) == made[2]
        with two.here() as place:
            run(reverse, teacher=run(teach, seed=1, workspace=str(place)), workspace=str(place))
        done.clear()
        with three.here() as place:
            carry_out(run, place, seed=1)
        assert done == [("measure", three.home)]

    on_three_hosts()


@pytest.mark.parametrize(
    "record",
    [
        evaluated(measured("m", 2.0)),
        OrderComparison(heldout_tokens=4, cuts=(Cut(axis="ffn", full=8, size=4, by_importance=1.0, at_random=(2.0,)),)),
        Release(family="f", version="1", registration="1", uri="s3://b", models={"m": "f-m:1"}, run_id="r", report="x"),
        2.5,
        "micro-m:1",
    ],
    ids=lambda record: type(record).__name__,
)
def test_every_kind_of_record_comes_back_as_it_was(record: Any, hosts: list[Host]) -> None:
    key = "0" * 64
    with hosts[0].here():
        store_result("step", key, record, made=True)
    with hosts[1].here():
        assert stored_result("step", key, type(record)) == record
        assert stored_result("step", "1" * 64, type(record)) is None


def spoil(store: Store, digest: str) -> None:
    store.client.put_object(Bucket=store.bucket, Key=f"shared/blobs/{digest}", Body=noise(SIZE, 99))


def test_a_flipped_bit_in_the_store_is_named_and_then_its_step_is_done_anew(hosts: list[Host], store: Store) -> None:
    one, two, three = hosts
    with one.here() as place:
        teacher = do(teach, seed=0, workspace=str(place))
    weights = teacher.files["model.safetensors"]
    spoil(store, weights)
    with two.here() as place:
        taken = do(teach, seed=0, workspace=str(place))
        with pytest.raises(ServiceError, match=rf"blobs/{weights} is corrupt: .*; it was removed there: run again"):
            do(reverse, teacher=taken, workspace=str(place))
    assert [name for name, _ in done] == ["teach"]
    with two.here() as place:
        _, stage, _ = carry_out(do, place)
    assert done[1:] == [(name, two.home) for name in ("teach", "reverse", "measure")]
    with three.here() as place:
        assert carry_out(do, place)[1].family.digest == stage.family.digest
    assert len(done) == 4


def test_a_record_that_was_changed_in_the_store_is_not_believed(hosts: list[Host], store: Store) -> None:
    with hosts[0].here() as place:
        teacher = do(teach, seed=0, workspace=str(place))
    (key,) = (key for key in stored(store) if "/results/teach-" in key)
    with closing(store.client.get_object(Bucket=store.bucket, Key=key)["Body"]) as body:
        other = body.read().replace(b'"config.json"', b'"../config.json"')
    store.client.put_object(Bucket=store.bucket, Key=key, Body=other)
    with hosts[1].here() as place:
        assert do(teach, seed=0, workspace=str(place)).digest == teacher.digest
    assert [home for _, home in done] == [hosts[0].home, hosts[1].home]


def test_the_cache_keeps_to_its_bound_and_keeps_what_a_step_reads(
    hosts: list[Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_SIZE, f"{SIZE * 3 // 2}B")
    with hosts[0].here() as place:
        teachers = [do(teach, seed=seed, workspace=str(place)) for seed in range(3)]
    with hosts[1].here() as place:
        for seed in range(3):
            do(reverse, teacher=do(teach, seed=seed, workspace=str(place)), workspace=str(place))
        kept = {path.name for path in (place.parent / "cache").glob("[!.]*")}
    assert kept == {teachers[-1].digest[:32]} and len(done) == 6


# Two hosts at once


def is_waiting(caplog: pytest.LogCaptureFixture) -> bool:
    return any(text.startswith("waiting for teach, which") for text in caplog.messages)


def test_of_two_hosts_that_start_one_step_the_second_waits_and_takes_the_result(
    hosts: list[Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workspace, "LOOKS", (0.05, 0.1))
    inputs = {"seed": 0, "workspace": "elsewhere"}
    key = MAKINGS["teach"](inputs).key
    with hosts[0].here() as place:
        made = teach.fn(seed=0, workspace=str(place))
        first = leases.Lease(shared().store, shared().lease("teach", key), host="first")
        assert first.claim() == ""
        with first.kept(), ThreadPoolExecutor(1) as pool, caplog.at_level("INFO"):
            second = pool.submit(do, teach, **inputs)
            while not is_waiting(caplog):
                assert not second.done()
            store_result("teach", key, made, made=True)
            assert second.result(60) == made
    assert len(done) == 1


WORKING = """
import sys
from tasks.artifacts import leases
from tasks.running.workspace import claimed
leases.BEAT_SECONDS = 0.1
with claimed("teach", sys.argv[1], lambda: False):
    print(flush=True)
    sys.stdin.read()
"""


def test_the_step_of_a_host_that_is_killed_is_done_by_the_one_that_waits(
    hosts: list[Host], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workspace, "LOOKS", (0.05, 0.1))
    monkeypatch.setattr(leases, "LIFE_SECONDS", 5.0)
    dying, other, _ = hosts
    key = MAKINGS["teach"]({"seed": 0, "workspace": ""}).key
    with dying.here():
        process = subprocess.Popen(
            [sys.executable, "-c", WORKING, key],
            cwd=Path(__file__).parents[3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    with process, ThreadPoolExecutor(1) as pool, other.here() as place, caplog.at_level("INFO"):
        assert process.stdout is not None
        process.stdout.readline()
        waiting = pool.submit(do, teach, seed=0, workspace=str(place))
        while not is_waiting(caplog):
            assert not waiting.done()
        process.kill()
        waiting.result(60)
    assert done == [("teach", other.home)]


# Training


LONG = replace(STAGE, steps=40, checkpoint_every=5)


class Killed(ServiceError):
    """What ends a host in the middle of a stage."""


def die_when_a_checkpoint_is_stored(row: dict[str, Any]) -> None:
    """Hold the trainer when it has written a checkpoint, and end its host when that is stored."""
    if not dying or row["step"] < LONG.checkpoint_every:
        return
    prefix, deadline = shared().checkpoints(own_key()), time.monotonic() + 60
    trainers = [child for child in psutil.Process().children(recursive=True) if "elastic_core" in str(child.cmdline())]
    for trainer in trainers:
        trainer.suspend()
    while not [key for key in documents(shared().store, prefix) if key.endswith(".json")]:
        assert time.monotonic() < deadline, "no checkpoint is stored"
        time.sleep(0.05)
    for trainer in trainers:
        trainer.resume()
    raise Killed("this host is gone")


@step()
def distil(family: Artifact, tokens: str, workspace: str) -> Artifact:
    """A stage."""
    note("distil", workspace)
    work = work_directory(workspace, "stage1")
    work.parent.mkdir(exist_ok=True)
    job = train_job(Path(family.path), Path(tokens), work, stage=LONG)
    train(job, on_step=die_when_a_checkpoint_is_stored)
    return artifact(work / "family")


dying: list[bool] = []


@pytest.mark.services
@pytest.mark.parametrize("by", [1, 0], ids=["another host", "its own, whose checkpoints are damaged"])
def test_a_stage_goes_on_from_the_stored_checkpoint_with_the_same_weights_to_the_bit(
    hosts: list[Host],
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    by: int,
) -> None:
    monkeypatch.setattr(travelling, "POLL_SECONDS", 0.05)
    monkeypatch.setattr("tasks.running.training.POLL_SECONDS", 0.02)
    family, tokens = artifact(write_family(tmp_path / "family")), write_tokens(tmp_path / "tokens.safetensors")
    undisturbed = train_job(Path(family.path), tokens, tmp_path / "undisturbed", stage=LONG)
    train_here(undisturbed)
    dying.append(True)
    with hosts[0].here() as place, pytest.raises(Killed):
        do(distil, family=family, tokens=str(tokens), workspace=str(place))
    kept = [key for key in stored(store) if key.startswith("shared/checkpoints/") and key.endswith(".json")]
    assert 1 <= len(kept) <= 2
    dying.clear()
    with hosts[0].here() as place:
        states = [*place.rglob("step-*/*.safetensors")]
        for state in states:
            state.write_bytes(bytes(state.stat().st_size))
    assert states
    with hosts[by].here() as place, caplog.at_level("INFO"):
        trained = do(distil, family=family, tokens=str(tokens), workspace=str(place))
        assert contents(Path(trained.path)) == contents(Path(undisturbed.output))
    went_on = r"stage1-\w+ goes on at step \d+, where another host was"
    assert any(re.fullmatch(went_on, text) for text in caplog.messages)
    assert not [key for key in stored(store) if key.startswith("shared/checkpoints/")], "the stage is stored itself"


# Garbage


def test_what_no_run_of_any_host_needs_leaves_the_store_and_nothing_else(hosts: list[Host], store: Store) -> None:
    one, two, three = hosts
    later = datetime.now(UTC) + timedelta(days=8)
    with one.here() as place:
        carry_out(do, place, seed=1)
    with two.here() as place:
        carry_out(do, place, seed=2)  # the last run of the family, on another host than the one that collects
    before = stored(store)
    for _ in range(2):
        for one_sort in stale(three.home, shared(), (), later):
            remove_objects(store, one_sort.keys)
    left = stored(store)
    assert len([key for key in left if "/results/" in key]) == 3 < len([key for key in before if "/results/" in key])
    done.clear()
    with three.here() as place:
        carry_out(do, place, seed=2)
        assert not done
        carry_out(do, place, seed=1)
    assert [name for name, _ in done] == ["teach", "reverse", "measure"]


def test_a_step_that_takes_weeks_keeps_what_its_run_used_though_another_ended_since(
    hosts: list[Host], store: Store
) -> None:
    """Only the lease of the step is written meanwhile."""
    one, two, three = hosts
    with suppress(KeyboardInterrupt), one.here() as place:
        teacher = do(teach, seed=1, workspace=str(place))
        key = MAKINGS[reverse.name]({"teacher": teacher, "workspace": str(place)}).key
        usage.note_begun(key)
        raise KeyboardInterrupt  # so that its list has no end
    with two.here() as place:
        carry_out(do, place, seed=2)
    time.sleep(1.1)  # times of objects are in seconds
    before = datetime.now(UTC)
    time.sleep(1.1)
    assert leases.Lease(shared().store, shared().lease(reverse.name, key), host="one").claim() == ""
    for one_sort in stale(three.home, shared(), (), before):
        remove_objects(store, one_sort.keys)
    with three.here():
        assert workspace.is_stored(teacher)


def test_small_files_of_the_users_own_directory_are_those_of_the_record(hosts: list[Host], tmp_path: Path) -> None:
    directory = make(tmp_path / "teacher", {"config.json": b"{}", "model.safetensors": noise(SIZE)})
    with hosts[0].here():
        recorded = artifact(directory)
        assert small_files(recorded) == directory
        (directory / "config.json").write_bytes(b"{ }")  # as another host may have it
        with pytest.raises(ServiceError, match=r"teacher/config\.json is damaged: .*; put it back, or touch"):
            small_files(recorded)
        (directory / "config.json").unlink()
        with pytest.raises(ServiceError, match=r"teacher/config\.json is gone; put it back"):
            small_files(recorded)
