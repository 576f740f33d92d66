"""Time and memory of the chunked loss beside the plain formula and Liger-Kernel's, in a fresh process for every run.

pytest -m benchmark -s tests/benchmarks/bench_losses.py [-k reduced]

Peak memory is what the loss adds to its inputs, so it holds the gradients that every form must return. On a CPU it is
the growth of the resident set (Linux), on CUDA that of the allocator. Liger-Kernel takes part where OPTIONAL_PACKAGES
names a directory that holds it and Triton.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench import OPTIONAL_PACKAGES, RUNS, record
from torch import Tensor

from elastic_core.training.losses import distillation_loss

KL_WEIGHT, CE_WEIGHT = 0.9, 0.1
SAME_LOSS = 1e-4  # float32 sums of 131072 terms in another order
# tokens, hidden, vocabulary: quick; the target of contract C5; a long-context batch that the plain formula cannot hold.
SHAPES = {"reduced": (2048, 256, 32_768), "full": (4096, 1024, 131_072), "long": (49_152, 1024, 131_072)}


def plain(hidden_TD: Tensor, head_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, targets_T: Tensor) -> Tensor:
    with torch.no_grad():
        teacher_TV = F.log_softmax((teacher_TD @ teacher_VD.t()).float(), -1)
    student_TV = (hidden_TD @ head_VD.t()).float()
    kl = F.kl_div(F.log_softmax(student_TV, -1), teacher_TV, reduction="batchmean", log_target=True)
    return KL_WEIGHT * kl + CE_WEIGHT * F.cross_entropy(student_TV, targets_T)


def chunked(*batch: Tensor) -> Tensor:
    return distillation_loss(*batch, kl_weight=KL_WEIGHT, ce_weight=CE_WEIGHT).total


def liger(hidden_TD: Tensor, head_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, targets_T: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_soft_loss=KL_WEIGHT, weight_hard_loss=CE_WEIGHT, beta=0.0, compiled=torch.cuda.is_available()
    )
    return loss(hidden_TD, head_VD, teacher_TD, teacher_VD, targets_T)


FORMS: dict[str, Callable[..., Tensor]] = {"plain": plain, "chunked": chunked, "liger": liger}


def resident_bytes(field: str) -> int:
    """VmRSS, the resident set now, or VmHWM, its peak; ru_maxrss would start at the parent's peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory_bytes(device: str, *, peak: bool) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return resident_bytes("VmHWM" if peak else "VmRSS")


def make_batch(tokens: int, hidden: int, vocabulary: int, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, hidden, generator=generator, device=device, dtype=dtype).div_(hidden**0.25)

    student = normal(tokens).requires_grad_(), normal(vocabulary).requires_grad_()
    targets_T = torch.randint(vocabulary, (tokens,), generator=generator, device=device)
    return (*student, normal(tokens), normal(vocabulary), targets_T)


def measure(form: str, tokens: int, hidden: int, vocabulary: int) -> dict[str, float]:
    """Seconds and bytes of one forward and backward pass, after a small one that starts threads and libraries."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    FORMS[form](*make_batch(8, 8, 8, device)).backward()
    batch = make_batch(tokens, hidden, vocabulary, device)
    before = memory_bytes(device, peak=False)
    start = time.perf_counter()
    loss = FORMS[form](*batch)
    loss.backward()
    value = loss.item()
    return {
        "loss": value,
        "seconds": time.perf_counter() - start,
        "bytes": memory_bytes(device, peak=True) - before,
        "process_bytes": memory_bytes(device, peak=True),
    }


def measure_in_child(form: str, shape: tuple[int, int, int]) -> dict[str, float]:
    command = [sys.executable, __file__, form, *map(str, shape)]
    path = os.pathsep.join(p for p in (*sys.path, os.environ.get(OPTIONAL_PACKAGES) if form == "liger" else None) if p)
    environment = {**os.environ, "PYTHONPATH": path}
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def medians(forms: list[str], shape: tuple[int, int, int], runs: int = RUNS) -> dict[str, dict[str, float]]:
    rows = [{form: measure_in_child(form, shape) for form in forms} for _ in range(runs)]
    return {form: {key: statistics.median(row[form][key] for row in rows) for key in rows[0][form]} for form in forms}


@pytest.mark.benchmark
@pytest.mark.parametrize("name", ["reduced", "full"])
def test_chunked_loss_beside_the_plain_formula(name: str) -> None:
    has_liger = (Path(os.environ.get(OPTIONAL_PACKAGES, "")) / "liger_kernel").is_dir()
    forms = ["chunked", "plain", *(["liger"] if has_liger else [])]
    found = medians(forms, SHAPES[name])
    shape = "{} tokens, hidden {}, vocabulary {}".format(*SHAPES[name])
    for other in forms[1:]:
        title = {"plain": "plain formula", "liger": "Liger-Kernel chunked JSD, beta 0, not compiled"}[other]
        assert found["chunked"]["loss"] == pytest.approx(found[other]["loss"], rel=SAME_LOSS)
        record(
            benchmark="distillation loss, time",
            shape=shape,
            unit="s",
            ours=found["chunked"]["seconds"],
            theirs=found[other]["seconds"],
            alternative=title,
            target="at most 1.1",
        )
        record(
            benchmark="distillation loss, memory",
            shape=shape,
            unit="GiB",
            ours=found["chunked"]["bytes"] / 2**30,
            theirs=found[other]["bytes"] / 2**30,
            alternative=title,
            target="at most 0.125",
        )


@pytest.mark.benchmark
def test_chunked_loss_at_long_context() -> None:
    tokens, _, vocabulary = SHAPES["long"]
    found = measure_in_child("chunked", SHAPES["long"])
    record(
        benchmark="distillation loss, resident memory of the process",
        shape="{} tokens, hidden {}, vocabulary {}".format(*SHAPES["long"]),
        unit="GiB",
        ours=found["process_bytes"] / 2**30,
        theirs=tokens * vocabulary * 4 / 2**30,
        alternative="one float32 tensor of the plain formula's logits",
        target="under 8 GiB",
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
