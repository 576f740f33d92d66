"""Laws of steps beside a real Prefect server: faults that pass are waited out and said, all others end the step."""

import errno
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from flows.serving.servers import PrefectServer, free_ports
from tasks.running import patience, steps
from tasks.running.patience import patiently
from tasks.settings import ServiceError


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    home = tmp_path_factory.mktemp("prefect")
    server = PrefectServer(home / "prefect", home / "logs", free_ports(1)[0])
    server.start()
    try:
        server.wait()
        with temporary_settings({PREFECT_API_URL: f"{server.url}/api", PREFECT_LOGGING_TO_API_ENABLED: False}):
            yield
    finally:
        server.stop()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tasks.running.patience"]


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_step_that_is_wrong_is_tried_once(prefect_server: None, caplog: pytest.LogCaptureFixture) -> None:
    attempts = []

    @steps.step(cached=False)
    def fetch() -> None:
        attempts.append(1)
        raise ValueError("the recipe is wrong")

    with pytest.raises(ValueError, match="the recipe is wrong"):
        steps.run(fetch)
    assert len(attempts) == 1 and not lines(caplog)


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
