"""Runs whose Hub is busy, away or switched off: waited for with a line, and not asked for what is here."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hub import serving_hub
from micro import Command, Run, completed
from progress import steps_in

pytestmark = pytest.mark.services

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MADE = {"fetch teacher", "prepare data", "rotate teacher", "rank importance", "reorder teacher"}
MADE |= {"choose shapes", "compare orders", "distil stage1", "slice s", "evaluate"}


def with_hub(command: Command, url: str, tmp_path: Path, variables: Mapping[str, str]) -> Command:
    return replace(
        command,
        extra={
            **command.extra,
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **variables,
        },
    )


@pytest.mark.slow
def test_a_family_of_a_teacher_on_the_hub_is_made_once_and_made_again_without_the_hub(
    finished: Run, command: Command, tmp_path: Path
) -> None:
    checkpoint = finished.directory("pretrain") / "checkpoint"
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    recipe = ("family=hubbed", "teacher={path: org/name}")
    with serving_hub(files, COMMIT) as hub:
        hub.first = [503]
        made = completed(with_hub(command, hub.url, tmp_path, {}), *recipe)
    assert re.search(r"^teacher org/name: .*the Hub does not answer .*; tried again in about 2 s", made.stderr, re.M)
    (teacher,) = (path for path in made.directories if path.name.startswith("teacher-"))
    assert not any(path.is_symlink() for path in teacher.iterdir())

    again = completed(with_hub(command, hub.url, tmp_path, {"HF_HUB_OFFLINE": "1"}), *recipe)
    assert "the Hub is not asked (HF_HUB_OFFLINE is set" in again.stderr
    assert {title for title, cached in steps_in(again.stderr) if cached} >= MADE, again.stderr
