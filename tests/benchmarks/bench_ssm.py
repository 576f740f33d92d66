"""Time of the plain scan beside transformers' PyTorch fallback, and memory kept for the backward pass.

pytest -m benchmark tests/benchmarks/bench_ssm.py [-k tiny]

A row gives the medians of interleaved runs, forward and backward, at one shape and chunk size.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from elastic_core.ssm import ssd_scan

RUNS = 3
# B, T, H, P, G, N: the tiny recipe's training step; one sequence at the width of small models, of a slice, of Nano 12B.
SHAPES = {
    "tiny": (16, 128, 8, 32, 2, 32),
    "16-heads": (1, 2048, 16, 64, 8, 128),
    "64-heads": (1, 2048, 64, 64, 8, 128),
    "128-heads": (1, 2048, 128, 64, 8, 128),
}


def stock_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *, chunk_size: int) -> Tensor:
    return mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D=D)


def plain_scan(*inputs: Tensor, chunk_size: int) -> Tensor:
    return ssd_scan(*inputs, chunk_size=chunk_size)[0]


def make_inputs(batch: int, tokens: int, heads: int, head_dim: int, groups: int, state: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = [
        normal(batch, tokens, heads, head_dim),
        F.softplus(normal(batch, tokens, heads) - 2),
        -normal(heads).exp(),
        normal(batch, tokens, groups, state) / state**0.5,
        normal(batch, tokens, groups, state),
        normal(heads),
    ]
    return [t.requires_grad_() for t in inputs]


def seconds(scan: Callable[..., Tensor], inputs: list[Tensor], chunk_size: int) -> float:
    start = time.perf_counter()
    y_BTHP = scan(*inputs, chunk_size=chunk_size)
    torch.autograd.grad(y_BTHP.sum(), inputs)
    return time.perf_counter() - start


def saved_bytes(scan: Callable[..., Tensor], inputs: list[Tensor], chunk_size: int) -> int:
    """Bytes that autograd keeps from the forward pass for the backward pass, besides the inputs."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y_BTHP = scan(*inputs, chunk_size=chunk_size)
    del y_BTHP
    return sum(kept.values()) - sum(kept.get(t.untyped_storage().data_ptr(), 0) for t in inputs)


@pytest.mark.benchmark
@pytest.mark.parametrize("chunk_size", [64, 128])
@pytest.mark.parametrize("name", SHAPES)
def test_plain_scan_beside_transformers(name: str, chunk_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = make_inputs(*SHAPES[name])
    scans = {"ours": plain_scan, "transformers": stock_scan}
    megabytes = {form: saved_bytes(scan, inputs, chunk_size) / 2**20 for form, scan in scans.items()}
    runs = [{form: seconds(scan, inputs, chunk_size) for form, scan in scans.items()} for _ in range(RUNS)]
    medians = {form: statistics.median(run[form] for run in runs) for form in scans}

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    tokens = SHAPES[name][0] * SHAPES[name][1]
    forms = (f"{form} {medians[form]:.3f} s, {megabytes[form]:.0f} MiB saved" for form in scans)
    text = f"{commit} | cpu x{torch.get_num_threads()} | B,T,H,P,G,N={SHAPES[name]}, chunk {chunk_size} | "
    text += (
        f"{' | '.join(forms)} | {medians['transformers'] / medians['ours']:.1f} x, {tokens / medians['ours']:.0f} tok/s"
    )
    with capsys.disabled():
        sys.stdout.write(f"\n{text}")
    y_BTHP, expected_BTHP = (scan(*inputs, chunk_size=chunk_size) for scan in scans.values())
    assert (y_BTHP - expected_BTHP).abs().max() <= 1e-4 * expected_BTHP.abs().max()
