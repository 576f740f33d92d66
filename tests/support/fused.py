"""Stand-ins for the fused kernels, on any device: they allocate and save what mamba-ssm and causal-conv1d do.

They compute nothing. Sizes and order are those of mamba_ssm/ops/triton/ssd_combined.py and layernorm_gated.py, version
2.3, and of causal_conv1d's functions; what is as small as a value a head and chunk is left out.
"""

from typing import Any

import torch
from torch import Tensor

from elastic_core.layers import ssm
from elastic_core.layers.kernels import Backend


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int) -> Any:
        decays, steps = torch.empty_like(dt), torch.empty_like(dt)
        of_chunks = states_of(x, B, chunk, torch.float32)
        passed, last = torch.empty_like(of_chunks, dtype=C.dtype), torch.empty_like(of_chunks[:, 0])
        del of_chunks
        scores = scores_of(B, chunk)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        ctx.save_for_backward(y, x, dt, decays, A, B, C, D)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        del steps, passed, scores
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> Any:
        _, x, dt, decays, A, B, C, D = ctx.saved_tensors
        dy = dy.contiguous()
        dB, dC, ddt = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (B, C, dt))
        again = [torch.empty_like(decays) for _ in range(3)]
        scores = scores_of(B, ctx.chunk)
        before = states_of(x, B, ctx.chunk, torch.float32)
        states = torch.empty_like(before)
        del before
        dstates = torch.empty_like(states)
        narrow, dnarrow = torch.empty_like(states, dtype=x.dtype), torch.empty_like(states, dtype=x.dtype)
        del states, dstates
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        of_steps = torch.empty_like(decays)
        wide_dB = torch.empty_like(dB, dtype=torch.float32)
        of_next = torch.empty_like(decays)
        wide_dC = torch.empty_like(dC, dtype=torch.float32)
        of_previous = torch.empty_like(decays)
        dscores = torch.empty_like(scores)
        del again, narrow, dnarrow, of_steps, wide_dB, wide_dC, of_next, of_previous, dscores
        return dx, ddt, torch.empty_like(A), dB, dC, torch.empty_like(D), None


def states_of(x: Tensor, B: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    rows, tokens, heads, channels = x.shape
    return torch.empty(rows, -(-tokens // chunk), heads, channels, B.shape[-1], dtype=dtype, device=x.device)


def scores_of(B: Tensor, chunk: int) -> Tensor:
    rows, tokens, groups, _ = B.shape
    return torch.empty(rows, -(-tokens // chunk), groups, chunk, chunk, dtype=torch.float32, device=B.device)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        dy = dy.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return dx, torch.empty_like(weight), None if bias is None else torch.empty_like(bias)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, groups: int) -> Tensor:
        rstd = torch.empty(*y.shape[:2], groups, device=y.device)
        ctx.save_for_backward(y, gate, weight, rstd)
        return torch.empty_like(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, gate, weight, _ = ctx.saved_tensors
        dy = dy.contiguous()
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        return torch.empty_like(y), dgate, torch.empty_like(weight), None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(*x.shape[:-1], 1, dtype=x.dtype, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def rms_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    """torch's own fused norm, which exists on CUDA alone."""
    normed: Tensor = _Norm.apply(x, weight)
    return normed


def _gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float, mask: Tensor | None) -> Tensor:
    if mask is not None:  # as kernels.py does
        return ssm.gated_rms_norm(y, gate, weight, groups, eps, mask)
    normed: Tensor = _GatedNorm.apply(y, gate, weight, groups)
    return normed


FUSED = Backend(
    name="allocates what the fused kernels allocate",
    scan=lambda *inputs, chunk_size, initial_state_BHPN, packing: _Scan.apply(*inputs, chunk_size),
    step=ssm.ssd_step,
    conv=lambda x, weight, bias, initial, packing: (_Conv.apply(x, weight, bias), x[:, -3:]),
    gated_norm=_gated_norm,
)
