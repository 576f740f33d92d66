"""A subnet: the complete shape of a submodel, what it keeps of each layer, and what "smaller" means.

After `reorder` every subnet is a prefix (C2): of hidden channels and FFN neurons, of the Mamba heads inside each SSM
group and the channels inside each Mamba head, of the query heads inside each KV group, of the routed experts inside
each expert group and the neurons inside each expert. Layers are kept by rank.
Training masks, prefix views and slices all derive from the sizes that a subnet has at a layer, and from the layouts of
the layer's tensors.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from elastic_core.geometry import BY_LAYER, FULL_SIZES, GROUPS, LAYER_AXES, MOE, Axes, ModelConfig
from elastic_core.layout import Kept
from elastic_core.schema import OPTIONAL

# How messages call the widths that no engine lets differ by layer.
_UNIFORM = {"mamba_heads": "Mamba heads", "attention_heads": "attention heads"}

# What a model without experts has for the fields of ModelConfig that describe them, and for the axes of a subnet.
_NO_EXPERTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig) if "optional" in f.metadata}
_NO_EXPERT_AXES = dict.fromkeys((axis for axis in Axes.SHARED if axis in LAYER_AXES[MOE]), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """One value per axis.

    `ffn`, `mamba_heads`, `attention_heads` and `expert_ffn` have one entry for each layer of their kind in the full
    model, whether or not the layer is kept; `layers` holds the kept layers' indices in the full model, rising. The axes
    of experts are empty or 0 in a model without experts, and `latent` is 0 where they read and write hidden channels.
    """

    hidden: int
    ffn: tuple[int, ...]
    mamba_heads: tuple[int, ...]
    mamba_head_dim: int
    attention_heads: tuple[int, ...]
    layers: tuple[int, ...]
    expert_ffn: tuple[int, ...] = field(default=(), metadata=OPTIONAL)
    experts: int = field(default=0, metadata=OPTIONAL)
    shared_ffn: int = field(default=0, metadata=OPTIONAL)
    top_k: int = field(default=0, metadata=OPTIONAL)
    latent: int = field(default=0, metadata=OPTIONAL)

    @property
    def depth(self) -> int:
        return len(self.layers)


def full_subnet(model: ModelConfig) -> Subnet:
    """The subnet that is the whole model."""
    sizes: dict[str, Any] = {axis: model.full_sizes(axis) for axis in Axes.WIDTHS}
    sizes |= {axis: getattr(model, FULL_SIZES[axis]) or 0 for axis in ("hidden", *Axes.SHARED)}
    sizes |= {} if sizes["expert_ffn"] else _NO_EXPERT_AXES
    return Subnet(layers=tuple(range(model.num_layers)), **sizes)


def smallest_subnet(model: ModelConfig, axes: Axes, layer_ranking: Sequence[int]) -> Subnet:
    """The subnet with the smallest choice on every (bound) axis."""
    sizes: dict[str, Any] = {
        axis: tuple(min(axes.choices(axis)[-1], full) for full in model.full_sizes(axis)) for axis in axes.widths
    }
    sizes |= {axis: axes.choices(axis)[-1] for axis in ("hidden", *axes.shared)}
    return Subnet(layers=keep_layers(layer_ranking, axes.depth[-1]), **sizes)


def keep_layers(layer_ranking: Sequence[int], depth: int) -> tuple[int, ...]:
    """The `depth` most important layers, in model order; `layer_ranking` lists all layers, most important first."""
    return tuple(sorted(layer_ranking[:depth]))


def is_nested(small: Subnet, large: Subnet) -> bool:
    """Whether `small` lies within `large` on every axis and in every layer, kept or not."""
    pairs = [((getattr(small, axis),), (getattr(large, axis),)) for axis in ("hidden", *Axes.SHARED)]
    pairs += [(getattr(small, axis), getattr(large, axis)) for axis in Axes.WIDTHS]
    fits = all(s <= b for sizes, bounds in pairs for s, b in zip(sizes, bounds, strict=True))
    return fits and set(small.layers) <= set(large.layers)


def within(small: Subnet, large: Subnet, model: ModelConfig) -> Subnet:
    """`small` as a subnet of the stock model that `large` is cut out to; both are subnets of `model`.

    Raises ValueError where `small` is not nested in `large`.
    """
    if not is_nested(small, large):
        raise ValueError(f"subnet is not nested in the larger one: {small} against {large}")

    sizes: dict[str, Any] = {axis: tuple(kept_sizes(small, model, axis, large.layers).values()) for axis in Axes.WIDTHS}
    sizes |= {} if sizes["expert_ffn"] else _NO_EXPERT_AXES
    return dataclasses.replace(small, layers=tuple(large.layers.index(layer) for layer in small.layers), **sizes)


def kept_sizes(subnet: Subnet, model: ModelConfig, axis: str, layers: Sequence[int]) -> dict[int, int]:
    """The width that `subnet` has on an axis in those of `layers` that have the axis, by layer."""
    having = set(layers).intersection(of_axis := model.layers_on(axis))
    return {layer: size for layer, size in zip(of_axis, getattr(subnet, axis), strict=True) if layer in having}


def check_subnet(subnet: Subnet, model: ModelConfig) -> None:
    """Raise ValueError unless `subnet` is a valid shape inside `model`."""
    full = full_subnet(model)
    sizes = [getattr(subnet, axis) for axis in ("hidden", *Axes.SHARED) if getattr(full, axis)]
    for axis in Axes.WIDTHS:
        of_layers, count = getattr(subnet, axis), len(model.layers_on(axis))
        if len(of_layers) != count:
            raise ValueError(f"subnet.{axis} has {len(of_layers)} entries; the model has {count} such layers")
        sizes += of_layers
    if min(sizes) < 1 or not subnet.layers or list(subnet.layers) != sorted(set(subnet.layers)):
        raise ValueError(f"subnet has a size below 1 or layers out of order: {subnet}")
    if not is_nested(subnet, full):
        raise ValueError(f"subnet is larger than the model: {subnet} against {full}")
    for axis, groups in GROUPS.items():
        for size in getattr(subnet, axis) if axis in Axes.WIDTHS else ():
            if size % model.groups(axis):
                raise ValueError(f"subnet.{axis}={size} is not a multiple of {groups}={model.groups(axis)}")
    if subnet.experts:
        model.check_routing("subnet.experts", subnet.experts, subnet.top_k)


def sliced_config(model: ModelConfig, subnet: Subnet) -> ModelConfig:
    """Geometry of the stock model that `subnet` is cut out to.

    Raises ValueError when kept layers differ in Mamba or attention heads, which no inference engine loads.
    """
    check_subnet(subnet, model)
    sizes: dict[str, Any] = {FULL_SIZES[axis]: getattr(subnet, axis) for axis in ("hidden", *Axes.SHARED)}
    sizes |= {FULL_SIZES[axis]: _one_size(model, subnet, axis) for axis in _UNIFORM}
    sizes["moe_latent_size"] = subnet.latent or None
    for axis in BY_LAYER:
        widths = tuple(kept_sizes(subnet, model, axis, subnet.layers).values())
        of_all = max(widths, default=max(getattr(subnet, axis), default=1))
        sizes[FULL_SIZES[axis]] = widths if len(set(widths)) > 1 else of_all
    pattern = "".join(model.hybrid_override_pattern[i] for i in subnet.layers)
    sizes |= {} if MOE in pattern else _NO_EXPERTS
    return dataclasses.replace(model, hybrid_override_pattern=pattern, **sizes)


def _one_size(model: ModelConfig, subnet: Subnet, axis: str) -> int:
    kept = kept_sizes(subnet, model, axis, subnet.layers)
    if len(set(kept.values())) > 1:
        first = next(iter(kept))
        other = next(i for i in kept if kept[i] != kept[first])
        raise ValueError(
            f"layer {other} keeps {kept[other]} {_UNIFORM[axis]} and layer {first} keeps {kept[first]}; no engine "
            "loads heads that differ by layer, so this subnet cannot be sliced"
        )
    full: int = getattr(model, FULL_SIZES[axis])
    return next(iter(kept.values()), full)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """Differentiable masks over the widths of an enclosing subnet, with values in [0, 1].

    Each mask falls along its axis, because it is a weighted sum of prefixes. The fields are those of a subnet: `hidden`
    (D,), `mamba_head_dim` (P,), `experts` (experts in a group,), `shared_ffn` (F,), `top_k` (chosen experts, the best
    first,), `latent` (channels,), and one entry a layer of `ffn` (F,), `mamba_heads` (heads in a group,),
    `attention_heads` (queries in a KV group,) and `expert_ffn` (F,). `layers` (L,) has one gate a layer of the full
    model. Masks of ones are the enclosing subnet itself.
    """

    hidden: Tensor
    ffn: tuple[Tensor, ...]
    mamba_heads: tuple[Tensor, ...]
    mamba_head_dim: Tensor
    attention_heads: tuple[Tensor, ...]
    layers: Tensor
    expert_ffn: tuple[Tensor, ...] = ()
    experts: Tensor | None = None
    shared_ffn: Tensor | None = None
    top_k: Tensor | None = None
    latent: Tensor | None = None


def sizes_at(subnet: Subnet, model: ModelConfig, layer: int) -> dict[str, int]:
    """The size of a subnet on each axis of a layer."""
    return _at_layer(subnet, model, layer)


def kept_at(subnet: Subnet, model: ModelConfig, layer: int) -> Kept:
    """How much a subnet keeps on each axis of a layer: of heads, so many in each group."""
    return {"hidden": subnet.hidden} | {
        axis: size // model.groups(axis) for axis, size in sizes_at(subnet, model, layer).items()
    }


def masks_at(masks: Masks, model: ModelConfig, layer: int) -> dict[str, Tensor]:
    """The masks on the axes of a layer, but for the hidden channels, whose mask the residual stream carries."""
    return _at_layer(masks, model, layer)


def _at_layer(sizes: Subnet | Masks, model: ModelConfig, layer: int) -> dict[str, Any]:
    width, *shared = model.axes_of(model.hybrid_override_pattern[layer])
    at_layer = {width: getattr(sizes, width)[model.ordinal(layer)]}
    return at_layer | {axis: getattr(sizes, axis) for axis in shared}
