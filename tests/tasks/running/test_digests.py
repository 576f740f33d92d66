"""Laws of digests: whatever is not as it was recorded is named, and nothing is hashed twice that has not changed."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.corpus.sources import checkpoint_files, teacher_identity
from tasks.records import StageRecord
from tasks.running import digests
from tasks.running.digests import artifact, damage, file_digest, set_aside
from tasks.running.workspace import at_hand
from tasks.settings import HOME, ServiceError
from tasks.teacher import teacher_name


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    (home / "workspace").mkdir(parents=True)
    monkeypatch.setenv(HOME, str(home))
    return home


def made(directory: Path) -> Path:
    """A directory that a step might have written, long ago."""
    (directory / "below").mkdir(parents=True)
    for name, content in (("model.safetensors", b"weights" * 100), ("tokenizer.json", b"{}"), ("below/x", b"x")):
        (directory / name).write_bytes(content)
        os.utime(directory / name, (1e9, 1e9))
    return directory


def flip(directory: Path) -> None:
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[50] ^= 1
    (directory / "model.safetensors").write_bytes(content)


def flip_in_secret(directory: Path) -> None:
    flip(directory)
    os.utime(directory / "model.safetensors", (1e9, 1e9))


def tear(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 100)


def lose(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def add(directory: Path) -> None:
    (directory / "below/y").touch()


def swap(directory: Path) -> None:
    (directory / "other").write_bytes(b"others!" * 100)
    (directory / "other").replace(directory / "model.safetensors")


def vanish(directory: Path) -> None:
    directory.rename(directory.with_name("elsewhere"))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (flip, r"model.safetensors is damaged: its SHA-256 is \w{12}, and \w{12} on record"),
    "a flipped bit, at the old time": (flip_in_secret, r"model.safetensors is damaged"),
    "a torn file": (tear, r"model.safetensors is damaged"),
    "a file of the same size in its place": (swap, r"model.safetensors is damaged"),
    "a missing file": (lose, r"tokenizer.json is gone"),
    "a file more": (add, r"below/y was not there when slice-s was recorded"),
    "no directory": (vanish, r"slice-s is gone"),
}


def check_inputs(value: object) -> None:
    with at_hand({"input": value}):
        pass


@pytest.mark.parametrize(("fault", "says"), FAULTS.values(), ids=FAULTS)
def test_what_is_not_as_it_was_recorded_is_named(fault, says, home):
    record = artifact(made(home / "workspace/slice-s"))
    assert damage(record) == ""
    check_inputs({"slices": {"s": record}, "stages": [record]})
    fault(Path(record.path))
    with pytest.raises(ServiceError, match=f"{says}.*; run again, it is made again"):
        check_inputs({"slices": {"s": record}})


def test_what_the_user_gave_is_not_made_again(home, tmp_path):
    record = artifact(made(tmp_path / "teacher"))
    flip(tmp_path / "teacher")
    with pytest.raises(
        ServiceError, match=r"teacher/model.safetensors is damaged.*; put it back, or touch a file of it"
    ):
        check_inputs({"teacher": record})


def test_a_family_names_the_directory_of_its_teacher_and_not_where_that_lies(tmp_path, monkeypatch):
    """The name is part of what a family is: wherever its teacher lies, the same bytes make the same family."""
    made(tmp_path / "teachers/nano")
    monkeypatch.chdir(tmp_path)
    assert teacher_name("teachers/nano") == teacher_name(str(tmp_path / "teachers/nano/")) == "nano"
    assert teacher_name("nvidia/nano") == "nvidia/nano" and teacher_name("s3://b/nano") == "s3://b/nano"


def test_a_clone_of_the_users_is_its_checkpoint_whatever_git_does_beside_it(home, tmp_path):
    teacher = made(tmp_path / "teacher")
    (teacher / ".git").mkdir()
    (teacher / ".git/index").write_bytes(b"1")
    record, identity = artifact(teacher, checkpoint_files(teacher)), teacher_identity(str(teacher))
    assert sorted(record.files) == ["model.safetensors", "tokenizer.json"]
    (teacher / ".git/index").write_bytes(b"22")
    (teacher / ".DS_Store").touch()
    assert damage(record) == "" and teacher_identity(str(teacher)) == identity
    (teacher / "tokenizer.json").write_bytes(b"{ }")
    assert "tokenizer.json is damaged" in damage(record) and teacher_identity(str(teacher)) != identity
    (teacher / "tokenizer.json").unlink()
    assert "tokenizer.json is gone" in damage(record)


def test_a_stage_is_its_family_and_its_metrics(home):
    family = artifact(made(home / "workspace/stage1-x/family"))
    metrics = home / "workspace/stage1-x/metrics.jsonl"
    metrics.write_text('{"step": 0}\n')
    stage = StageRecord(family=family, metrics=str(metrics), metrics_sha256=file_digest(metrics))
    assert damage(stage) == ""
    metrics.write_text('{"step": 1}\n')
    with pytest.raises(
        ServiceError, match=r"metrics.jsonl is damaged.*; put it back, or remove .*stage1-x and run again"
    ):
        check_inputs(stage)
    lose(Path(family.path))
    with pytest.raises(ServiceError, match=r"tokenizer.json is gone; run again, it is made again"):
        check_inputs([stage])


def test_a_file_is_hashed_once_in_each_state_that_it_is_in(home, monkeypatch):
    hashed: list[str] = []

    def sha256(path: Path) -> str:
        hashed.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(digests, "_sha256", sha256)
    monkeypatch.setattr(digests, "SETTLED_NS", -(10**18))  # the time of a change cannot be set back
    record = artifact(made(home / "workspace/slice-s"))
    assert sorted(hashed) == ["model.safetensors", "tokenizer.json", "x"]
    assert damage(record) == "" and artifact(Path(record.path)) == record
    assert len(hashed) == 3
    (Path(record.path) / "tokenizer.json").write_bytes(b"[]")
    assert "tokenizer.json" in damage(record) and hashed[3:] == ["tokenizer.json"]


def test_a_file_that_may_still_be_written_to_is_hashed_again(home):
    record = artifact(made(home / "workspace/slice-s"))
    notes = list((home / "hashed").glob("*"))
    assert not notes, "the files changed less than two seconds ago"
    assert damage(record) == ""


def test_notes_that_are_torn_are_none(home, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", -(10**18))
    record = artifact(made(home / "workspace/slice-s"))
    (note,) = (home / "hashed").iterdir()
    os.truncate(note, 20)
    assert damage(record) == ""


def test_a_damaged_artifact_is_set_aside_and_kept(home):
    record = artifact(made(home / "workspace/slice-s"))
    set_aside(record)
    assert not Path(record.path).exists()
    (kept,) = (home / "workspace").glob("slice-s.damaged-*")
    assert (kept / "model.safetensors").exists()


def test_what_another_run_sets_aside_at_the_same_time_is_gone(home, monkeypatch):
    record = artifact(made(home / "workspace/slice-s"))
    load = digests._load

    def overtaken(directory: Path) -> dict[str, digests.Known]:
        """The files are listed by now, and not yet looked at."""
        directory.rename(directory.with_name("elsewhere"))
        return load(directory)

    monkeypatch.setattr(digests, "_load", overtaken)
    assert damage(record) == f"{record.path} is gone"
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # as it was a moment ago
    set_aside(record)
    assert (home / "workspace/elsewhere/model.safetensors").exists()
