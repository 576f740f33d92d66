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
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic_core.geometry import ATTENTION, FFN, MAMBA, ModelConfig
from elastic_core.layers.kernels import Backend, BackendName, select_backend
from elastic_core.layers.packing import Packing
from elastic_core.layers.ssm import joined, segments, time_steps
from elastic_core.subnet import Masks, Subnet

# The views of a weight that a subnet keeps. Given the weight's gradient, the same views of that.
Parts = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True, slots=True)
class MambaWeights:
    """A Mamba layer's weights at one subnet; `conv` (channels, taps), `conv_bias` None where there is none."""

    in_proj: Tensor
    conv: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor
    out_proj: Tensor


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """An attention layer's weights at one subnet."""

    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    """An FFN layer's weights at one subnet."""

    up_proj: Tensor
    down_proj: Tensor


@dataclass(slots=True)
class Cache:
    """What decoding carries from one call to the next, at one subnet: a layer's index to its states and its weights.

    The weights are taken once a text, and not once a token: some must be gathered from inside groups.
    """

    conv: dict[int, Tensor] = field(default_factory=dict)
    ssm: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Any] = field(default_factory=dict)


W = TypeVar("W", MambaWeights, AttentionWeights, FeedForwardWeights)


def weights_at(subnet: Subnet, layer: int, cache: Cache | None, choose: Callable[[Subnet], W]) -> W:
    """The weights that a layer's mixer chooses at `subnet`, or chose when the cache first saw the layer."""
    if cache is None:
        return choose(subnet)
    if layer not in cache.weights:
        cache.weights[layer] = choose(subnet)
    chosen: W = cache.weights[layer]
    return chosen


def take(weight: Tensor, parts: Parts, dim: int = 0) -> Tensor:
    """The parts of `weight` that a subnet keeps, joined along `dim`; a view where one prefix is all it takes.

    A part may split `dim` into several dimensions; they are joined again. The gradient is added to those parts of
    `weight.grad` in place: autograd's own way, a zero tensor as large as the full weight for each use of a small
    prefix, would make a small subnet's step cost what the full one costs (C3).
    """
    kept = parts(weight)
    if sum(part.numel() for part in kept) == weight.numel():
        return weight
    if torch.is_grad_enabled() and weight.requires_grad:
        taken: Tensor = _Take.apply(weight, parts, dim)  # type: ignore[no-untyped-call]
        return taken
    return _join(kept, dim, weight.ndim)


def prefix(weight: Tensor, *sizes: int) -> Tensor:
    """The first `sizes[d]` entries of `weight` along each of its first dimensions; see `take`."""
    if weight.shape[: len(sizes)] == sizes:
        return weight
    return take(weight, lambda full: [full[tuple(slice(size) for size in sizes)]])


def is_matrix(weight: Tensor) -> bool:
    """Whether a weight is a matrix, and not one of the few and small others: norms, A_log, D, dt_bias, convolutions.

    Those are computed in float32, whatever the matrices are multiplied in, keep the type that they are stored in, and
    do not decay: a decayed A_log or dt_bias forgets at another speed, and a decayed norm only trades size with the
    matrix that follows.
    """
    return weight.ndim == 2


def _join(parts: list[Tensor], dim: int, ndim: int) -> Tensor:
    flat = [part.flatten(dim, dim + part.ndim - ndim) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim)


