"""Laws of steps beside a real Prefect server: faults that pass are waited out and said, all others end the step."""

import errno
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from micro import MICRO
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_LOCAL_STORAGE_PATH,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.states import Completed, Crashed, Running

from elastic_core.files.locks import is_held
from elastic_core.recipe import Stage
from elastic_core.schema import build
from tasks.records import Artifact, Release
from tasks.running import patience, steps
from tasks.running.digests import artifact
from tasks.running.gpu_pool import start_run
from tasks.running.patience import patiently
from tasks.settings import HOME, ServiceError


@pytest.fixture(scope="module")
def prefect_server(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    changed = {
        PREFECT_API_URL: prefect_api,
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_LOCAL_STORAGE_PATH: tmp_path_factory.mktemp("storage"),
    }
    with temporary_settings(changed):
        yield


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tasks.running.patience"]


@pytest.mark.services
def test_a_step_waits_out_what_passes_and_says_so_each_time(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(steps, "DELAYS", (0.05,))
    faults = [OSError(errno.ESTALE, "Stale file handle"), ServiceError("s3://b: cannot reach S3", transient=True)]

    @steps.step(cached=False)
    def fetch() -> int:
        if faults:
            raise faults.pop(0)
        return 7

    with caplog.at_level(logging.INFO):
        assert steps.run(fetch) == 7
    assert lines(caplog) == [
        "fetch: [Errno 116] Stale file handle; tried again in about 2 s (attempt 2 of 65)",
        "fetch: s3://b: cannot reach S3; tried again in about 4 s (attempt 3 of 65)",
    ]


@pytest.mark.services
def test_a_step_inside_a_step_is_tried_again_by_that_one_alone(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an hour's waiting would be multiplied by the attempts of the outer step."""
    monkeypatch.setattr(steps, "DELAYS", (0.01,))
    monkeypatch.setattr(steps, "RETRIES", 2)
    attempts: list[str] = []

    @steps.step(cached=False)
    def inner() -> None:
        attempts.append("inner")
        raise OSError(errno.ESTALE, "Stale file handle")

    @steps.step(cached=False)
    def outer() -> None:
        attempts.append("outer")
        steps.run(inner)

    with pytest.raises(OSError, match="Stale file handle"):
        steps.run(outer)
    assert attempts == ["outer", "inner"] * 3


def test_a_setting_on_which_no_result_depends_is_no_part_of_a_key() -> None:
    stage = build(Stage, {**MICRO["stages"][0], "checkpoint_every": 3})
    saving = replace(stage, micro_batch_size=1, recompute=True, offload=True)
    for changed in (saving, replace(stage, checkpoint_every=7, checkpoint_minutes=1.0, sharding="hybrid")):
        assert steps.fingerprint(changed) == steps.fingerprint(stage)
    assert steps.fingerprint(replace(stage, steps=7)) != steps.fingerprint(stage)


@pytest.mark.services
def test_a_step_that_is_wrong_is_tried_once(prefect_server: None, caplog: pytest.LogCaptureFixture) -> None:
    attempts = []

    @steps.step(cached=False)
    def fetch() -> None:
        attempts.append(1)
        raise ValueError("the recipe is wrong")

    with pytest.raises(ValueError, match="the recipe is wrong"):
        steps.run(fetch)
    assert len(attempts) == 1 and not lines(caplog)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the step below writes, at the same place each time."""
    monkeypatch.setenv(HOME, str(tmp_path))
    return tmp_path / "workspace" / "made" / "weights"


@steps.step()
def write(path: str) -> Artifact:
    """A result that is a directory."""
    Path(path).parent.mkdir(parents=True)
    Path(path).write_text("1.0")
    return artifact(Path(path).parent)


def test_damage_is_set_aside_only_by_who_makes_it_again(weights: Path) -> None:
    record = write.fn(path=str(weights))
    weights.write_text("2.0")
    assert not steps._is_whole(record, write, say=True, mends=False) and weights.exists()
    assert not steps._is_whole(record, write, say=False, mends=True) and not weights.exists()
    assert len([*weights.parent.parent.iterdir()]) == 1, "kept beside its place"


@pytest.mark.services
def test_what_another_run_has_mended_since_it_was_found_damaged_is_left_alone(
    prefect_server: None, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, note = steps.damage, steps._note
    others: list[Artifact] = []
    noted: list[bool] = []

    def overtaken(record: Artifact) -> str:
        found = look(record)
        if found and not others:
            monkeypatch.setattr(steps, "damage", look)
            others.append(steps.run(write, path=str(weights)))
        return found

    def noting(making: steps.Making, record: Artifact) -> None:
        noted.append(is_held(tmp_path / "locks" / f"write-{making.key[:16]}"))
        note(making, record)

    @flow
    def whole() -> Artifact:
        steps.run(write, path=str(weights))
        weights.write_text("2.0")
        monkeypatch.setattr(steps, "damage", overtaken)
        return steps.run(write, path=str(weights))

    monkeypatch.setattr(steps, "_note", noting)
    assert [whole()] == others
    assert noted == [True, True], "made twice, and noted while no other run can look"
    assert len([*weights.parent.parent.iterdir()]) == 2, "what is whole, and what was damaged"


@pytest.mark.services
def test_a_step_that_another_run_is_making_is_waited_for_and_its_result_taken(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(HOME, str(tmp_path))
    made, go_on = [], threading.Event()

    @steps.step()
    def make(seed: int) -> int:
        made.append(seed)
        assert go_on.wait(60)
        return 10 * seed + len(made)

    def waiting() -> list[str]:
        return [text for text in caplog.messages if text == "waiting for make, which another run is making"]

    @flow
    def three_runs() -> None:
        with ThreadPoolExecutor(3) as pool:
            first, second, other = (pool.submit(copy_context().run, steps.run, make, seed=seed) for seed in (1, 1, 2))
            try:
                deadline = time.monotonic() + 60
                while (sorted(made) != [1, 2] or not waiting()) and time.monotonic() < deadline:
                    time.sleep(0.02)
            finally:
                go_on.set()
            assert first.result(60) == second.result(60)
            assert other.result(60) == 22

    with caplog.at_level(logging.INFO):
        three_runs()
    assert sorted(made) == [1, 2] and len(waiting()) == 1


@pytest.fixture
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        client.create_deployment(client.create_flow_from_name("gpu-step"), "default")
        yield client


@pytest.mark.services
def test_a_step_that_a_worker_is_doing_is_found_again_and_a_finished_one_is_begun_anew(
    client: SyncPrefectClient,
) -> None:
    def begin(key: str) -> tuple[UUID, bool]:
        run, joined = start_run("gpu-step/default", "distill", {"step": "distill"}, key)
        return run.id, joined

    with ThreadPoolExecutor(4) as pool:
        begun = [pool.submit(copy_context().run, begin, "a") for _ in range(4)]
        (first,) = {run.result(60)[0] for run in begun}
    client.set_flow_run_state(first, Running(), force=True)
    assert begin("a") == (first, True)
    other, joined = begin("b")
    assert other != first and not joined
    client.set_flow_run_state(first, Crashed(), force=True)
    second, joined = begin("a")
    assert second not in (first, other) and not joined
    client.set_flow_run_state(second, Completed(), force=True)
    third, joined = begin("a")
    assert third not in (first, second, other) and not joined


def test_a_call_waits_out_what_passes_and_says_so_within_its_bound(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", slept.append)
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x")

    def never() -> None:
        raise full

    with pytest.raises(OSError, match="No space left"):
        patiently("prepare_data", never)
    assert len(slept) == patience.RETRIES and 1800 < sum(slept) < 7200
    assert len(set(slept)) == len(slept), "many runs would come back at once"
    told = lines(caplog)
    said = "prepare_data: /data/x: No space left on device; make room on the disk"
    assert told[0] == f"{said}; tried again in about 2 s (attempt 2 of 65)"
    assert len(told) == patience.RETRIES


def test_a_registry_that_is_away_for_a_moment_does_not_end_a_run_that_takes_its_release_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = Release(family="tiny", version="1", registration="1", uri="s3://b", models={}, run_id="r", report="x")
    away = [ServiceError("MLflow at http://mlflow: refused", transient=True)]

    def exists(release: Release) -> bool:
        if away:
            raise away.pop()
        return True

    class Cache:
        def update_for_task(self, *arguments: Any, **named: Any) -> "Cache":
            return self

        def exists(self, key: str) -> bool:
            return True

        def read(self, key: str) -> Any:
            return SimpleNamespace(result=release)

    @steps.step()
    def publish() -> Release:
        return release

    monkeypatch.setenv(HOME, str(tmp_path))
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(steps, "get_result_store", Cache)
    monkeypatch.setattr(Release, "exists", exists)
    assert steps._known(publish, {}) is release
    (told,) = lines(caplog)
    assert told.startswith("looking for tiny 1 in the registry: MLflow at http://mlflow: refused; tried again")


def test_a_state_directory_that_was_moved_has_all_that_was_made_in_it(
    prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    @steps.step()
    def make_moved(workspace: str) -> Artifact:
        """A file."""
        made.append(workspace)
        directory = steps.new_directory(workspace, "made")
        directory.mkdir()
        (directory / "w").write_text("w")
        return artifact(directory)

    @flow
    def go(home: Path) -> Artifact:
        monkeypatch.setenv(HOME, str(home))
        return steps.run(make_moved, workspace=str(home / "workspace"))

    one, two = tmp_path / "one", tmp_path / "two"
    settings = {PREFECT_API_URL: prefect_api, PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(settings | {PREFECT_LOCAL_STORAGE_PATH: tmp_path / "results"}):
        first = go(one)
        one.rename(two)
        for _ in range(2):
            again = go(two)
            assert (again.digest, Path(again.path).parent) == (first.digest, two / "workspace")
    assert len(made) == 1
