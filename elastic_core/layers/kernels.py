"""The functions of ssm.py on the fused CUDA kernels of mamba-ssm and causal-conv1d, and the choice between the two.

The packages are optional and imported only when a function is called. Each function has the signature of its namesake
in ssm.py and computes the same; where a kernel cannot serve a case the function hands it to its namesake. The kernels
take no float64, the step has no gradient, and the norm no mask.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from elastic_core.layers import ssm
from elastic_core.layers.packing import Packing

BackendName = Literal["auto", "torch", "triton"]

_log = logging.getLogger(__name__)


def ssd_scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    *,
    chunk_size: int,
    initial_state_BHPN: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssm.ssd_scan` by mamba-ssm's Triton kernels; `chunk_size` is best 128 or 256.

    The kernels sum logarithms of decays over a whole chunk and take differences of the sums. Every document of a
    `packing` is therefore given chunks of its own.
    """
    if x_BTHP.dtype == torch.float64:
        return ssm.ssd_scan(
            x_BTHP,
            dt_BTH,
            A_H,
            B_BTGN,
            C_BTGN,
            D_H,
            chunk_size=chunk_size,
            initial_state_BHPN=initial_state_BHPN,
            packing=packing,
        )
    alignment = packing.aligned(chunk_size) if packing else None
    if alignment is not None:
        x_BTHP, dt_BTH, B_BTGN, C_BTGN = map(alignment.spread, (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y_BTHP, state_BHPN = mamba_chunk_scan_combined(
        x_BTHP,
        dt_BTH,
        A_H.float(),
        B_BTGN,
        C_BTGN,
        chunk_size,
        D=D_H,
        initial_states=initial_state_BHPN,
        seq_idx=alignment.seq_idx_BL if alignment else None,
        return_final_states=True,
    )
    return alignment.gather(y_BTHP) if alignment else y_BTHP, state_BHPN


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> tuple[Tensor, Tensor]:
    """`ssm.ssd_step` by mamba-ssm's Triton kernel."""
    inputs = (x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, state_BHPN)
    if x_BHP.dtype == torch.float64 or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)):
        return ssm.ssd_step(x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, state_BHPN)
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    # The kernel overwrites the state it is given. It takes the scalars of a head per channel, and recognises by their
    # strides of 0 that they are scalars; it needs a bias of dt to look at.
    heads, head_dim, state_size = state_BHPN.shape[1:]
    new_state_BHPN = state_BHPN.float().clone()
    y_BHP = selective_state_update(
        new_state_BHPN,
        x_BHP,
        dt_BH.unsqueeze(-1).expand(-1, -1, head_dim),
        A_H.float()[:, None, None].expand(-1, head_dim, state_size),
        B_BGN,
        C_BGN,
        D=D_H.unsqueeze(-1).expand(-1, head_dim),
        dt_bias=dt_BH.new_zeros(()).expand(heads, head_dim),
    )
    return y_BHP, new_state_BHPN


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    initial_BKC: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssm.causal_conv` by causal-conv1d's CUDA kernel, which serves 2 to 4 taps and channels in multiples of 8.

    It keeps documents apart, or goes on from given inputs, but not both at once.
    """
    channels, width = weight_CK.shape
    both = packing is not None and initial_BKC is not None
    if x_BTC.dtype == torch.float64 or not 2 <= width <= 4 or channels % 8 or both:
        return ssm.causal_conv(x_BTC, weight_CK, bias_C, initial_BKC, packing)
    from causal_conv1d import causal_conv1d_fn

    if initial_BKC is None:
        initial_BKC = x_BTC.new_zeros(x_BTC.shape[0], width - 1, channels)
    initial_BKC = initial_BKC.to(x_BTC.dtype)
    # The kernel reads vectors of 8 values along the channels: a view into a wider tensor must start and step by 8.
    is_aligned = x_BTC.stride(2) == 1 and not any(n % 8 for n in (x_BTC.storage_offset(), *x_BTC.stride()[:2]))
    y_BCT = causal_conv1d_fn(
        (x_BTC if is_aligned else x_BTC.contiguous()).transpose(1, 2),
        weight_CK,
        None if bias_C is None else bias_C.to(weight_CK.dtype),
        seq_idx=packing.seq_idx_BT if packing else None,
        initial_states=None if packing else initial_BKC.contiguous().transpose(1, 2),
        activation="silu",
    )
    recent_BKC = torch.cat([initial_BKC, x_BTC[:, -(width - 1) :]], dim=1)[:, -(width - 1) :]
    return y_BCT.transpose(1, 2), recent_BKC


def gated_rms_norm(
    y_BTI: Tensor, gate_BTI: Tensor, weight_I: Tensor, n_groups: int, eps: float, mask: Tensor | None = None
) -> Tensor:
    """`ssm.gated_rms_norm` by mamba-ssm's Triton kernel."""
    if y_BTI.dtype == torch.float64 or mask is not None:
        return ssm.gated_rms_norm(y_BTI, gate_BTI, weight_I, n_groups, eps, mask)
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    group_size = y_BTI.shape[-1] // n_groups
    normed_BTI: Tensor = rmsnorm_fn(
        y_BTI, weight_I, None, z=gate_BTI, eps=eps, group_size=group_size, norm_before_gate=False
    )
    return normed_BTI


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One implementation of the mixer's functions; signatures as in ssm.py."""

    name: str
    scan: Callable[..., tuple[Tensor, Tensor]]
    step: Callable[..., tuple[Tensor, Tensor]]
    conv: Callable[..., tuple[Tensor, Tensor]]
    gated_norm: Callable[..., Tensor]


TORCH = Backend(name="torch", scan=ssm.ssd_scan, step=ssm.ssd_step, conv=ssm.causal_conv, gated_norm=ssm.gated_rms_norm)
TRITON = Backend(name="triton", scan=ssd_scan, step=ssd_step, conv=causal_conv, gated_norm=gated_rms_norm)
# Without causal-conv1d, which has to be compiled: only its convolution is then plain PyTorch.
TRITON_ALONE = replace(TRITON, conv=ssm.causal_conv)


def has_mamba_ssm() -> bool:
    """Tell whether mamba-ssm's kernels can be imported."""
    return _import_error("mamba_ssm.ops.triton.ssd_combined") is None


def has_causal_conv1d() -> bool:
    """Tell whether causal-conv1d can be imported."""
    return _import_error("causal_conv1d") is None


def select_backend(choice: BackendName, device: torch.device | str) -> Backend:
    """Return the backend asked for; "auto" is "triton" on a CUDA device that can have it, and says once which it is.

    On other devices there is no choice, and nothing is said.

    Raises ValueError where "triton" is asked for and cannot be had, or the choice is unknown.
    """
    return _select(choice, torch.device(device).type)


@functools.cache
def _select(choice: BackendName, device_type: str) -> Backend:
    if choice == "torch":
        return TORCH
    if choice not in ("auto", "triton"):
        raise ValueError(f"backend={choice!r} is unknown; choose 'auto', 'torch' or 'triton'")
    obstacle = _triton_obstacle(device_type)
    if choice == "triton" and obstacle:
        raise ValueError(f"backend='triton': the fused kernels {obstacle}")
    if choice == "auto" and device_type == "cuda":
        if obstacle:
            _log.warning("Mamba layers run on plain PyTorch, which is slower; the fused kernels %s", obstacle)
        elif has_causal_conv1d():
            _log.info("Mamba layers run on the fused kernels of mamba-ssm and causal-conv1d")
        else:
            _log.warning(
                "Mamba layers run on the fused kernels of mamba-ssm, their convolution on plain PyTorch, which "
                "is slower; pip install 'elastic-family[cuda]'"
            )
    if obstacle:
        return TORCH
    return TRITON if has_causal_conv1d() else TRITON_ALONE


def _triton_obstacle(device_type: str) -> str | None:
    """Say why the fused kernels cannot run on such a device and what to do about it; None if they can."""
    if device_type != "cuda":
        return f"need a CUDA device, not {device_type!r}; choose backend='torch' there"
    error = _import_error("mamba_ssm.ops.triton.ssd_combined")
    return f"need mamba-ssm ({error}); pip install 'elastic-family[cuda]'" if error is not None else None


def _import_error(module: str) -> str | None:
    """Import a module; return why that fails, None if it does not.

    Looking for its name would not do: a package that was compiled for another torch is there and cannot be imported.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return None
