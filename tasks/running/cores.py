"""How many cores a process may use: by its affinity, and by the CPU quota of the container that it runs in."""

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path, PurePosixPath

# Where Linux has control groups, and where it says which ones this process is in.
GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores(groups: Path = GROUPS, own: Path = OWN) -> int:
    """The cores that this process may use. A quota of a part of a core is counted as one.

    The affinity says nothing of a quota: a container with 4 CPUs on a machine with 64 may run on all 64, and is stopped
    for most of the time if it does.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(max(1, ceil(quota)) for quota in _quotas(groups, own))])


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """CPUs, by each control group of this process that has a quota: its own groups and those around them.

    A line of `own` is `number:controllers:path`; version 2 has number 0 and no controllers. Inside a container the path
    may be the host's, of which only the root is there.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:  # another system than Linux
        return
    for number, controllers, path in (line.split(":", 2) for line in lines):
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        root, read = (groups, _quota_of_2) if number == "0" else (groups / controllers, _quota_of_1)
        inside = PurePosixPath(path.lstrip("/"))
        for place in (inside, *inside.parents):
            quota = read(root / place)
            if quota is not None:
                yield quota


def _quota_of_2(group: Path) -> float | None:
    """Of version 2: `cpu.max` holds the quota, or `max`, and the period, in microseconds."""
    quota, _, period = _read(group / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdecimal() and period else None


def _quota_of_1(group: Path) -> float | None:
    """Of version 1: a file each, the quota -1 where there is none."""
    quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # a group without this controller
        return ""
