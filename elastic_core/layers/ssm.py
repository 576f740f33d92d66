"""The tensor functions of a Mamba-2 mixer in plain PyTorch: scan, decoding step, convolution, gated norm.

The scan is the chunked form of structured state space duality, SSD (arXiv 2405.21060, section 6 and listing 1).
Per head, with a state S of P x N values, an input x, an output y, dt > 0 and A < 0:

    S_t = exp(dt_t A) S_(t-1) + dt_t x_t B_t^T
    y_t = S_t C_t + D x_t

Letters beyond the package's legend: L and S, the tokens of one chunk as targets and as sources; R = H / G, the heads
of one group (head h belongs to group h // R); M = R P, the channels of one group; I = H P, all channels of the mixer.
In `causal_conv`, C is its channels and K its taps.

Everything is computed in float32, or in float64 where the input is float64, whatever autocast says of matrix products,
and returned in the input's dtype.

On a CPU these functions are bound by memory, not by arithmetic. They therefore walk over short runs of tokens, whose
intermediate tensors stay in the cache from one operation to the next, forward and backward.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.layers.packing import Packing
from elastic_core.layers.tiles import over_tiles

# 1 MiB of float32: what a core's cache holds while an expression of a few operations runs over it.
SEGMENT_VALUES = 2**18

# The scan does least work per token where a chunk is about as long as a head has channels; a GPU prefers longer ones.
CPU_CHUNK = 64


def time_steps(dt_BTH: Tensor, bias_H: Tensor, limit: tuple[float, float | None]) -> Tensor:
    """The positive steps dt of the recurrence from their projection: softplus(dt + bias), clamped to `limit`."""
    dtype = torch.promote_types(dt_BTH.dtype, torch.float32)
    return F.softplus(dt_BTH.to(dtype) + bias_H.to(dtype)).clamp(*limit)


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
    """Run the recurrence over a sequence; return y_BTHP and the state after the last token.

    `dt_BTH` comes softplus-ed and clamped. The result does not depend on `chunk_size`, the largest number of tokens
    computed at once; a CPU takes no more than 64. T may be any length from 1. The state that is returned is never of
    lower precision than float32. Every document of a `packing` starts from a state of zeros, but for the first of each
    row; no bit of its outputs, or of a gradient of them, depends on the documents before.
    """
    dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
    A_H, D_H = A_H.to(dtype), D_H.to(dtype)
    batch, tokens, heads, head_dim = x_BTHP.shape
    if initial_state_BHPN is None:
        state_BHPN = x_BTHP.new_zeros(batch, heads, head_dim, B_BTGN.shape[-1], dtype=dtype)
    else:
        state_BHPN = initial_state_BHPN.to(dtype)
    chunk = min(chunk_size, tokens, CPU_CHUNK if x_BTHP.device.type == "cpu" else tokens)
    mask_SL = torch.full((chunk, chunk), -math.inf, dtype=dtype, device=x_BTHP.device).tril()

    outputs = []
    sequences = (x_BTHP, dt_BTH, B_BTGN, C_BTGN)
    bounds = _chunk_bounds(packing, chunk, dtype) if packing else iter([None] * -(-tokens // chunk))
    with torch.autocast(x_BTHP.device.type, enabled=False):
        for x_BLHP, dt_BLH, B_BLGN, C_BLGN in zip(*(torch.split(t, chunk, dim=1) for t in sequences), strict=True):
            y_BLHP, state_BHPN = _scan_chunk(
                x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, state_BHPN, mask_SL, next(bounds)
            )
            outputs.append(y_BLHP)
    return joined(outputs), state_BHPN


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Where documents meet within a chunk.

    `through_BSL` is 1 from each source to itself and the later targets of its document, `between_B1SL` is 0 from each
    source to those later targets alone and -inf elsewhere. `enter_B1L` is 0 for the tokens of the document that was
    running before the chunk, `leave_B1L` for those of the document that is running at its end, -inf for the others.
    """

    through_BSL: Tensor
    between_B1SL: Tensor
    enter_B1L: Tensor
    leave_B1L: Tensor


