"""The elastic Nemotron-H: a hybrid of Mamba-2, attention and FFN layers that runs at any subnet.

A subnet is an argument. Every layer multiplies only the subnet's weights, which are views of prefixes (C3), so that
a step costs what the submodel costs. Parameters have the names and shapes of the stock checkpoint without its
`backbone.` prefix.

Shape suffixes, valid in the whole package:
    B batch   T tokens   D hidden   H ssm heads   P ssm head dim   G groups   N state   R heads in a group
    Q query heads   K key-value heads   E attention head dim   F ffn   V vocab   C chunks
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.config import ATTENTION, FFN, MAMBA, ModelConfig
from elastic_core.kernels import Backend, BackendName, select_backend
from elastic_core.subnet import Masks, Subnet

Take = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class Cache:
    """What decoding carries from one call to the next, at one subnet: a layer's index to its states."""

    conv: dict[int, Tensor] = field(default_factory=dict)
    ssm: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


def prefix(weight: Tensor, size: int, dim: int) -> Tensor:
    """The first `size` entries of `weight` along `dim`, as a view."""
    return weight if weight.shape[dim] == size else weight.narrow(dim, 0, size)


def group_prefix(weight: Tensor, dim: int, layout: tuple[int, int, int], heads: int, channels: int) -> Tensor:
    """Keep, along `dim` laid out [group, head in group, channel], the first heads of each group and their channels.

    `heads` and `channels` are the numbers kept, per group and per head. A copy unless everything is kept.
    """
    if layout[1:] == (heads, channels):
        return weight
    grouped: Tensor = weight.unflatten(dim, layout)
    kept: Tensor = grouped.narrow(dim + 1, 0, heads).narrow(dim + 2, 0, channels).flatten(dim, dim + 2)
    return kept


