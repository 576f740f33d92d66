"""Rows of benchmarks: printed as they are measured, and kept for the table that `make bench` writes.

A benchmark measures ours and a named alternative in the same run, interleaved, and records the medians.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tasks.reporting.numbers import counted

ROWS = "BENCH_ROWS"  # the file that rows are appended to, one JSON object a line
OPTIONAL_PACKAGES = "OPTIONAL_PACKAGES"  # a directory of packages that only some measurements may see
RUNS = 5
BOUND = "1 is the bound"  # the target of a row whose alternative is a part of ours, and not another's


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. `ratio` is ours / theirs in `unit`; `target` says in words what it should be."""

    benchmark: str
    shape: str
    unit: str
    ours: float
    theirs: float
    alternative: str
    target: str
    commit: str
    device: str

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def interleaved(forms: Mapping[str, Callable[[], object]], runs: int = RUNS) -> dict[str, float]:
    """Median seconds of each form, over runs that alternate between them after one warm-up each."""
    for form in forms.values():
        form()
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(runs):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def record(*, benchmark: str, shape: str, unit: str, ours: float, theirs: float, alternative: str, target: str) -> Row:
    """Print a row past pytest's capture, and append it to the file named by BENCH_ROWS if there is one."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    processor = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    row = Row(
        benchmark=benchmark,
        shape=shape,
        unit=unit,
        ours=ours,
        theirs=theirs,
        alternative=alternative,
        target=target,
        commit=commit or "uncommitted",
        device=device,
    )
    text = f"{row.commit} | {row.device} | {benchmark} | {shape} | ours {ours:.4g} {unit} | "
    text += f"{alternative} {theirs:.4g} {unit} | ratio {row.ratio:.3f} ({target})"
    sys.__stdout__.write(f"\n{text}\n")
    if path := os.environ.get(ROWS):
        with Path(path).open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
    return row