def _chunk_bounds(packing: Packing, chunk: int, dtype: torch.dtype) -> Iterator[_Bounds]:
    def or_nothing(kept: Tensor) -> Tensor:
        return torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_fill(~kept, -math.inf)

    before_B1 = packing.seq_idx_BT[:, :1]
    for numbers_BL in packing.seq_idx_BT.split(chunk, dim=1):
        same_BSL = numbers_BL.unsqueeze(2) == numbers_BL.unsqueeze(1)
        yield _Bounds(
            through_BSL=same_BSL.triu().to(dtype),
            between_B1SL=or_nothing(same_BSL.triu(1)).unsqueeze(1),
            enter_B1L=or_nothing(numbers_BL == before_B1).unsqueeze(1),
            leave_B1L=or_nothing(numbers_BL == numbers_BL[:, -1:]).unsqueeze(1),
        )
        before_B1 = numbers_BL[:, -1:]


def _scan_chunk(
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    mask_SL: Tensor,
    bounds: _Bounds | None,
) -> tuple[Tensor, Tensor]:
    """Scan one chunk from the state before it; `mask_SL` is 0 where source S is before target L, else -inf.

    Tokens are laid out last, so that the channels of a group are the rows of one matrix: every product with B or C is
    one matrix product per group, and nothing is repeated over heads.

    What a token reads of itself is left to step 4: its decay, exp(a - a) = 1, would in step 1 give the two a gradients
    that cancel only up to rounding and grow with dt.
    """
    dtype = state_BHPN.dtype
    tokens, groups = B_BLGN.shape[1:3]
    x_BHPL = x_BLHP.permute(0, 2, 3, 1).to(dtype).contiguous()
    dt_BHL = dt_BLH.transpose(1, 2).to(dtype).contiguous()
    B_BGLN = B_BLGN.transpose(1, 2).to(dtype).contiguous()
    C_BGNL = C_BLGN.transpose(1, 2).to(dtype).contiguous().mT
    xdt_BHPL = x_BHPL * dt_BHL.unsqueeze(2)

    since_start_BHL, from_before_BHL, to_end_BHL = _log_decays(dt_BHL, A_H, bounds)
    before_SL = mask_SL[:tokens, :tokens] if bounds is None else bounds.between_B1SL

    # 1. Intra-chunk: attention-like scores, computed once per group, times each head's decay from source to target.
    # The mask goes before the exponential, which of a later source would overflow, and 0 * inf is NaN. A negation is
    # added, for the backward of a subtraction would negate the large tensor instead.
    scores_BGSL = B_BGLN @ C_BGNL
    between_BHSL = (before_SL + (-since_start_BHL).unsqueeze(3)).add_(since_start_BHL.unsqueeze(2))
    weights_BGRSL = torch.unflatten(between_BHSL.exp_(), 1, (groups, -1)) * scores_BGSL.unsqueeze(2)
    y_BHPL = xdt_BHPL @ weights_BGRSL.flatten(1, 2)

    # 2. Chunk state: what this chunk's tokens add, each decayed to the end of the chunk.
    added_BHPL = xdt_BHPL * to_end_BHL.exp().unsqueeze(2)
    added_BGMN = _by_group(added_BHPL, groups) @ B_BGLN

    # 3. Inter-chunk recurrence: the state before the chunk decays over all of it.
    new_state_BHPN = torch.addcmul(
        added_BGMN.view_as(state_BHPN), state_BHPN, from_before_BHL[..., -1:].exp().unsqueeze(3)
    )

    # 4. State to output: what each target reads of the state before the chunk. Then what it reads of itself, and D.
    read_BGML = _by_group(state_BHPN, groups) @ C_BGNL
    y_BHPL = torch.addcmul(y_BHPL, read_BGML.view_as(y_BHPL), from_before_BHL.exp().unsqueeze(2))
    own_BGRL = torch.unflatten(dt_BHL, 1, (groups, -1)) * scores_BGSL.diagonal(dim1=2, dim2=3).unsqueeze(2)
    y_BHPL = torch.addcmul(y_BHPL, x_BHPL, (own_BGRL.flatten(1, 2) + D_H[:, None]).unsqueeze(2))
    return y_BHPL.permute(0, 3, 1, 2).to(x_BLHP.dtype), new_state_BHPN