class RMSNorm(nn.Module):
    """Root-mean-square norm over the hidden channels, in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor, mask_D: Tensor | None = None) -> Tensor:
        """Under a mask, which `x_BTD` already carries, the mean is over the channels that the mask keeps."""
        wide = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        weight = prefix(self.weight, x_BTD.shape[-1], 0).to(wide.dtype)
        if mask_D is None:
            return F.rms_norm(wide, weight.shape, weight, self.eps).to(x_BTD.dtype)
        variance = wide.square().sum(-1, keepdim=True) / mask_D.to(wide.dtype).sum()
        return (wide * torch.rsqrt(variance + self.eps) * weight).to(x_BTD.dtype)


class MambaMixer(nn.Module):
    """Mamba-2 with a grouped gated norm (arXiv 2405.21060)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.ordinal = config, layer, config.ordinal(layer)
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

    def forward(
        self, x_BTD: Tensor, subnet: Subnet, masks: Masks | None, cache: Cache | None, backend: Backend
    ) -> Tensor:
        config, hidden = self.config, subnet.hidden
        heads, head_dim = subnet.mamba_heads[self.ordinal], subnet.mamba_head_dim
        in_group = heads // config.n_groups
        layout = (config.n_groups, config.mamba_num_heads // config.n_groups, config.mamba_head_dim)

        def channels(weight: Tensor, dim: int = 0) -> Tensor:
            return group_prefix(weight, dim, layout, in_group, head_dim)

        def per_head(weight: Tensor) -> Tensor:
            return group_prefix(weight, 0, (*layout[:2], 1), in_group, 1)

        projected = F.linear(x_BTD, self._in_proj_weight(hidden, channels, per_head))
        z, xBC, dt = projected.split([heads * head_dim, heads * head_dim + config.state_rows, heads], dim=-1)

        conv_weight, conv_bias = self._conv_weights(channels)
        xBC, conv_tail = backend.conv(xBC, conv_weight, conv_bias, cache.conv.get(self.layer) if cache else None)
        x, B_BTGN, C_BTGN = xBC.split([heads * head_dim, *(config.state_rows // 2,) * 2], dim=-1)
        x_BTHP = x.unflatten(-1, (heads, head_dim))
        B_BTGN = B_BTGN.unflatten(-1, (config.n_groups, config.ssm_state_size))
        C_BTGN = C_BTGN.unflatten(-1, (config.n_groups, config.ssm_state_size))

        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        dt_BTH = F.softplus(dt.to(wide) + per_head(self.dt_bias).to(wide)).clamp(min=config.time_step_min)
        A_H = -per_head(self.A_log).to(wide).exp()
        D_H = per_head(self.D).to(wide)
        state = cache.ssm.get(self.layer) if cache else None
        if state is not None and x_BTD.shape[1] == 1:
            y, state = backend.step(x_BTHP[:, 0], dt_BTH[:, 0], A_H, B_BTGN[:, 0], C_BTGN[:, 0], D_H, state)
            y_BTHP = y.unsqueeze(1)
        else:
            y_BTHP, state = backend.scan(
                x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, chunk_size=config.chunk_size, initial_state_BHPN=state
            )
        if cache is not None:
            cache.conv[self.layer], cache.ssm[self.layer] = conv_tail, state

        mask = masks.mamba_channels(self.ordinal, config.n_groups) if masks else None
        y = backend.gated_norm(
            y_BTHP.flatten(-2), z, channels(self.norm.weight), config.n_groups, config.layer_norm_epsilon, mask
        )
        return F.linear(y, channels(prefix(self.out_proj.weight, hidden, 0), 1))

    def _in_proj_weight(self, hidden: int, channels: Take, per_head: Take) -> Tensor:
        """Rows [z, x, B, C, dt] of in_proj that the subnet keeps."""
        config = self.config
        weight = prefix(self.in_proj.weight, hidden, 1)
        z, x, states, dt = weight.split([config.mamba_size, config.mamba_size, config.state_rows, len(self.A_log)])
        z, x, dt = channels(z), channels(x), per_head(dt)
        if len(z) == config.mamba_size:
            return weight
        return torch.cat([z, x, states, dt])

    def _conv_weights(self, channels: Take) -> tuple[Tensor, Tensor | None]:
        """Filters (channels, kernel) and biases of the channels [x, B, C] that the subnet keeps."""

        def kept(weight: Tensor) -> Tensor:
            x, states = weight.split([self.config.mamba_size, self.config.state_rows])
            kept_x = channels(x)
            return weight if len(kept_x) == len(x) else torch.cat([kept_x, states])

        bias = self.conv1d.bias
        return kept(self.conv1d.weight.squeeze(1)), kept(bias) if bias is not None else None


class Attention(nn.Module):
    """Causal grouped-query attention without positional encoding; key and value heads are never pruned."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.ordinal = config, layer, config.ordinal(layer)
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, subnet: Subnet, masks: Masks | None, cache: Cache | None, backend: Backend
    ) -> Tensor:
        config, hidden = self.config, subnet.hidden
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        layout = (kv_heads, config.num_attention_heads // kv_heads, head_dim)
        in_group = subnet.attention_heads[self.ordinal] // kv_heads

        def project(weight: Tensor) -> Tensor:
            heads: Tensor = F.linear(x_BTD, prefix(weight, hidden, 1)).unflatten(-1, (-1, head_dim))
            return heads.transpose(1, 2)

        q_BQTE = project(group_prefix(self.q_proj.weight, 0, layout, in_group, head_dim))
        k_BKTE, v_BKTE = project(self.k_proj.weight), project(self.v_proj.weight)
        causal, seen = None, 0
        if cache is not None:
            if self.layer in cache.keys:
                seen = cache.keys[self.layer].shape[2]
                k_BKTE = torch.cat([cache.keys[self.layer], k_BKTE], dim=2)
                v_BKTE = torch.cat([cache.values[self.layer], v_BKTE], dim=2)
            cache.keys[self.layer], cache.values[self.layer] = k_BKTE, v_BKTE
        if seen:
            causal = torch.ones(q_BQTE.shape[2], k_BKTE.shape[2], dtype=torch.bool, device=x_BTD.device).tril(seen)
        y_BQTE = F.scaled_dot_product_attention(
            q_BQTE, k_BKTE, v_BKTE, attn_mask=causal, is_causal=not seen, enable_gqa=True
        )
        y = y_BQTE.transpose(1, 2).flatten(-2)
        if masks is not None:
            y = y * masks.query_channels(self.ordinal, kv_heads, head_dim).to(y.dtype)
        return F.linear(y, group_prefix(prefix(self.o_proj.weight, hidden, 0), 1, layout, in_group, head_dim))


class FeedForward(nn.Module):
    """Two projections around a squared ReLU, not gated."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ordinal = config.ordinal(layer)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_sizes[self.ordinal], bias=False)
        self.down_proj = nn.Linear(config.ffn_sizes[self.ordinal], config.hidden_size, bias=False)

    def forward(
        self, x_BTD: Tensor, subnet: Subnet, masks: Masks | None, cache: Cache | None, backend: Backend
    ) -> Tensor:
        hidden, ffn = subnet.hidden, subnet.ffn[self.ordinal]
        h_BTF = F.relu(F.linear(x_BTD, prefix(prefix(self.up_proj.weight, ffn, 0), hidden, 1))).square()
        if masks is not None:
            h_BTF = h_BTF * masks.ffn_F[self.ordinal].to(h_BTF.dtype)
        return F.linear(h_BTF, prefix(prefix(self.down_proj.weight, hidden, 0), ffn, 1))


class Layer(nn.Module):
    """One residual layer: a norm and a mixer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mixers = {MAMBA: MambaMixer, ATTENTION: Attention, FFN: FeedForward}
        self.index = layer
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = mixers[config.hybrid_override_pattern[layer]](config, layer)

    def forward(
        self, x_BTD: Tensor, subnet: Subnet, masks: Masks | None, cache: Cache | None, backend: Backend
    ) -> Tensor:
        mask_D = masks.hidden_D if masks else None
        update: Tensor = self.mixer(self.norm(x_BTD, mask_D), subnet, masks, cache, backend)
        if masks is not None:
            update = update * (masks.layers_L[self.index] * masks.hidden_D).to(update.dtype)
        return x_BTD + update


class ElasticNemotronH(nn.Module):
    """A Nemotron-H language model that runs at any subnet of itself."""

    def __init__(self, config: ModelConfig, backend: BackendName = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, tokens_BT: Tensor, subnet: Subnet, masks: Masks | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Last hidden states (B, T, subnet.hidden), after the final norm.

        `masks` weigh the widths of `subnet`, which encloses every choice that has weight. With a `cache`, the tokens
        continue those that the cache has seen, at the same subnet.
        """
        backend = select_backend(self.backend, tokens_BT.device)
        x_BTD = F.embedding(tokens_BT, prefix(self.embeddings.weight, subnet.hidden, 1))
        if masks is not None:
            x_BTD = x_BTD * masks.hidden_D.to(x_BTD.dtype)
        for index in subnet.layers:
            x_BTD = self.layers[index](x_BTD, subnet, masks, cache, backend)
        hidden_BTD: Tensor = self.norm_f(x_BTD, masks.hidden_D if masks else None)
        return hidden_BTD

    def head_weight(self, hidden: int) -> Tensor:
        """The output head over the first `hidden` channels, (V, hidden)."""
        return prefix(self.lm_head.weight, hidden, 1)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of last hidden states, in at least float32."""
        logits_BTV = F.linear(hidden_BTD, self.head_weight(hidden_BTD.shape[-1]))
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: normal, residual projections over sqrt(layers), A and dt as Mamba-2 draws them."""
        config = self.config
        for name, weight in self.named_parameters():
            if name.endswith("norm.weight") or name.endswith("norm_f.weight") or name.endswith(".D"):
                weight.fill_(1.0)
            elif name.endswith("A_log"):
                weight.copy_(torch.arange(1, len(weight) + 1).log())
            elif name.endswith("dt_bias"):
                low, high = math.log(config.time_step_min), math.log(config.time_step_max)
                dt = torch.empty_like(weight).uniform_(low, high, generator=generator).exp()
                dt = dt.clamp(min=config.time_step_floor)
                weight.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif "conv1d" in name:
                bound = config.conv_kernel**-0.5
                weight.uniform_(-bound, bound, generator=generator)
            else:
                residual = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
                std = config.initializer_range / (math.sqrt(config.num_layers) if residual else 1.0)
                weight.normal_(0.0, std, generator=generator)
