"""Time of the plain scan beside transformers' PyTorch fallback, and memory that autograd keeps for the backward pass.

pytest -m benchmark -s tests/benchmarks/bench_ssm.py [-k tiny]

bench_layer.py measures the whole layer around it.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bench import interleaved, record
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

from elastic_core.layers.ssm import ssd_scan
from elastic_core.training.curriculum import generator

SAME = 1e-4  # float32: sums over a sequence in another order
# B, T, H, P, G, N and the chunk size of the model: the tiny recipe's training step; small models; Nano's heads.
SHAPES = {
    "tiny": (16, 128, 8, 32, 2, 32, 64),
    "16-heads": (1, 2048, 16, 64, 8, 128, 128),
    "64-heads": (1, 2048, 64, 64, 8, 128, 128),
    "128-heads": (1, 2048, 128, 64, 8, 128, 128),
}

Scan = Callable[[], Tensor]


def make_inputs(batch: int, tokens: int, heads: int, head_dim: int, groups: int, state: int) -> list[Tensor]:
    random = generator("scan")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    inputs = [
        normal(batch, tokens, heads, head_dim),
        F.softplus(normal(batch, tokens, heads) - 2),
        -normal(heads).exp(),
        normal(batch, tokens, groups, state) / state**0.5,
        normal(batch, tokens, groups, state),
        normal(heads),
    ]
    return [t.requires_grad_() for t in inputs]


def saved_mebibytes(scan: Scan, inputs: list[Tensor]) -> float:
    """What autograd keeps from the forward pass for the backward pass, besides the inputs."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y_BTHP = scan()
    del y_BTHP
    given = {t.untyped_storage().data_ptr() for t in inputs}
    return sum(nbytes for address, nbytes in kept.items() if address not in given) / 2**20


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHAPES)
def test_plain_scan_beside_transformers(name: str) -> None:
    *sizes, chunk_size = SHAPES[name]
    inputs = make_inputs(*sizes)
    x, dt, A, B, C, D = inputs
    weight_BTHP = torch.randn(x.shape, generator=generator("weight"))
    scans: dict[str, Scan] = {
        "ours": lambda: ssd_scan(*inputs, chunk_size=chunk_size)[0],
        "transformers": lambda: mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D=D),
    }

    def step(scan: Scan) -> tuple[Tensor, ...]:
        y_BTHP = scan()
        return y_BTHP, *torch.autograd.grad(y_BTHP, inputs, weight_BTHP)

    for one, other in zip(step(scans["ours"]), step(scans["transformers"]), strict=True):
        assert (one - other).abs().max() <= SAME * other.abs().max()
    seconds = interleaved({form: lambda scan=scan: step(scan) for form, scan in scans.items()})
    mebibytes = {form: saved_mebibytes(scan, inputs) for form, scan in scans.items()}
    shape = "B,T,H,P,G,N = " + ",".join(map(str, sizes))
    for benchmark, unit, found in (
        ("plain scan, forward and backward", "s", seconds),
        ("plain scan, saved for backward", "MiB", mebibytes),
    ):
        record(
            benchmark=benchmark,
            shape=shape,
            unit=unit,
            ours=found["ours"],
            theirs=found["transformers"],
            alternative="transformers without kernels",
            target="less",
        )