def _log_decays(dt_BHL: Tensor, A_H: Tensor, bounds: _Bounds | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of decays, each (B, H, L): since the chunk's start, of the state before the chunk, to the chunk's end.

    Where documents meet, they are summed in each document alone: a difference of two sums over all of the chunk would
    round as the documents before have it.
    """
    # Below the bound a decay is 0 anyway, but in the sum it would swamp the tokens that follow.
    bound = math.log(torch.finfo(dt_BHL.dtype).smallest_normal * torch.finfo(dt_BHL.dtype).eps) - 1
    log_decay_BHL = (dt_BHL * A_H[:, None]).clamp(min=bound)
    if bounds is None:
        since_start_BHL = torch.cumsum(log_decay_BHL, dim=-1)
        return since_start_BHL, since_start_BHL, since_start_BHL[..., -1:] - since_start_BHL
    since_start_BHL = log_decay_BHL @ bounds.through_BSL
    to_end_BHL = since_start_BHL[..., -1:] - since_start_BHL + bounds.leave_B1L
    return since_start_BHL, since_start_BHL + bounds.enter_B1L, to_end_BHL


def ssd_step(
    x_BHP: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    B_BGN: Tensor,
    C_BGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
) -> tuple[Tensor, Tensor]:
    """Take one step of the recurrence (decoding); return y_BHP and the new state. The state given is left as it is."""
    dtype = torch.promote_types(x_BHP.dtype, torch.float32)
    groups = B_BGN.shape[1]
    x, dt, A, B, C, D, state = (t.to(dtype) for t in (x_BHP, dt_BH, A_H, B_BGN, C_BGN, D_H, state_BHPN))

    added_BGMN = _by_group(x * dt.unsqueeze(-1), groups).unsqueeze(-1) * B.unsqueeze(2)
    new_state_BHPN = torch.addcmul(added_BGMN.view_as(state), state, torch.exp(dt * A)[..., None, None])
    with torch.autocast(x_BHP.device.type, enabled=False):
        read_BGM1 = _by_group(new_state_BHPN, groups) @ C.unsqueeze(-1)
    y_BHP = torch.addcmul(read_BGM1.view_as(x), x, D[:, None])
    return y_BHP.to(x_BHP.dtype), new_state_BHPN


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor | None,
    initial_BKC: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution followed by SiLU; return y_BTC and the last K - 1 inputs.

    `initial_BKC` holds the K - 1 inputs before the first token (zeros if None), oldest first. Passing the inputs
    returned by one call as `initial_BKC` of the next goes on with the sequence. T may be any length from 1. Before
    every document of a `packing` stand zeros, but for the first of each row.
    """
    dtype = torch.promote_types(x_BTC.dtype, torch.float32)
    taps = weight_CK.to(dtype).T.contiguous().unbind(0)
    bias = x_BTC.new_zeros((), dtype=dtype) if bias_C is None else bias_C.to(dtype)
    batch, _, channels = x_BTC.shape
    recent_BKC = x_BTC.new_zeros(batch, len(taps) - 1, channels) if initial_BKC is None else initial_BKC

    outputs, start = [], 0
    in_document_KBT1 = _in_document(packing, len(taps), dtype) if packing else None
    for segment_BTC in segments(x_BTC):
        tokens = segment_BTC.shape[1]
        inputs_BTC = torch.cat([recent_BKC.to(x_BTC.dtype), segment_BTC], dim=1)
        recent_BKC = inputs_BTC[:, tokens:]
        y_BTC = bias.expand(segment_BTC.shape).clone()
        for offset, tap_C in enumerate(taps):
            read_BTC = inputs_BTC[:, offset : offset + tokens].to(dtype)
            if in_document_KBT1 is not None:
                read_BTC = read_BTC * in_document_KBT1[offset, :, start : start + tokens]
            y_BTC.addcmul_(read_BTC, tap_C)
            del read_BTC  # before the next one is made
        start += tokens
        outputs.append(F.silu(y_BTC).to(x_BTC.dtype))
    # A copy, for a cache that keeps the view would keep its whole segment.
    return joined(outputs), recent_BKC.clone()


def _in_document(packing: Packing, taps: int, dtype: torch.dtype) -> Tensor:
    """For each tap, the oldest first, 1 where it reads of the token's own document and 0 where of another."""
    numbers_BT = packing.seq_idx_BT
    kept_KBT1 = torch.ones(taps, *numbers_BT.shape, 1, dtype=dtype, device=numbers_BT.device)
    for tap in range(taps - 1):
        back = taps - 1 - tap
        kept_KBT1[tap, :, back:, 0] = (numbers_BT[:, back:] == numbers_BT[:, :-back]).to(dtype)
        kept_KBT1[tap, :, :back, 0] = (numbers_BT[:, :back] == numbers_BT[:, :1]).to(dtype)
    return kept_KBT1


def gated_rms_norm(
    y_BTI: Tensor, gate_BTI: Tensor, weight_I: Tensor, n_groups: int, eps: float, mask: Tensor | None = None
) -> Tensor:
    """Normalise y * silu(gate) to a root mean square of 1 in each group of channels, then multiply by the weight.

    A soft `mask` of channels in [0, 1], of shape I or (B, 1, I), multiplies them before the norm, and the mean of a
    group is over sum(mask) channels. A mask of zeros and ones thus gives the kept channels what the norm of them alone
    gives, and the others 0. Every group must keep the same total, more than 0, for a slice keeps equal groups.
    """
    dtype = torch.promote_types(y_BTI.dtype, torch.float32)
    groups = (n_groups, y_BTI.shape[-1] // n_groups)
    weight_GM = weight_I.to(dtype).view(groups)
    if mask is not None:
        mask_GM = torch.unflatten(mask.to(dtype), -1, groups)
        shared = (weight_GM, mask_GM, mask_GM.sum(-1, keepdim=True))
        return over_tiles(
            lambda y, gate, *of_all: _gated_norm(y, gate, groups, eps, *of_all), (y_BTI, gate_BTI), shared
        )
    pieces = zip(segments(y_BTI), segments(gate_BTI), strict=True)
    return joined([_gated_norm(y, gate, groups, eps, weight_GM) for y, gate in pieces])


def _gated_norm(
    y_BTI: Tensor,
    gate_BTI: Tensor,
    groups: tuple[int, int],
    eps: float,
    weight_GM: Tensor,
    mask_GM: Tensor | None = None,
    kept_G1: Tensor | None = None,
) -> Tensor:
    dtype = weight_GM.dtype
    gated_BTGM = torch.unflatten(y_BTI.to(dtype) * F.silu(gate_BTI.to(dtype)), -1, groups)
    if mask_GM is not None:
        gated_BTGM = gated_BTGM * mask_GM
    mean_square_BTG1 = gated_BTGM.square().sum(-1, keepdim=True) / (groups[1] if kept_G1 is None else kept_G1)
    normed_BTGM = gated_BTGM * torch.rsqrt(mean_square_BTG1 + eps) * weight_GM
    return normed_BTGM.flatten(-2).to(y_BTI.dtype)


def segments(t_BTC: Tensor) -> Sequence[Tensor]:
    """The runs of tokens that elementwise expressions should walk over, one after another: all at once but on a CPU."""
    batch, tokens, channels = t_BTC.shape
    at_once = max(1, SEGMENT_VALUES // (batch * channels)) if t_BTC.device.type == "cpu" else tokens
    return (t_BTC,) if tokens <= at_once else t_BTC.split(at_once, dim=1)


def joined(outputs: list[Tensor]) -> Tensor:
    """What was computed run by run, in one piece again."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _by_group(t_BHP: Tensor, groups: int) -> Tensor:
    """Gather the channels of a group: (B, H, P, ...) to (B, G, M, ...)."""
    return torch.unflatten(t_BHP, 1, (groups, -1)).flatten(2, 3)
