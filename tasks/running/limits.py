"""What a process may use of its machine: cores and memory, by the limits of the container that it runs in too."""

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path, PurePosixPath

import psutil

# Where Linux has control groups, and where it says which ones this process is in.
GROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def cores(groups: Path = GROUPS, own: Path = OWN) -> int:
    """The cores that this process may use. A quota of a part of a core is counted as one.

    The affinity says nothing of a quota: a container with 4 CPUs on a machine with 64 may run on all 64, and is stopped
    for most of the time if it does.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *(max(1, ceil(quota)) for quota in _quotas(groups, own))])


def memory(groups: Path = GROUPS, own: Path = OWN) -> int:
    """Bytes that this process and those that it starts may take: what the machine has left, within every limit."""
    limits = (
        _read(group / ("memory.max" if is_second else "memory.limit_in_bytes"))
        for group, is_second in _groups_of("memory", groups, own)
    )
    return min([int(psutil.virtual_memory().available), *(int(limit) for limit in limits if limit.isdecimal())])


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """CPUs, by each control group that has a quota, in microseconds of a period; without one it says `max` or -1."""
    for group, is_second in _groups_of("cpu", groups, own):
        if is_second:
            quota, _, period = _read(group / "cpu.max").partition(" ")
        else:
            quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period:
            yield int(quota) / int(period)


def _groups_of(controller: str, groups: Path, own: Path) -> Iterator[tuple[Path, bool]]:
    """The control groups of this process and those around them, and whether each is of version 2.

    A line of `own` is `number:controllers:path`; version 2 has number 0 and no controllers. Inside a container the path
    may be the host's, of which only the root is there.
    """
    for line in _read(own).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controller in controllers.split(","):
            inside = PurePosixPath(path.lstrip("/"))
            for place in (inside, *inside.parents):
                yield groups / controllers / place, number == "0"


def _read(file: Path) -> str:
    """What a file says; "" where it is not there: another system, or a group without this controller."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