def _gradient(weight: Tensor) -> Tensor:
    """The gradient of a leaf, zero if there is none yet."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Take(torch.autograd.Function):
    """`take` with a gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parts: Parts, dim: int) -> Tensor:
        assert weight.is_leaf, "the gradient of a part is added to the gradient of a leaf"
        ctx.weight, ctx.parts, ctx.dim = weight, parts, dim
        return _join(parts(weight), dim, weight.ndim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        start = 0
        for part in ctx.parts(_gradient(ctx.weight)):
            size = math.prod(part.shape[ctx.dim : ctx.dim + part.ndim - grad.ndim + 1])
            part.add_(grad.narrow(ctx.dim, start, size).reshape(part.shape))
            start += size
        return None, None, None


def _sums_by_token(tokens_T: Tensor, values_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The values of equal tokens summed in float32: the sorted tokens, and the sum at the first of each, else zeros.

    A sum in bfloat16 stops growing after a few hundred terms, and a common token has thousands. Sizes do not depend on
    the data, so that nothing waits for the device.
    """
    sorted_T, order_T = tokens_T.sort(stable=True)
    sums_TD = torch.zeros_like(values_TD, dtype=torch.float32)
    sums_TD.index_put_((torch.searchsorted(sorted_T, sorted_T),), values_TD[order_T].float(), accumulate=True)
    return sorted_T, sums_TD


class _Embed(torch.autograd.Function):
    """Rows of the embedding at a hidden size; only the rows that were read get a gradient, in place."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens_BT: Tensor, hidden: int) -> Tensor:
        ctx.weight, ctx.hidden = weight, hidden
        ctx.save_for_backward(tokens_BT)
        return F.embedding(tokens_BT, weight[:, :hidden])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[None, None, None]:
        (tokens_BT,) = ctx.saved_tensors
        gradient = _gradient(ctx.weight)[:, : ctx.hidden]
        rows, values = tokens_BT, grad_BTD
        if gradient.dtype.itemsize < torch.float32.itemsize:
            rows, values = _sums_by_token(tokens_BT.flatten(), grad_BTD.flatten(0, 1))
        # Not index_add_, whose order of addition on CUDA changes from run to run (C6).
        gradient.index_put_((rows,), values.to(gradient.dtype), accumulate=True)
        return None, None, None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the hidden channels, in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BTD: Tensor, mask_D: Tensor | None = None) -> Tensor:
        """Under a mask, which `x_BTD` already carries, the mean is over the channels that the mask keeps."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        weight = prefix(self.weight, x_BTD.shape[-1]).to(dtype)
        kept = None if mask_D is None else mask_D.to(dtype).sum()

        outputs = []
        for segment_BTD in segments(x_BTD):
            wide = segment_BTD.to(dtype)
            if kept is None:
                normed = F.rms_norm(wide, weight.shape, weight, self.eps)
            else:
                normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / kept + self.eps) * weight
            outputs.append(normed.to(x_BTD.dtype))
        return joined(outputs)


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
        self,
        x_BTD: Tensor,
        subnet: Subnet,
        masks: Masks | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None = None,
    ) -> Tensor:
        config = self.config
        heads, head_dim = subnet.mamba_heads[self.ordinal], subnet.mamba_head_dim
        weights = weights_at(subnet, self.layer, cache, self.weights)

        projected = F.linear(x_BTD, weights.in_proj)
        z, xBC, dt = projected.split([heads * head_dim, heads * head_dim + config.state_rows, heads], dim=-1)

        conv_tail = cache.conv.get(self.layer) if cache else None
        xBC, conv_tail = backend.conv(xBC, weights.conv, weights.conv_bias, conv_tail, packing)
        x, B_BTGN, C_BTGN = xBC.split([heads * head_dim, *(config.state_rows // 2,) * 2], dim=-1)
        x_BTHP = x.unflatten(-1, (heads, head_dim))
        B_BTGN = B_BTGN.unflatten(-1, (config.n_groups, config.ssm_state_size))
        C_BTGN = C_BTGN.unflatten(-1, (config.n_groups, config.ssm_state_size))

        dt_BTH = time_steps(dt, weights.dt_bias, config.time_step_limit)
        A_H = -weights.A_log.to(dt_BTH.dtype).exp()
        D_H = weights.D.to(dt_BTH.dtype)
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

        mask = masks.mamba_channels(self.ordinal, config.n_groups) if masks else None
        y = backend.gated_norm(y_BTHP.flatten(-2), z, weights.norm, config.n_groups, config.layer_norm_epsilon, mask)
        return F.linear(y, weights.out_proj)

    def weights(self, subnet: Subnet) -> MambaWeights:
        """What `subnet` keeps: of each group the first heads, and the first channels of each of them."""
        config, hidden = self.config, subnet.hidden
        heads, head_dim = subnet.mamba_heads[self.ordinal] // config.n_groups, subnet.mamba_head_dim
        layout = (config.n_groups, config.mamba_num_heads // config.n_groups, config.mamba_head_dim)

        def channels(weight: Tensor, dim: int = 0) -> Tensor:
            grouped: Tensor = weight.unflatten(dim, layout)
            return grouped.narrow(dim + 1, 0, heads).narrow(dim + 2, 0, head_dim)

        def per_head(weight: Tensor) -> Tensor:
            grouped: Tensor = weight.unflatten(0, layout[:2])
            return grouped.narrow(1, 0, heads)

        def in_proj(weight: Tensor) -> list[Tensor]:
            sizes = [config.mamba_size, config.mamba_size, config.state_rows, config.mamba_num_heads]
            z, x, states, dt = weight[:, :hidden].split(sizes)
            return [channels(z), channels(x), states, per_head(dt)]

        def conv(weight: Tensor) -> list[Tensor]:
            x, states = weight.split([config.mamba_size, config.state_rows])
            return [channels(x), states]

        return MambaWeights(
            in_proj=take(self.in_proj.weight, in_proj),
            conv=take(self.conv1d.weight, conv).squeeze(1),
            conv_bias=take(self.conv1d.bias, conv) if self.conv1d.bias is not None else None,
            dt_bias=take(self.dt_bias, lambda weight: [per_head(weight)]),
            A_log=take(self.A_log, lambda weight: [per_head(weight)]),
            D=take(self.D, lambda weight: [per_head(weight)]),
            norm=take(self.norm.weight, lambda weight: [channels(weight)]),
            out_proj=take(self.out_proj.weight, lambda weight: [channels(weight[:hidden], 1)], 1),
        )


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
        self,
        x_BTD: Tensor,
        subnet: Subnet,
        masks: Masks | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None = None,
    ) -> Tensor:
        kv_heads, head_dim = self.config.num_key_value_heads, self.config.head_dim
        weights = weights_at(subnet, self.layer, cache, self.weights)

        def project(weight: Tensor) -> Tensor:
            heads: Tensor = F.linear(x_BTD, weight).unflatten(-1, (-1, head_dim))
            return heads.transpose(1, 2)

        q_BQTE, k_BKTE, v_BKTE = project(weights.q_proj), project(weights.k_proj), project(weights.v_proj)
        if cache is not None:
            if self.layer in cache.keys:
                k_BKTE = torch.cat([cache.keys[self.layer], k_BKTE], dim=2)
                v_BKTE = torch.cat([cache.values[self.layer], v_BKTE], dim=2)
            cache.keys[self.layer], cache.values[self.layer] = k_BKTE, v_BKTE
        tokens, seen = q_BQTE.shape[2], k_BKTE.shape[2]
        causal = None  # a first piece needs no mask in memory, nor does a single token, which sees all
        if 1 < tokens < seen:
            causal = torch.ones(tokens, seen, dtype=torch.bool, device=x_BTD.device).tril(seen - tokens)
        if packing is not None:
            y_BQTE = _attend_in_documents(q_BQTE, k_BKTE, v_BKTE, packing)
        else:
            y_BQTE = F.scaled_dot_product_attention(
                q_BQTE, k_BKTE, v_BKTE, attn_mask=causal, is_causal=tokens == seen, enable_gqa=True
            )
        y = y_BQTE.transpose(1, 2).flatten(-2)
        if masks is not None:
            y = y * masks.query_channels(self.ordinal, kv_heads, head_dim).to(y.dtype)
        return F.linear(y, weights.o_proj)

    def weights(self, subnet: Subnet) -> AttentionWeights:
        """What `subnet` keeps: of each KV group the first query heads, and every key and value head."""
        config, hidden = self.config, subnet.hidden
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        in_group = subnet.attention_heads[self.ordinal] // kv_heads
        layout = (kv_heads, config.num_attention_heads // kv_heads, head_dim)
        return AttentionWeights(
            q_proj=take(self.q_proj.weight, lambda weight: [weight[:, :hidden].unflatten(0, layout)[:, :in_group]]),
            k_proj=prefix(self.k_proj.weight, kv_heads * head_dim, hidden),
            v_proj=prefix(self.v_proj.weight, kv_heads * head_dim, hidden),
            o_proj=take(self.o_proj.weight, lambda weight: [weight[:hidden].unflatten(1, layout)[:, :, :in_group]], 1),
        )


def _attend_in_documents(q_BQTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, packing: Packing) -> Tensor:
    """Causal attention of each document by itself.

    A mask of T x T values would not fit at long lengths, and pairs of tokens of two documents cost nothing here. Each
    document is exactly what it is alone, on every device and in every type.
    """
    outputs: list[list[Tensor]] = [[] for _ in q_BQTE]
    for row, first, end in packing.spans:
        q_1QTE, k_1KTE, v_1KTE = (t[row : row + 1, :, first:end] for t in (q_BQTE, k_BKTE, v_BKTE))
        y_1QTE = F.scaled_dot_product_attention(q_1QTE, k_1KTE, v_1KTE, is_causal=True, enable_gqa=True)
        outputs[row].append(y_1QTE)
    return torch.cat([torch.cat(of_row, dim=2) for of_row in outputs])


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2, whose slope is 2 relu(x): autograd's own backward would take the square and the ReLU one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        slope: Tensor = grad * positive
        return slope.mul_(2)


def _squared_relu_(x: Tensor) -> Tensor:
    """relu(x)^2, in place where no gradient is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        squared: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
        return squared
    return x.relu_().square_()


class FeedForward(nn.Module):
    """Two projections around a squared ReLU, not gated."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.ordinal = layer, config.ordinal(layer)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_sizes[self.ordinal], bias=False)
        self.down_proj = nn.Linear(config.ffn_sizes[self.ordinal], config.hidden_size, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        subnet: Subnet,
        masks: Masks | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None = None,
    ) -> Tensor:
        weights = weights_at(subnet, self.layer, cache, self.weights)
        h_BTF = _squared_relu_(F.linear(x_BTD, weights.up_proj))
        if masks is not None:
            h_BTF = h_BTF * masks.ffn_F[self.ordinal].to(h_BTF.dtype)
        return F.linear(h_BTF, weights.down_proj)

    def weights(self, subnet: Subnet) -> FeedForwardWeights:
        """What `subnet` keeps: the first neurons."""
        hidden, ffn = subnet.hidden, subnet.ffn[self.ordinal]
        return FeedForwardWeights(
            up_proj=prefix(self.up_proj.weight, ffn, hidden), down_proj=prefix(self.down_proj.weight, hidden, ffn)
        )


class Layer(nn.Module):
    """One residual layer: a norm and a mixer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        mixers = {MAMBA: MambaMixer, ATTENTION: Attention, FFN: FeedForward}
        self.index = layer
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = mixers[config.hybrid_override_pattern[layer]](config, layer)

    def forward(
        self,
        x_BTD: Tensor,
        subnet: Subnet,
        masks: Masks | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None = None,
    ) -> Tensor:
        mask_D = masks.hidden_D if masks else None
        update: Tensor = self.mixer(self.norm(x_BTD, mask_D), subnet, masks, cache, backend, packing)
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
        self,
        tokens_BT: Tensor,
        subnet: Subnet,
        masks: Masks | None = None,
        cache: Cache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, subnet.hidden), after the final norm.

        `masks` weigh the widths of `subnet`, which encloses every choice that has weight. With a `cache`, the tokens
        continue those that the cache has seen, at the same subnet. Each document of a `packing` is read as if it
        stood alone: no bit of its hidden states, or of a gradient of them, depends on the documents before it.
        """
        if packing is not None and cache is not None:
            raise ValueError("a cache holds one text a row; read packed documents without one")
        backend = select_backend(self.backend, tokens_BT.device)
        x_BTD = self._embed(tokens_BT, subnet.hidden)
        if masks is not None:
            x_BTD = x_BTD * masks.hidden_D.to(x_BTD.dtype)
        for index in subnet.layers:
            x_BTD = self.layers[index](x_BTD, subnet, masks, cache, backend, packing)
        hidden_BTD: Tensor = self.norm_f(x_BTD, masks.hidden_D if masks else None)
        return hidden_BTD

    def _embed(self, tokens_BT: Tensor, hidden: int) -> Tensor:
        weight = self.embeddings.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            x_BTD: Tensor = _Embed.apply(weight, tokens_BT, hidden)  # type: ignore[no-untyped-call]
        else:
            x_BTD = F.embedding(tokens_BT, weight[:, :hidden])
        device = x_BTD.device.type
        return x_BTD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_BTD

    def head_weight(self, hidden: int) -> Tensor:
        """The output head over the first `hidden` channels, (V, hidden)."""
        return prefix(self.lm_head.weight, self.config.vocab_size, hidden)

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
