"""Mamba-2 with a grouped gated norm (arXiv 2405.21060); B and C are never pruned."""

import math
from collections.abc import Mapping
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.geometry import MAMBA, ModelConfig
from elastic_core.layers import ssm
from elastic_core.layers.kernels import Backend
from elastic_core.layers.kind import (
    FLOAT32_BYTES,
    Cache,
    Flops,
    Kind,
    LayerShape,
    Mixer,
    ServingStep,
    Training,
    descending,
)
from elastic_core.layers.norm import RMSNorm
from elastic_core.layers.packing import Packing
from elastic_core.layers.tiles import GPU_VALUES
from elastic_core.layout import Kept, Layout, Run, grid, mask

# Of the size of a tile, what the masked gated norm's backward pass has in float32 at once.
TILE_TENSORS = 10


def channel_grid(model: ModelConfig) -> Run:
    """The channels of x: [group, head in group, channel in head]."""
    in_group = model.mamba_num_heads // model.n_groups
    return grid(group=model.n_groups, mamba_heads=in_group, mamba_head_dim=model.mamba_head_dim)


class MambaMixer(Mixer):
    """Mamba-2 at any subnet."""

    residual = "out_proj.weight"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.channels = channel_grid(config)
        channels, conv_channels = config.mamba_size, config.mamba_size + config.state_rows
        self.in_proj = nn.Linear(config.hidden_size, channels + conv_channels + config.mamba_num_heads, bias=False)
        self.conv1d = nn.Conv1d(
            conv_channels, conv_channels, config.conv_kernel, groups=conv_channels, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.ones(config.mamba_num_heads))
        self.A_log = nn.Parameter(torch.zeros(config.mamba_num_heads))
        self.D = nn.Parameter(torch.ones(config.mamba_num_heads))
        self.norm = RMSNorm(channels, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=False)

    @staticmethod
    def lay_out(model: ModelConfig, layer: int) -> dict[str, Layout]:
        """The rows of in_proj are [z, x, B and C, dt], the channels of conv1d [x, B and C]."""
        hidden, states, channel = grid(hidden=model.hidden_size), grid(states=model.state_rows), channel_grid(model)
        head = channel[:2]  # group, head in the group
        found = {
            "in_proj.weight": Layout((channel, channel, states, head), (hidden,)),
            "conv1d.weight": Layout((channel, states), (grid(one=1),), (grid(taps=model.conv_kernel),)),
            "conv1d.bias": Layout((channel, states)),
            "dt_bias": Layout((head,)),
            "A_log": Layout((head,)),
            "D": Layout((head,)),
            "norm.weight": Layout((channel,)),
            "out_proj.weight": Layout((hidden,), (channel,)),
        }
        if not model.use_conv_bias:
            del found["conv1d.bias"]
        return found

    def components(
        self,
        x_BTD: Tensor,
        weights: Mapping[str, Tensor],
        kept: Kept,
        soft: Mapping[str, Tensor] | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None,
    ) -> Tensor:
        config = self.config
        heads, channels, groups = len(weights["D"]), len(weights["norm.weight"]), config.n_groups

        projected = F.linear(x_BTD, weights["in_proj.weight"])
        z, xBC, dt = projected.split([channels, channels + config.state_rows, heads], dim=-1)

        real_BT1 = cache.real_BT.unsqueeze(-1) if cache and cache.real_BT is not None else None
        if real_BT1 is not None:  # to a text, padding before it is the zeros that stand before any text
            xBC = xBC.where(real_BT1, 0)
        conv_tail = cache.conv.get(self.layer) if cache else None
        taps_CK, bias_C = weights["conv1d.weight"].squeeze(1), weights.get("conv1d.bias")
        xBC, conv_tail = backend.conv(xBC, taps_CK, bias_C, conv_tail, packing)
        x, B_BTGN, C_BTGN = xBC.split([channels, *(config.state_rows // 2,) * 2], dim=-1)
        x_BTHP = x.unflatten(-1, (heads, channels // heads))
        B_BTGN = B_BTGN.unflatten(-1, (groups, config.ssm_state_size))
        C_BTGN = C_BTGN.unflatten(-1, (groups, config.ssm_state_size))

        dt_BTH = ssm.time_steps(dt, weights["dt_bias"], config.time_step_limit)
        if real_BT1 is not None:  # no time passes: the state stays zero
            dt_BTH = dt_BTH.where(real_BT1, 0)
        A_H = -weights["A_log"].to(dt_BTH.dtype).exp()
        D_H = weights["D"].to(dt_BTH.dtype)
        state = cache.ssm.get(self.layer) if cache else None
        if state is not None and x_BTD.shape[1] == 1:
            y, state = backend.step(x_BTHP[:, 0], dt_BTH[:, 0], A_H, B_BTGN[:, 0], C_BTGN[:, 0], D_H, state)
            y_BTHP = y.unsqueeze(1)
        else:
            y_BTHP, state = backend.scan(
                x_BTHP,
                dt_BTH,
                A_H,
                B_BTGN,
                C_BTGN,
                D_H,
                chunk_size=config.chunk_size,
                initial_state_BHPN=state,
                packing=packing,
            )
        if cache is not None:
            cache.conv[self.layer], cache.ssm[self.layer] = conv_tail, state

        mask_I = mask(self.channels, kept, soft) if soft is not None else None
        norm_I, eps = weights["norm.weight"], config.layer_norm_epsilon
        return backend.gated_norm(y_BTHP.flatten(-2), z, norm_I, groups, eps, mask_I)


class MambaKind(Kind):
    """What a Mamba layer answers."""

    letter, mixer = MAMBA, MambaMixer

    def width(self, model: ModelConfig) -> tuple[str, object]:
        return "Mamba heads", f"{model.mamba_num_heads} of {model.mamba_head_dim}"

    def initialise(self, name: str, weight: Tensor, model: ModelConfig, generator: torch.Generator) -> None:
        """A and dt as Mamba-2 draws them; D and the norm are one."""
        if name in ("D", "norm.weight"):
            weight.fill_(1.0)
        elif name == "A_log":
            weight.copy_(torch.arange(1, len(weight) + 1).log())
        elif name == "dt_bias":
            low, high = math.log(model.time_step_min), math.log(model.time_step_max)
            dt = torch.empty_like(weight).uniform_(low, high, generator=generator).exp()
            dt = dt.clamp(min=model.time_step_floor)
            weight.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif name.startswith("conv1d"):
            bound = model.conv_kernel**-0.5
            weight.uniform_(-bound, bound, generator=generator)
        else:
            super().initialise(name, weight, model, generator)

    # Importance

    def activations(self, mixer: Mixer, normed_BTD: Tensor, *, signed: bool) -> Tensor:
        """Channel of a head: |RMSNorm(X) W_x|, or signed RMSNorm(X) W_x.

        A signed sum is small for a channel that is often large in both directions.
        """
        assert isinstance(mixer, MambaMixer)
        size = mixer.config.mamba_size
        x_rows = mixer.in_proj.weight[size : 2 * size]
        summed = normed_BTD.sum((0, 1))
        return F.linear(summed, x_rows) if signed else F.linear(normed_BTD, x_rows).abs().sum((0, 1))

    def order(self, model: ModelConfig, scores: Tensor, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Channels first, one order for all heads, by s_d = ||S_{:,d}||_2; then heads inside their group.

        Heads go by f_h = ||S_{h,top}||_2 over the best channels, those that every subnet keeps.
        """
        scores_HP = scores.view(model.mamba_num_heads, -1)
        channels = descending(scores_HP.norm(dim=0))
        top = channels[: kept["mamba_head_dim"]].to(scores.device)
        return {
            "mamba_heads": descending(scores_HP[:, top].norm(dim=1), model.n_groups),
            "mamba_head_dim": channels,
        }

    # Serving

    def cache_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        """The state, in float32, and the convolution's last inputs."""
        channels = shape.width * shape.mamba_head_dim
        tail = (model.conv_kernel - 1) * (channels + model.state_rows) * serving.width
        return serving.batch * (channels * model.ssm_state_size * FLOAT32_BYTES + tail)

    def serving_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        """in_proj's output + max(convolution, its output and dt + max(scan, gated norm)).

        The scan is the plain one of ssm.py on a CPU or the fused one, whichever needs more.
        """
        heads, channels = shape.width, shape.width * shape.mamba_head_dim
        mixed = channels + model.state_rows
        taps = 2 * mixed * model.conv_kernel * FLOAT32_BYTES
        projected = serving.rows * (channels + mixed + heads) * serving.width + taps
        held = serving.rows * (mixed * serving.width + heads * FLOAT32_BYTES)
        scan = max(_plain_scan(model, shape, serving), _fused_scan(model, shape, serving))
        return projected + max(_piecewise(mixed, serving), held + max(scan, _piecewise(channels, serving)))

    # Training

    def saved_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """in_proj's, conv1d's, scan's and norm's outputs; dt before and after softplus, and clamped; sums of decays."""
        heads, channels = shape.width, shape.width * shape.mamba_head_dim
        projected, convolved = 2 * channels + model.state_rows + heads, channels + model.state_rows
        scanned = step.width * (projected + convolved + channels) + FLOAT32_BYTES * 4 * heads
        return scanned + gated_norm_bytes(model, shape, step)

    def gradient_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """max(gated norm, scan - what the gated norm saved, which is free by then)."""
        released = gated_norm_bytes(model, shape, step)
        return max(_norm_backward(shape, step), _scan_backward(model, shape, step) - released)

    def flops(self, model: ModelConfig, shape: LayerShape, tokens: int, *, last_projection: bool) -> Flops:
        channels = shape.width * shape.mamba_head_dim
        in_proj = 2 * tokens * shape.hidden * (2 * channels + model.state_rows + shape.width)
        out_proj = 2 * tokens * channels * shape.hidden if last_projection else 0
        chunks, rest = divmod(tokens, model.chunk_size)
        scan = chunks * _chunk_flops(model, channels, model.chunk_size) + _chunk_flops(model, channels, rest)
        convolution = 2 * tokens * model.conv_kernel * (channels + model.state_rows)
        return Flops(projections=in_proj + out_proj, convolution=convolution, scan=scan)


def _piecewise(channels: int, serving: ServingStep) -> int:
    """3 x values (input, output pieces, joined) + 2 float32 copies of a piece, 4 where there are several pieces."""
    values = serving.rows * channels
    return 3 * values * serving.width + 2 * min(values, 2 * ssm.SEGMENT_VALUES) * FLOAT32_BYTES


def _plain_scan(model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
    """The output so far, and of one chunk: decays of each pair of tokens, seven copies of x, the states around it."""
    heads, channels = shape.width, shape.width * shape.mamba_head_dim
    tokens = min(serving.tokens, model.chunk_size, ssm.CPU_CHUNK)
    pairs = tokens * tokens * (2 * heads + model.n_groups)
    chunk = pairs + tokens * (7 * channels + 2 * model.state_rows + 8 * heads) + 3 * channels * model.ssm_state_size
    return serving.rows * channels * serving.width + serving.batch * chunk * FLOAT32_BYTES


def _fused_scan(model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
    """In mamba-ssm: the output, each chunk's state twice and the last one, each chunk's scores, dt and decays."""
    heads, channels = shape.width, shape.width * shape.mamba_head_dim
    chunks, state = serving.batch * ceil(serving.tokens / model.chunk_size), channels * model.ssm_state_size
    states = chunks * state * (FLOAT32_BYTES + serving.width) + serving.batch * state * FLOAT32_BYTES
    scores = chunks * model.n_groups * model.chunk_size**2 * FLOAT32_BYTES
    decays = 2 * chunks * model.chunk_size * heads * FLOAT32_BYTES
    return serving.rows * channels * serving.width + states + scores + decays


def gated_norm_bytes(model: ModelConfig, shape: LayerShape, step: Training) -> int:
    """Saved of a token: the gated norm's output, and of the fused norm, which runs without a mask, each group's RMS."""
    channels = shape.width * shape.mamba_head_dim
    return step.width * channels + (0 if step.masked else FLOAT32_BYTES * model.n_groups)


def _scan_backward(model: ModelConfig, shape: LayerShape, step: Training) -> int:
    """Of a token: gradients of the gate and the output; of B and C; scores and states of its chunk.

    The states before each chunk, and their gradients, are there in float32 and in the dtype of computation. Once the
    wide ones are gone, the gradient of x is there, those of B and C in float32, and that of the scores.
    """
    channels, width = shape.width * shape.mamba_head_dim, step.width
    scores = FLOAT32_BYTES * model.n_groups * model.chunk_size
    of_states = ceil(2 * channels * model.ssm_state_size / model.chunk_size)
    later = width * channels + FLOAT32_BYTES * model.state_rows + scores
    return (
        2 * width * channels
        + width * model.state_rows
        + scores
        + max((FLOAT32_BYTES + width) * of_states, width * of_states + later)
    )


def _norm_backward(shape: LayerShape, step: Training) -> int:
    """Of a token: the gated norm's gradients; under a mask a tile's intermediate values in float32 too."""
    channels = shape.width * shape.mamba_head_dim
    tile = ceil(min(channels, GPU_VALUES / step.tokens)) if step.masked else 0
    return 3 * step.width * channels + TILE_TENSORS * FLOAT32_BYTES * tile


def _chunk_flops(model: ModelConfig, channels: int, tokens: int) -> int:
    """The four products of ssm.py: scores, what targets read of sources, the chunk's state, what reads the state."""
    scores = 2 * model.n_groups * tokens**2 * model.ssm_state_size
    within = 2 * channels * tokens**2
    states = 2 * 2 * channels * model.ssm_state_size * tokens
    return scores + within + states
