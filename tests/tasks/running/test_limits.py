"""Laws of the cores and the memory that a process may use, on file systems as Linux shows them in containers."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks.running import limits as module
from tasks.running.limits import cores, memory

ALLOWED, LEFT = 64, 10**12
V1 = "12:cpuset:/job\n4:cpu,cpuacct:/docker/abc\n"


def fake(directory: Path, own: str | None, files: Mapping[str, str]) -> tuple[Path, Path]:
    """Control groups with these files, and the file that says which of them are this process's."""
    for name, text in files.items():
        (directory / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup" / name).write_text(text)
    if own is not None:
        (directory / "own").write_text(own)
    return directory / "cgroup", directory / "own"


@pytest.fixture(autouse=True)
def sixty_four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: set(range(ALLOWED)))


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        pytest.param("0::/\n", {"cpu.max": "400000 100000\n"}, 4, id="container"),
        pytest.param("0::/\n", {"cpu.max": "250000 100000\n"}, 3, id="part of a core"),
        pytest.param("0::/\n", {"cpu.max": "10000 100000\n"}, 1, id="less than a core"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, ALLOWED, id="no quota"),
        pytest.param("0::/\n", {"cpu.max": "9900000 100000\n"}, ALLOWED, id="above the affinity"),
        pytest.param(
            "0::/slurm/job/step\n",
            {
                "slurm/job/cpu.max": "800000 100000",
                "slurm/job/step/cpu.max": "max 100000",
                "slurm/cpu.max": "max",
            },
            8,
            id="the job around a step",
        ),
        pytest.param(
            V1,
            {"cpu,cpuacct/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            2,
            id="version 1, the path of the host",
        ),
        pytest.param(
            V1,
            {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "-1", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000"},
            ALLOWED,
            id="version 1, no quota",
        ),
        pytest.param(f"{V1}0::/docker/abc\n", {}, ALLOWED, id="both, of which nothing is to be seen"),
        pytest.param(None, {}, ALLOWED, id="no control groups"),
    ],
)
def test_cores_are_those_of_the_affinity_within_every_quota(
    own: str | None, files: Mapping[str, str], expected: int, tmp_path: Path
) -> None:
    assert cores(*fake(tmp_path, own, files)) == expected


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        pytest.param("0::/\n", {"memory.max": "4000\n"}, 4000, id="container"),
        pytest.param("0::/\n", {"memory.max": "max\n"}, LEFT, id="no limit"),
        pytest.param("0::/a/b\n", {"a/memory.max": "4000", "a/b/memory.max": "max"}, 4000, id="the group around it"),
        pytest.param("9:memory:/docker/abc\n", {"memory/memory.limit_in_bytes": "3000\n"}, 3000, id="version 1"),
        pytest.param("9:memory:/\n", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}"}, LEFT, id="version 1, none"),
        pytest.param(None, {}, LEFT, id="no control groups"),
    ],
)
def test_memory_is_what_is_left_within_every_limit(
    own: str | None, files: Mapping[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=LEFT))
    assert memory(*fake(tmp_path, own, files)) == expected


def test_a_process_has_no_more_than_the_machine() -> None:
    assert 1 <= cores() <= max(ALLOWED, os.cpu_count() or 1)
