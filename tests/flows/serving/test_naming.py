"""Laws of what runs are called."""

import re
from types import SimpleNamespace

import pytest
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from flows.serving.naming import called, name_after, summed_up, tag_run
from tasks.records import Artifact, Release

WHEN = r"\d{4}-\d\d-\d\d \d\d:\d\d"


def run_called(name: str, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    run = SimpleNamespace(id="r", name=name, tags=["mine"])
    context = SimpleNamespace(flow_run=run, parameters={"model": "nano-6b"})
    monkeypatch.setattr(FlowRunContext, "get", lambda: context)
    return run


def release(**models: str) -> Release:
    return Release(
        family="nano", version="0", registration="0", uri="s3://b", models=models, run_id="r", report="index.html"
    )


@pytest.mark.parametrize("made_up", ["alpha6-anfalas", "busy-otter"])
def test_a_name_that_prefect_made_up_gives_way_to_what_the_run_is_about(
    made_up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_called(made_up, monkeypatch)
    assert re.fullmatch(f"nano-6b measured {WHEN}", called(lambda given: f"{given['model']} measured")())


@pytest.mark.parametrize("chosen", ["before the holidays", "from-the-browser", "nano 2026-12-01 14:02", "Try-2"])
def test_a_name_that_a_person_chose_stays(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_called(chosen, monkeypatch)
    assert called(lambda given: "nano")() == chosen


class Server:
    """What Prefect's server was told of the run; it is away where `away`."""

    def __init__(self, away: bool = False) -> None:
        self.away, self.told = away, list[dict[str, object]]()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update_flow_run(self, identity: str, **given: object) -> None:
        if self.away:
            raise PrefectException("refused")
        self.told.append(given)


def test_a_version_takes_the_place_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run, server = run_called("nano 2026-12-01 14:02", monkeypatch), Server()
    monkeypatch.setattr("flows.serving.naming.get_client", lambda **options: server)
    tag_run("nano")
    name_after(release(l="nano-l:7", s="nano-s:7"))
    assert server.told == [
        {"name": "nano 2026-12-01 14:02", "tags": ["mine", "nano"]},
        {"name": "nano 2026-12-01 v7", "tags": ["mine", "nano", "v7"]},
    ]
    assert run.name == "nano 2026-12-01 v7"


def test_a_run_does_not_end_for_want_of_a_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_called("nano 2026-12-01 14:02", monkeypatch)
    monkeypatch.setattr("flows.serving.naming.get_client", lambda **options: Server(away=True))
    name_after(release(l="nano-l:7"))
    assert caplog.messages == ["Prefect does not take the name nano 2026-12-01 v7: refused"]


def test_sizes_that_were_not_always_registered_together_are_all_told() -> None:
    assert release(l="nano-l:7", s="nano-s:7").number == "v7"
    assert release(l="nano-l:7", s="nano-s:2").number == "v7/2"


def test_the_result_of_a_run_is_its_own_and_the_line_is_the_pages() -> None:
    state = summed_up((1, 2), "nano v7 is champion")
    assert state.message == "nano v7 is champion" and state.data == (1, 2)


def test_an_artifact_is_called_by_its_directory_without_the_key() -> None:
    def name(path: str) -> str:
        return Artifact(path=path, digest="", files={}).name

    assert name("/w/slice-6b-0a1b2c3d") == "slice-6b" and name("/models/nano-12b") == "nano-12b"
    assert name("/w/stage2-0a1b2c3d4e5f6a7b/family") == "stage2"
