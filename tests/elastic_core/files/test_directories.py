"""Directories that appear whole or not at all."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import CheckpointError


def test_a_staged_directory_appears_when_its_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    with staged_directory(target) as staging:
        (staging / "file").write_text("x")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_failed_block_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_directory(tmp_path / "target") as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "plain").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("full", "plain"):
        with pytest.raises(CheckpointError, match="exists already"), staged_directory(tmp_path / name):
            raise AssertionError("entered")
    with staged_directory(tmp_path / "empty") as staging:
        (staging / "file").write_text("x")
    assert (tmp_path / "empty" / "file").exists()


def test_two_writers_of_one_directory_do_not_meet(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "target") as staging:
        (staging / "file").write_text("first")
        with pytest.raises(CheckpointError, match="another process"), staged_directory(tmp_path / "target"):
            raise AssertionError("entered")
    assert (tmp_path / "target" / "file").read_text() == "first"


def test_a_killed_writer_leaves_no_directory_and_the_next_one_takes_over(tmp_path: Path) -> None:
    script = """
import os, signal, sys, torch
from pathlib import Path
from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import TensorInfo, write_shards

def blocks(name):
    if name == "t3":
        os.kill(os.getpid(), signal.SIGKILL)
    yield torch.ones(1000)

with staged_directory(Path(sys.argv[1])) as staging:
    plan = {f"t{i}": TensorInfo(dtype=torch.float32, shape=(1000,)) for i in range(5)}
    write_shards(staging, plan, blocks, max_shard_bytes=5000)
"""
    target = tmp_path / "target"
    process = subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not target.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".target.lock", ".target.partial"]
    with staged_directory(target) as staging:
        assert list(staging.iterdir()) == []
        (staging / "file").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
