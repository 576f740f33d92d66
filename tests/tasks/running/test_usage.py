"""Laws of the workspace: what a run, a candidate or a champion needs stays, and everything else may go."""

import os
import time
from pathlib import Path

import pytest

from elastic_core.files.locks import held
from tasks.records import Artifact, Release, StageRecord
from tasks.running.digests import artifact, is_of_the_user
from tasks.running.usage import RESULTS, WORKSPACE, note, noting, superseded, uses, written_by_open_runs
from tasks.settings import HOME

LONG_AGO = 1_000_000.0
NOW = time.time() + 3600.0  # as if all that the test writes were old


def make(home: Path, name: str, size: int = 10) -> Artifact:
    directory = home / WORKSPACE / name
    directory.mkdir(parents=True)
    (directory / "x").write_bytes(bytes(size))
    return Artifact(path=str(directory), digest=name, files={})


def stage(home: Path, name: str) -> StageRecord:
    family = make(home, f"{name}/family")
    metrics = home / WORKSPACE / name / "metrics.jsonl"
    metrics.write_text("{}\n")
    return StageRecord(family=family, metrics=str(metrics), metrics_sha256="")


def release(home: Path, registration: str) -> Release:
    report = Path(make(home, f"report-{registration}").path) / "index.html"
    return Release(
        family="nano",
        version="1",
        registration=registration,
        uri="s3://b",
        models={},
        run_id="r",
        report=str(report),
    )


def carried_out(home: Path, number: int, family: str = "nano") -> None:
    """A run to its end, with a corpus, a stage and a release of its own, and a result of each."""
    with noting(home, family):
        for name, record in {
            "corpus": make(home, f"corpus-{number}"),
            "stage": stage(home, f"stage-{number}"),
            "slices": {"m": make(home, f"slice-{number}")},
            "release": release(home, f"r{number}"),
            "evaluation": 1.5,
        }.items():
            (home / RESULTS).mkdir(parents=True, exist_ok=True)
            (home / RESULTS / f"{name}{number}").write_text("{}")
            note(f"{name}{number}", record)


def old(home: Path) -> None:
    for path in home.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))


def named(paths: tuple[Path, ...]) -> set[str]:
    return {path.name for path in paths}


def everything(number: int) -> set[str]:
    return {f"corpus-{number}", f"stage-{number}", f"slice-{number}", f"report-r{number}"}


def test_what_a_later_run_of_the_family_does_not_use_is_superseded(tmp_path: Path) -> None:
    carried_out(tmp_path, 1)
    carried_out(tmp_path, 2)
    found = superseded(tmp_path, (), NOW)
    assert named(found.entries) == everything(1)
    assert named(found.results) == {f"{name}1" for name in ("corpus", "stage", "slices", "release", "evaluation")}
    assert [use.file for use in uses(tmp_path)[:1]] == [*found.lists]


def test_what_was_used_lately_is_not(tmp_path: Path) -> None:
    carried_out(tmp_path, 1)
    carried_out(tmp_path, 2)
    found = superseded(tmp_path, (), time.time() - 3600.0)
    assert not (found.entries or found.results or found.lists)


def test_using_a_result_again_makes_it_young(tmp_path: Path) -> None:
    carried_out(tmp_path, 1)
    old(tmp_path)
    corpus = Artifact(path=str(tmp_path / WORKSPACE / "corpus-1"), digest="", files={})
    with noting(tmp_path):  # of no family: it needs nothing when it has ended
        note("corpus1", corpus)
    carried_out(tmp_path, 2)
    assert named(superseded(tmp_path, (), LONG_AGO + 1).entries) == everything(1) - {"corpus-1"}


