"""Time and memory of the chunked loss beside the plain formula, forward and backward, in a fresh process each.

pytest -m benchmark tests/benchmarks/bench_losses.py [-k reduced]

Peak memory is what the loss adds to its inputs, so it holds the gradients that both forms must return. On a CPU it is
the growth of the resident set (Linux), on CUDA that of the allocator.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.losses import distillation_loss

KL_WEIGHT, CE_WEIGHT = 0.9, 0.1
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


FORMS: dict[str, Callable[..., Tensor]] = {"plain": plain, "chunked": chunked}


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
    """Seconds and bytes of one forward and backward pass, after a small one that starts threads and libraries.

    cpu_seconds, summed over threads, compares the two forms where others use the machine too.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    FORMS[form](*make_batch(8, 8, 8, device)).backward()
    batch = make_batch(tokens, hidden, vocabulary, device)
    before = memory_bytes(device, peak=False)
    start, cpu_start = time.perf_counter(), time.process_time()
    loss = FORMS[form](*batch)
    loss.backward()
    value = loss.item()
    return {
        "loss": value,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "bytes": memory_bytes(device, peak=True) - before,
    }


def measure_in_child(form: str, shape: tuple[int, int, int]) -> dict[str, float]:
    command = [sys.executable, __file__, form, *map(str, shape)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHAPES)
def test_chunked_loss_beside_the_plain_formula(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {form: measure_in_child(form, SHAPES[name]) for form in FORMS if (form, name) != ("plain", "long")}
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x{torch.get_num_threads()}"
    for form, row in rows.items():
        text = f"{commit or 'uncommitted'} | {device} | T,D,V={SHAPES[name]} | {form}: {row['seconds']:.2f} s, "
        text += f"{SHAPES[name][0] / row['seconds']:.0f} tok/s, peak {row['bytes'] / 2**20:.0f} MiB"
        if "plain" in rows:
            beside = (
                f"{row[key] / rows['plain'][key]:.3f} of plain's {key}" for key in ("seconds", "cpu_seconds", "bytes")
            )
            text += f" | {', '.join(beside)}"
        with capsys.disabled():
            sys.stdout.write(f"\n{text}")
    if "plain" in rows:
        assert rows["chunked"]["loss"] == pytest.approx(rows["plain"]["loss"], rel=1e-4)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
