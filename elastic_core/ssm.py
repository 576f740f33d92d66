"""The Mamba-2 mixer's tensor functions in plain PyTorch: scan, decoding step, convolution, gated norm.

The scan is the chunked form of structured state space duality, SSD (arXiv 2405.21060, section 6 and listing 1).
Per head, with a state S of P x N values, input x, output y, and dt > 0, A < 0:

    S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T
    y_t = S_t C_t + D x_t

Letters beyond the package's legend: L and S, the tokens of one chunk as targets and as sources; R, the heads of one
group (H = G R, head h in group h // R); M = R P, the channels of one group; I = H P, all channels of the mixer.

On a CPU these functions are bound by memory, not by arithmetic. They therefore walk over short runs of tokens, whose
intermediate tensors stay in the cache from one operation to the next, forward and backward.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# About 1 MiB of float32: what one core's cache holds while an expression of a few operations runs over it.
_SEGMENT_VALUES = 2**18


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
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence; return y_BTHP and the state after the last token.

    `dt_BTH` is positive (softplus and clamp are done) and `A_H` negative. The result does not depend on `chunk_size`,
    the largest number of tokens computed at once; cost per token is least near 64 on a CPU. T may be any length.
    Computes and returns the state in float32 or, for float64 input, in float64; y has the dtype of x.
    """
    dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    A_H, D_H = A_H.to(dtype), D_H.to(dtype)
    if initial_state_BHPN is None:
        batch, _, heads, head_dim = x_BTHP.shape
        state_BHPN = x_BTHP.new_zeros(batch, heads, head_dim, B_BTGN.shape[-1], dtype=dtype)
    else:
        state_BHPN = initial_state_BHPN.to(dtype)
    chunk = min(chunk_size, x_BTHP.shape[1])
    future_SL = torch.full((chunk, chunk), -math.inf, dtype=dtype, device=x_BTHP.device).tril(-1)

    chunks = zip(*(t.split(chunk, dim=1) for t in (x_BTHP, dt_BTH, B_BTGN, C_BTGN)), strict=True)
    outputs = []
    for x_BLHP, dt_BLH, B_BLGN, C_BLGN in chunks:
        y_BLHP, state_BHPN = _scan_chunk(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, state_BHPN, future_SL)
        outputs.append(y_BLHP)
    return torch.cat(outputs, dim=1), state_BHPN


def _scan_chunk(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    future_SL: Tensor,
) -> tuple[Tensor, Tensor]:
    """Scan the tokens of one chunk from `state_BHPN`; `future_SL` is -inf where source S is later than target L, else 0.

    Everything is laid out with tokens last, so that the heads of a group are the rows of one matrix: the products
    with B and C are one matrix product per group, and nothing is repeated over heads.
    """
    dtype = state_BHPN.dtype
    tokens, groups = B_BLGN.shape[1:3]
    x_BHPL = x_BLHP.permute(0, 2, 3, 1).to(dtype).contiguous()
    dt_BHL = dt_BLH.transpose(1, 2).to(dtype).contiguous()
    B_BGLN = B_BLGN.transpose(1, 2).to(dtype).contiguous()
    C_BGNL = C_BLGN.transpose(1, 2).to(dtype).contiguous().mT
    xdt_BHPL = x_BHPL * dt_BHL.unsqueeze(2)
    log_decay_BHL = torch.cumsum(dt_BHL * A_H[:, None], dim=-1)

    # 1. Intra-chunk: like attention, scores C_l . B_s times the decay from s to l, shared by the heads but for the decay.
    # The mask is added before the exponential, for that of a future segment would overflow and its gradient be NaN.
    segments_BHSL = (future_SL[:tokens, :tokens] - log_decay_BHL.unsqueeze(3)).add_(log_decay_BHL.unsqueeze(2))
    scores_BGSL = B_BGLN @ C_BGNL
    weights_BGRSL = segments_BHSL.exp_().unflatten(1, (groups, -1)) * scores_BGSL.unsqueeze(2)
    y_BHPL = xdt_BHPL @ weights_BGRSL.flatten(1, 2)

    # 2. Chunk states: what this chunk adds to the state, each token decayed to the chunk's end.
    total_BH1 = log_decay_BHL[..., -1:]
    added_BHPL = xdt_BHPL * (total_BH1 - log_decay_BHL).exp().unsqueeze(2)
    added_BGMN = added_BHPL.unflatten(1, (groups, -1)).flatten(2, 3) @ B_BGLN

    # 3. Inter-chunk recurrence: the old state decays over the whole chunk.
    new_state_BHPN = torch.addcmul(added_BGMN.view_as(state_BHPN), state_BHPN, total_BH1.exp().unsqueeze(3))

    # 4. State to output: what targets read from the state at the chunk's start, and the skip connection.
    read_BGML = state_BHPN.unflatten(1, (groups, -1)).flatten(2, 3) @ C_BGNL
    y_BHPL = torch.addcmul(y_BHPL, read_BGML.view_as(y_BHPL), log_decay_BHL.exp().unsqueeze(2))
    y_BHPL = torch.addcmul(y_BHPL, x_BHPL, D_H[:, None, None])
    return y_BHPL.permute(0, 3, 1, 2).to(x_BLHP.dtype), new_state_BHPN