def test_a_candidate_and_a_champion_and_another_family_keep_what_they_used(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        carried_out(tmp_path, number)
    carried_out(tmp_path, 4, family="other")
    assert named(superseded(tmp_path, {"r1"}, NOW).entries) == everything(2)
    assert named(superseded(tmp_path, {"r1", "r2"}, NOW).entries) == set()


def test_an_interrupted_run_keeps_what_it_used_and_began_and_the_last_whole_run_too(tmp_path: Path) -> None:
    carried_out(tmp_path, 1)
    carried_out(tmp_path, 2)
    old(tmp_path)
    with pytest.raises(KeyboardInterrupt), noting(tmp_path, "nano"):
        note("corpus3", make(tmp_path, "corpus-3"))
        make(tmp_path, "stage-3")  # it was training: no step had recorded this
        raise KeyboardInterrupt
    assert named(superseded(tmp_path, (), NOW).entries) == everything(1)
    assert named(superseded(tmp_path, (), NOW, max_bytes=0).entries) == everything(1)


def interrupted(home: Path, number: int, family: str = "nano") -> None:
    """A run that ends before its end, with a corpus of its own and a stage that it had not recorded yet."""
    with pytest.raises(KeyboardInterrupt), noting(home, family):
        note(f"corpus{number}", make(home, f"corpus-{number}"))
        make(home, f"stage-{number}")
        raise KeyboardInterrupt


def test_every_interrupted_run_since_the_last_whole_one_keeps_what_it_used_and_began(tmp_path: Path) -> None:
    interrupted(tmp_path, 1)
    carried_out(tmp_path, 2)
    old(tmp_path)
    interrupted(tmp_path, 3)
    interrupted(tmp_path, 4)
    interrupted(tmp_path, 5, family="other")
    assert named(superseded(tmp_path, (), NOW, max_bytes=0).entries) == {"corpus-1", "stage-1"}
    carried_out(tmp_path, 6)  # the recipe that the user chose; what was tried before it is given up
    begun = named(superseded(tmp_path, (), NOW, max_bytes=0).entries)
    assert begun == {"corpus-1", "stage-1", *everything(2), "corpus-3", "stage-3", "corpus-4", "stage-4"}


def test_a_run_in_progress_keeps_what_is_made_beside_it(tmp_path: Path) -> None:
    carried_out(tmp_path, 1)
    carried_out(tmp_path, 2)
    old(tmp_path)
    with noting(tmp_path):
        make(tmp_path, "stage-on-a-worker")
        assert named(superseded(tmp_path, (), NOW).entries) == everything(1)
    assert named(superseded(tmp_path, (), NOW).entries) == {*everything(1), "stage-on-a-worker"}


def test_a_list_that_a_kill_tore_says_what_it_can(tmp_path: Path) -> None:
    carried_out(tmp_path, 1)
    (use,) = uses(tmp_path)
    *lines, last = use.file.read_text().splitlines(keepends=True)
    use.file.write_text("".join(lines) + last[:9])
    (torn,) = uses(tmp_path)
    assert torn.paths == use.paths and not torn.finished and torn.open


def test_a_run_is_in_progress_while_its_process_holds_the_list(tmp_path: Path) -> None:
    carried_out(tmp_path, 1)
    (use,) = uses(tmp_path)
    assert not use.running
    with held(use.file.with_suffix(".lock")):
        assert uses(tmp_path)[0].running


def test_a_run_that_was_interrupted_has_written_what_it_lists_and_what_it_began(tmp_path: Path) -> None:
    with noting(tmp_path, "other"):
        note("corpus", make(tmp_path, "corpus-0", size=1))
    corpus = make(tmp_path, "corpus-1", size=20)
    old(tmp_path / WORKSPACE)
    assert written_by_open_runs(tmp_path, "nano") == 0
    with pytest.raises(KeyboardInterrupt), noting(tmp_path, "nano"):
        note("corpus", corpus)
        make(tmp_path, "stage-1/checkpoints", size=300)
        raise KeyboardInterrupt
    assert written_by_open_runs(tmp_path, "nano") == 320
    with noting(tmp_path, "other"):
        note("stage", make(tmp_path, "stage-2", size=5000))
    assert written_by_open_runs(tmp_path, "nano") == 320, "and not what another family has written since"
    assert written_by_open_runs(tmp_path, "other") == 0, "it came to its end"
    with noting(tmp_path, "nano"):
        note("corpus", corpus)
    assert written_by_open_runs(tmp_path, "nano") == 0


def test_by_size_the_least_recently_used_goes_first_and_only_what_is_superseded(tmp_path: Path) -> None:
    carried_out(tmp_path, 1)
    needed = sum(file.stat().st_size for file in (tmp_path / WORKSPACE).rglob("*") if file.is_file())
    for age, name in enumerate(["youngest", "middle", "oldest"]):
        path = Path(make(tmp_path, name, size=1000).path)
        for one in (path / "x", path):
            os.utime(one, (NOW - 7200 - age, NOW - 7200 - age))

    def found(max_bytes: int) -> list[str]:
        return [path.name for path in superseded(tmp_path, (), LONG_AGO, max_bytes).entries]

    assert found(needed + 3000) == []
    assert found(needed + 2999) == ["oldest"]
    assert found(needed + 1000) == ["oldest", "middle"]
    assert found(0) == ["oldest", "middle", "youngest"]


def test_where_no_run_has_left_a_list_nothing_is_superseded(tmp_path: Path) -> None:
    make(tmp_path, "corpus-1")
    found = superseded(tmp_path, (), NOW, max_bytes=0)
    assert not (found.entries or found.results or found.lists)


def test_what_lies_outside_the_workspace_is_never_found(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    with noting(tmp_path / "home", "nano"):
        note("teacher", Artifact(path=str(mine), digest="", files={}))
        note("gone", Artifact(path=str(tmp_path / "gone"), digest="", files={}))
    assert not superseded(tmp_path / "home", (), NOW, max_bytes=0).entries


def test_a_state_directory_that_was_moved_or_has_two_names_keeps_what_its_runs_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, real, moved = (tmp_path / name for name in ("link", "real", "moved"))
    real.mkdir()
    link.symlink_to(real)
    monkeypatch.setenv(HOME, str(link))
    with noting(link, "nano"):
        directory = link / "workspace/stage1-abc"
        directory.mkdir(parents=True)
        (directory / "x").touch()
        made = artifact(directory)
        note("key", made)
    for path in real.rglob("*"):
        os.utime(path, (1e6, 1e6))
    later = time.time() + 3600
    for home in (link, real):
        monkeypatch.setenv(HOME, str(home))
        assert not superseded(home, set(), later).entries and not is_of_the_user(made)
    real.rename(moved)
    monkeypatch.setenv(HOME, str(moved))
    assert not superseded(moved, set(), later).entries
