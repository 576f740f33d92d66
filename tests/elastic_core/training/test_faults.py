"""Laws of what a failing process leaves: its exception in one line, and whether another start may help."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from elastic_core.training.faults import LAUNCHER, Fault, describe, forget_faults, report_fault, reported_fault

NCCL = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, invalid usage (run with NCCL_DEBUG=WARN)
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"""
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:48431"


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ValueError("lower the rate"), Fault(kind="own", message="lower the rate", checked=True)),
        (FloatingPointError("loss is NaN"), Fault(kind="own", message="loss is NaN", checked=True)),
        (ImportError("No module named 'x'"), Fault(kind="own", message="ImportError: No module named 'x'")),
        (AssertionError(), Fault(kind="own", message="AssertionError")),
        (MemoryError(), Fault(kind="memory", message="MemoryError")),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            Fault(kind="memory", message="OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."),
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            Fault(kind="own", message="OSError: [Errno 28] No space left on device", errno=errno.ENOSPC),
        ),
        (dist.DistBackendError(NCCL), Fault(kind="collective", message=f"DistBackendError: {' '.join(NCCL.split())}")),
        (RuntimeError(GLOO), Fault(kind="collective", message=f"RuntimeError: {GLOO}")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_exception_is_one_line_with_what_it_says_last(error: Exception, fault: Fault) -> None:
    assert describe(error) == fault


def test_the_fault_of_one_process_is_told_and_not_that_the_others_lost_it(tmp_path: Path) -> None:
    assert reported_fault(tmp_path) is None
    report_fault(tmp_path, 0, RuntimeError(GLOO))
    assert reported_fault(tmp_path) == describe(RuntimeError(GLOO))
    report_fault(tmp_path, 3, ValueError("lower the rate"))
    report_fault(tmp_path, 5, RuntimeError(GLOO))
    assert reported_fault(tmp_path) == describe(ValueError("lower the rate"))
    forget_faults(tmp_path)
    assert reported_fault(tmp_path) is None and not list(tmp_path.iterdir())


WAITING = """
import sys, time
from elastic_core.training import job
job.build = lambda *_: time.sleep(600)
job.main(sys.argv[1:])
"""


def test_a_process_whose_launcher_is_gone_before_it_began_ends_at_once(tmp_path):
    """It would otherwise wait for its peers, which died with the launcher, as nobody's process."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "job.json").write_text("{}")
    environment = {**os.environ, LAUNCHER: str(gone.pid)}
    command = [sys.executable, "-c", WAITING, str(tmp_path / "job.json")]
    assert subprocess.run(command, env=environment, timeout=300).returncode == 1
