"""A subnet: the complete shape of a submodel, the indices that it keeps, and what "smaller" means.

After `reorder` every subnet is a prefix (C2): of hidden channels and FFN neurons, of the Mamba heads inside each SSM
group and the channels inside each Mamba head, of the query heads inside each KV group. Layers are kept by rank.
Training masks, prefix views and slices all derive from this file.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_core.geometry import ATTENTION, FFN, MAMBA, Axes, ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """One value per axis.

    `ffn`, `mamba_heads` and `attention_heads` have one entry for each layer of their kind in the full model, whether
    or not the layer is kept; `layers` holds the kept layers' indices in the full model, rising.
    """

    hidden: int
    ffn: tuple[int, ...]
    mamba_heads: tuple[int, ...]
    mamba_head_dim: int
    attention_heads: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.layers)


def full_subnet(model: ModelConfig) -> Subnet:
    """The subnet that is the whole model."""
    return Subnet(
        hidden=model.hidden_size,
        ffn=model.ffn_sizes,
        mamba_heads=(model.mamba_num_heads,) * len(model.layers_of(MAMBA)),
        mamba_head_dim=model.mamba_head_dim,
        attention_heads=(model.num_attention_heads,) * len(model.layers_of(ATTENTION)),
        layers=tuple(range(model.num_layers)),
    )


def smallest_subnet(model: ModelConfig, axes: Axes, layer_ranking: Sequence[int]) -> Subnet:
    """The subnet with the smallest choice on every (bound) axis."""
    return Subnet(
        hidden=axes.hidden[-1],
        ffn=tuple(min(axes.ffn[-1], width) for width in model.ffn_sizes),
        mamba_heads=(axes.mamba_heads[-1],) * len(model.layers_of(MAMBA)),
        mamba_head_dim=axes.mamba_head_dim[-1],
        attention_heads=(axes.attention_heads[-1],) * len(model.layers_of(ATTENTION)),
        layers=keep_layers(layer_ranking, axes.depth[-1]),
    )


def keep_layers(layer_ranking: Sequence[int], depth: int) -> tuple[int, ...]:
    """The `depth` most important layers, in model order; `layer_ranking` lists all layers, most important first."""
    return tuple(sorted(layer_ranking[:depth]))


def is_nested(small: Subnet, large: Subnet) -> bool:
    """Whether `small` lies within `large` on every axis and in every layer, kept or not."""
    return (
        small.hidden <= large.hidden
        and small.mamba_head_dim <= large.mamba_head_dim
        and set(small.layers) <= set(large.layers)
        and all(s <= b for s, b in zip(small.ffn, large.ffn, strict=True))
        and all(s <= b for s, b in zip(small.mamba_heads, large.mamba_heads, strict=True))
        and all(s <= b for s, b in zip(small.attention_heads, large.attention_heads, strict=True))
    )


def within(small: Subnet, large: Subnet, model: ModelConfig) -> Subnet:
    """`small` as a subnet of the stock model that `large` is cut out to; both are subnets of `model`.

    Raises ValueError where `small` is not nested in `large`.
    """
    if not is_nested(small, large):
        raise ValueError(f"subnet is not nested in the larger one: {small} against {large}")

    def kept(kind: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sizes[model.ordinal(i)] for i in large.layers if model.hybrid_override_pattern[i] == kind)

    return dataclasses.replace(
        small,
        ffn=kept(FFN, small.ffn),
        mamba_heads=kept(MAMBA, small.mamba_heads),
        attention_heads=kept(ATTENTION, small.attention_heads),
        layers=tuple(large.layers.index(layer) for layer in small.layers),
    )


def check_subnet(subnet: Subnet, model: ModelConfig) -> None:
    """Raise ValueError unless `subnet` is a valid shape inside `model`."""
    full = full_subnet(model)
    for name in ("ffn", "mamba_heads", "attention_heads"):
        if len(getattr(subnet, name)) != len(getattr(full, name)):
            raise ValueError(
                f"subnet.{name} has {len(getattr(subnet, name))} entries; the model has {len(getattr(full, name))} "
                "such layers"
            )
    sizes = [subnet.hidden, subnet.mamba_head_dim, *subnet.ffn, *subnet.mamba_heads, *subnet.attention_heads]
    if min(sizes) < 1 or not subnet.layers or list(subnet.layers) != sorted(set(subnet.layers)):
        raise ValueError(f"subnet has a size below 1 or layers out of order: {subnet}")
    if not is_nested(subnet, full):
        raise ValueError(f"subnet is larger than the model: {subnet} against {full}")
    for heads in subnet.mamba_heads:
        if heads % model.n_groups:
            raise ValueError(f"subnet.mamba_heads={heads} is not a multiple of n_groups={model.n_groups}")
    for heads in subnet.attention_heads:
        if heads % model.num_key_value_heads:
            raise ValueError(
                f"subnet.attention_heads={heads} is not a multiple of num_key_value_heads={model.num_key_value_heads}"
            )


def sliced_config(model: ModelConfig, subnet: Subnet) -> ModelConfig:
    """Geometry of the stock model that `subnet` is cut out to.

    Raises ValueError when kept layers differ in Mamba or attention heads, which no inference engine loads.
    """
    check_subnet(subnet, model)
    kept_ffn = tuple(subnet.ffn[model.ordinal(i)] for i in subnet.layers if model.hybrid_override_pattern[i] == FFN)
    return dataclasses.replace(
        model,
        hybrid_override_pattern="".join(model.hybrid_override_pattern[i] for i in subnet.layers),
        hidden_size=subnet.hidden,
        intermediate_size=kept_ffn if len(set(kept_ffn)) > 1 else max(kept_ffn, default=max(subnet.ffn, default=1)),
        num_attention_heads=_one_size(model, subnet, ATTENTION, subnet.attention_heads, model.num_attention_heads),
        mamba_num_heads=_one_size(model, subnet, MAMBA, subnet.mamba_heads, model.mamba_num_heads),
        mamba_head_dim=subnet.mamba_head_dim,
    )


def _one_size(model: ModelConfig, subnet: Subnet, kind: str, sizes: tuple[int, ...], default: int) -> int:
    kept = {i: sizes[model.ordinal(i)] for i in subnet.layers if model.hybrid_override_pattern[i] == kind}
    if len(set(kept.values())) > 1:
        first = next(iter(kept))
        other = next(i for i in kept if kept[i] != kept[first])
        name = "Mamba" if kind == MAMBA else "attention"
        raise ValueError(
            f"layer {other} keeps {kept[other]} {name} heads and layer {first} keeps {kept[first]}; no engine loads "
            "heads that differ by layer, so this subnet cannot be sliced"
        )
    return next(iter(kept.values()), default)


# Kept indices. A Mamba layer's channels are laid out [group, head in group, channel in head]; the rows of in_proj are
# [z, x, B, C, dt], the channels of conv1d [x, B, C]. Query heads are laid out [kv head, query in kv head, channel].


def mamba_channels(model: ModelConfig, heads: int, head_dim: int) -> Tensor:
    """Indices of the Mamba channels kept with `heads` heads of `head_dim` channels, (heads * head_dim,)."""
    shape = (model.n_groups, model.mamba_num_heads // model.n_groups, model.mamba_head_dim)
    grid = torch.arange(model.mamba_size).view(shape)
    return grid[:, : heads // model.n_groups, :head_dim].flatten()


def mamba_heads(model: ModelConfig, heads: int) -> Tensor:
    """Indices of the Mamba heads kept with `heads` heads, (heads,)."""
    return torch.arange(model.mamba_num_heads).view(model.n_groups, -1)[:, : heads // model.n_groups].flatten()


def query_channels(model: ModelConfig, heads: int) -> Tensor:
    """Indices of the query channels kept with `heads` query heads, (heads * head_dim,)."""
    shape = (model.num_key_value_heads, -1, model.head_dim)
    grid = torch.arange(model.num_attention_heads * model.head_dim).view(shape)
    return grid[:, : heads // model.num_key_value_heads].flatten()


def in_proj_rows(model: ModelConfig, channels: Tensor, heads: Tensor) -> Tensor:
    """Indices of the rows of in_proj, in their order [z, x, B, C, dt], for these Mamba channels and heads."""
    states = torch.arange(model.state_rows)
    x_start, state_start = model.mamba_size, 2 * model.mamba_size
    dt_start = state_start + model.state_rows
    return torch.cat([channels, x_start + channels, state_start + states, dt_start + heads])


def conv_channels(model: ModelConfig, channels: Tensor) -> Tensor:
    """Indices of the channels of conv1d, in their order [x, B, C], for these Mamba channels."""
    return torch.cat([channels, model.mamba_size + torch.arange(model.state_rows)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """Differentiable masks over the widths of an enclosing subnet, with values in [0, 1].

    Each mask falls along its axis, because it is a weighted sum of prefixes. `ffn_F` (width,), `mamba_heads_R` (heads
    in a group,) and `query_heads_R` (queries in a KV group,) have one entry a layer of their kind; `layers_L` has one
    gate a layer of the full model. A mask of ones is the enclosing subnet itself.
    """

    hidden_D: Tensor
    ffn_F: tuple[Tensor, ...]
    mamba_heads_R: tuple[Tensor, ...]
    mamba_head_dim_P: Tensor
    query_heads_R: tuple[Tensor, ...]
    layers_L: Tensor

    def mamba_channels(self, ordinal: int, n_groups: int) -> Tensor:
        """The mask over the channels [group, head in group, channel in head] of one Mamba layer."""
        return (self.mamba_heads_R[ordinal][:, None] * self.mamba_head_dim_P).repeat(n_groups, 1).flatten()

    def query_channels(self, ordinal: int, num_key_value_heads: int, head_dim: int) -> Tensor:
        """The mask over the query channels [kv head, query in kv head, channel] of one attention layer."""
        return self.query_heads_R[ordinal].repeat(num_key_value_heads).repeat_interleave(head_dim)
