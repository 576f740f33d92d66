"""The geometry of a model, as its config.json says it, and the axes along which it is elastic."""

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from elastic_core.schema import OPTIONAL, Strict, multiple_of, positive

MAMBA, ATTENTION, FFN, MOE = "M", "*", "-", "E"

KIND_NAMES = {MAMBA: "Mamba-2", ATTENTION: "attention", FFN: "FFN", MOE: "mixture of experts"}

# What config.json calls a layer of each kind.
BLOCK_TYPES = {MAMBA: "mamba", ATTENTION: "attention", FFN: "mlp", MOE: "moe"}

AXIS_NAMES = {
    "hidden": "hidden channels",
    "ffn": "FFN neurons",
    "mamba_heads": "Mamba heads",
    "mamba_head_dim": "Mamba head channels",
    "attention_heads": "attention heads",
    "depth": "layers",
    "expert_ffn": "neurons in each expert",
    "experts": "experts",
    "shared_ffn": "neurons of the shared expert",
    "top_k": "experts of a token",
    "latent": "latent channels",
}

# The axes of each kind of layer: first its width, which may differ by layer, then those that all layers share.
LAYER_AXES: dict[str, tuple[str, ...]] = {
    FFN: ("ffn",),
    MAMBA: ("mamba_heads", "mamba_head_dim"),
    ATTENTION: ("attention_heads",),
    MOE: ("expert_ffn", "experts", "shared_ffn", "top_k", "latent"),
}

# The fields of ModelConfig that hold the full size of an axis and, in GROUPS, the number of its equal groups.
FULL_SIZES = {
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "mamba_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "attention_heads": "num_attention_heads",
    "depth": "num_layers",
    "expert_ffn": "moe_intermediate_size",
    "experts": "n_routed_experts",
    "shared_ffn": "moe_shared_expert_intermediate_size",
    "top_k": "num_experts_per_tok",
    "latent": "moe_latent_size",
}
GROUPS = {"mamba_heads": "n_groups", "attention_heads": "num_key_value_heads", "experts": "n_group"}

# The widths that may differ by layer in a slice too.
BY_LAYER = ("ffn", "expert_ffn")

# The axes whose components belong to one member of another axis each: every expert has neurons of its own.
MEMBERS = {"expert_ffn": "experts"}

# The axes that no weight has a side for, so that there is nothing to rank: how many experts a token chooses.
NUMBERS = ("top_k",)

# transformers multiplies all experts at once, in rows of a multiple of 16 bytes.
EXPERTS_MULTIPLE = 8

# How a slice holds widths of FFN layers and experts that differ by layer: padded with zeros, or each as it is.
FfnLayout = Literal["padded", "list"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Strict):
    """Geometry of a Nemotron-H model; names are those of its `config.json`."""

    hybrid_override_pattern: str
    """One letter a residual layer: `M` Mamba-2, `*` attention, `-` FFN (relu squared, ungated), `E` mixture of experts.
    Example: `M-M*-`."""
    hidden_size: int
    """Channels of the residual stream. Example: `5120`."""
    intermediate_size: int | tuple[int, ...]
    """Neurons of an FFN layer: one number, or one for each `-` layer. Example: `20480`."""
    num_attention_heads: int
    """Query heads of an attention layer. Example: `40`."""
    num_key_value_heads: int
    """Key-value heads, a divisor of the query heads. Example: `8`."""
    head_dim: int
    """Channels of an attention head. Example: `128`."""
    mamba_num_heads: int
    """Heads of a Mamba layer, a multiple of `n_groups`. Example: `128`."""
    mamba_head_dim: int
    """Channels of a Mamba head. Example: `80`."""
    ssm_state_size: int
    """State of the SSM for each channel. Example: `128`."""
    n_groups: int
    """Groups of Mamba heads that share B and C. Example: `8`."""
    vocab_size: int
    """Tokens of the vocabulary. Example: `131072`."""
    conv_kernel: int = 4
    """Tokens that the causal convolution sees. Example: `4`."""
    use_conv_bias: bool = True
    """Whether the causal convolution has a bias. Example: `true`."""
    chunk_size: int = 128
    """Tokens that the scan takes at once; the result does not depend on it. Example: `256`."""
    layer_norm_epsilon: float = 1e-5
    """What RMSNorm adds to the mean square. Example: `1.0e-5`."""
    time_step_min: float = 0.001
    """The smallest dt that fresh weights begin with; it limits nothing later. Example: `0.001`."""
    time_step_max: float = 0.1
    """The largest dt that fresh weights begin with; it limits nothing later. Example: `0.1`."""
    time_step_floor: float = 1e-4
    """The floor of a fresh dt. Example: `1.0e-4`."""
    time_step_limit: tuple[float, float | None] = (0.0, None)
    """The least and the largest dt of the state space, whenever it is computed; null is no upper end.
    Example: `[0.0, null]`."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights. Example: `0.02`."""
    max_position_embeddings: int = 4096
    """Tokens of context that the model is published for. Example: `131072`."""
    pad_token_id: int | None = 0
    """The token that pads; null for none. Example: `0`."""
    bos_token_id: int | None = 1
    """The token that begins a text; null for none. Example: `1`."""
    eos_token_id: int | tuple[int, ...] | None = 2
    """The token that ends a text, or a list of them; null for none. Example: `[2, 11]`."""
    n_routed_experts: int = field(default=0, metadata=OPTIONAL)
    """Experts of an `E` layer that tokens are routed to. Example: `128`."""
    num_experts_per_tok: int = field(default=0, metadata=OPTIONAL)
    """Routed experts that each token chooses. Example: `6`."""
    moe_intermediate_size: int | tuple[int, ...] = field(default=0, metadata=OPTIONAL)
    """Neurons of a routed expert: one number, or one for each `E` layer. Example: `1856`."""
    moe_shared_expert_intermediate_size: int = field(default=0, metadata=OPTIONAL)
    """Neurons of the expert that every token passes through. Example: `3712`."""
    moe_latent_size: int | None = field(default=None, metadata=OPTIONAL)
    """Channels that routed experts read and write; null where they are the hidden channels. Example: `1024`."""
    routed_scaling_factor: float = field(default=1.0, metadata=OPTIONAL)
    """What the gates of the chosen experts are multiplied by. Example: `2.5`."""
    norm_topk_prob: bool = field(default=True, metadata=OPTIONAL)
    """Whether the gates of the chosen experts are divided by their sum. Example: `true`."""
    n_group: int = field(default=1, metadata=OPTIONAL)
    """Groups of routed experts; a token chooses groups first. Example: `1`."""
    topk_group: int = field(default=1, metadata=OPTIONAL)
    """Groups that each token chooses its experts from. Example: `1`."""

    def __post_init__(self) -> None:
        unknown = set(self.hybrid_override_pattern) - LAYER_AXES.keys()
        if unknown or not self.hybrid_override_pattern:
            *first, last = (f"{letter} ({name})" for letter, name in KIND_NAMES.items())
            raise ValueError(
                f"hybrid_override_pattern={self.hybrid_override_pattern!r} must be made of {', '.join(first)} "
                f"and {last}; found {', '.join(sorted(unknown)) or 'nothing'}"
            )
        widths = [LAYER_AXES[kind][0] for kind in sorted(set(self.hybrid_override_pattern))]
        if len(set(widths)) < len(widths):
            raise ValueError(
                f"hybrid_override_pattern={self.hybrid_override_pattern!r} has two kinds of one width axis"
            )
        positive(self, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "mamba_num_heads")
        positive(self, "mamba_head_dim", "ssm_state_size", "n_groups", "vocab_size", "conv_kernel", "chunk_size")
        positive(self, "layer_norm_epsilon", "time_step_min", "time_step_floor", "initializer_range")
        if self.time_step_max < self.time_step_min:
            raise ValueError(f"time_step_max={self.time_step_max} is below time_step_min={self.time_step_min}")
        lowest, highest = self.time_step_limit
        if lowest < 0 or (highest is not None and highest <= lowest):
            raise ValueError(f"time_step_limit={list(self.time_step_limit)} must rise from at least 0")
        multiple_of("mamba_num_heads", self.mamba_num_heads, "n_groups", self.n_groups)
        multiple_of("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        self._check_widths(FFN)
        if MOE in self.hybrid_override_pattern:
            self._check_experts()

    def _check_widths(self, kind: str) -> None:
        axis = LAYER_AXES[kind][0]
        name, layers = FULL_SIZES[axis], len(self.layers_on(axis))
        widths = getattr(self, name)
        if isinstance(widths, tuple) and len(widths) != layers:
            raise ValueError(f"{name} lists {len(widths)} widths; the pattern has {layers} {KIND_NAMES[kind]} layers")
        if any(width <= 0 for width in self.full_sizes(axis)):
            raise ValueError(f"{name}={widths} must be greater than 0")

    def _check_experts(self) -> None:
        positive(self, "num_experts_per_tok", "moe_shared_expert_intermediate_size")
        self._check_widths(MOE)
        positive(self, "n_routed_experts", "n_group", "topk_group", "routed_scaling_factor")
        if self.moe_latent_size is not None:
            positive(self, "moe_latent_size")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is above n_group={self.n_group}")
        self.check_routing("n_routed_experts", self.n_routed_experts)

    def check_routing(self, name: str, experts: int, top_k: int | None = None) -> None:
        """ValueError unless tokens can be routed to `top_k` of so many experts: a group is scored by its two best."""
        multiple_of(name, experts, "n_group", self.n_group)
        chosen = self.num_experts_per_tok if top_k is None else top_k
        least = max(2, -(-chosen // self.topk_group)) * self.n_group
        if experts < least:
            raise ValueError(
                f"{name}={experts} is below {least}, the least that {chosen} experts a token can be chosen from; "
                f"n_group={self.n_group} and topk_group={self.topk_group}"
            )

    @property
    def num_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def ffn_sizes(self) -> tuple[int, ...]:
        """The width of each FFN layer, in order."""
        return self.full_sizes("ffn")

    @property
    def mamba_size(self) -> int:
        """Channels of a Mamba layer: heads x head_dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def state_rows(self) -> int:
        """Rows of in_proj, and channels of conv1d, that hold B and C; never pruned."""
        return 2 * self.n_groups * self.ssm_state_size

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Indices of the layers of one kind, by its letter."""
        return tuple(i for i, k in enumerate(self.hybrid_override_pattern) if k == kind)

    def axes_of(self, kind: str) -> tuple[str, ...]:
        """The axes of a kind's layers in this model, the width first: experts may have no latent channels."""
        return tuple(axis for axis in LAYER_AXES[kind] if getattr(self, FULL_SIZES[axis]) is not None)

    def layers_on(self, axis: str) -> tuple[int, ...]:
        """Indices of the layers that have an axis."""
        having = [kind for kind in LAYER_AXES if axis in self.axes_of(kind)]
        return tuple(i for i, kind in enumerate(self.hybrid_override_pattern) if kind in having)

    def full_sizes(self, axis: str) -> tuple[int, ...]:
        """The full size of an axis in each of its layers, in order."""
        full = getattr(self, FULL_SIZES[axis])
        return full if isinstance(full, tuple) else (full,) * len(self.layers_on(axis))

    def groups(self, axis: str) -> int:
        """How many equal groups keep a part of an axis each."""
        return typing.cast(int, getattr(self, GROUPS[axis])) if axis in GROUPS else 1

    def ordinal(self, layer: int) -> int:
        """Position of `layer` among the layers of its own kind."""
        return self.hybrid_override_pattern[:layer].count(self.hybrid_override_pattern[layer])


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes(Strict):
    """The sizes that each axis may take: the teacher's own first, then falling; an empty axis is not elastic."""

    hidden: tuple[int, ...] = ()
    """Channels of the residual stream. Example: `[5120, 4480, 3840]`."""
    ffn: tuple[int, ...] = ()
    """Neurons of an FFN layer. Example: `[20480, 15680, 10240]`."""
    mamba_heads: tuple[int, ...] = ()
    """Heads of a Mamba layer, multiples of `n_groups`. Example: `[128, 112, 96]`."""
    mamba_head_dim: tuple[int, ...] = ()
    """Channels of a Mamba head. Example: `[80, 64]`."""
    attention_heads: tuple[int, ...] = ()
    """Query heads of an attention layer, multiples of the key-value heads. Example: `[40, 32]`."""
    depth: tuple[int, ...] = ()
    """Layers, counted over all kinds. Example: `[62, 60, 58]`."""
    per_layer: tuple[Literal["ffn", "mamba_heads", "attention_heads", "expert_ffn"], ...] = ()
    """The axes that are chosen for each layer apart, rather than once for the model. Example: `[ffn]`."""
    expert_ffn: tuple[int, ...] = field(default=(), metadata=OPTIONAL)
    """Neurons of a routed expert. Example: `[1856, 1280]`."""
    experts: tuple[int, ...] = field(default=(), metadata=OPTIONAL)
    """Routed experts of an `E` layer, multiples of `n_group`. Example: `[128, 96]`."""
    shared_ffn: tuple[int, ...] = field(default=(), metadata=OPTIONAL)
    """Neurons of the shared expert. Example: `[3712, 2560]`."""
    top_k: tuple[int, ...] = field(default=(), metadata=OPTIONAL)
    """Routed experts that each token chooses. Example: `[6, 4]`."""
    latent: tuple[int, ...] = field(default=(), metadata=OPTIONAL)
    """Channels that routed experts read and write, of a teacher with latent ones. Example: `[1024, 768]`."""

    # The axes of every model, and those that only a mixture of experts has.
    NAMES: ClassVar[tuple[str, ...]] = ("hidden", "ffn", "mamba_heads", "mamba_head_dim", "attention_heads", "depth")
    OF_EXPERTS: ClassVar[tuple[str, ...]] = LAYER_AXES[MOE]
    WIDTHS: ClassVar[tuple[str, ...]] = ("ffn", "mamba_heads", "attention_heads", "expert_ffn")
    # One size for all layers that have the axis. What fewer models have comes later.
    SHARED: ClassVar[tuple[str, ...]] = ("mamba_head_dim", "experts", "shared_ffn", "top_k", "latent")
    # The axes inside layers whose components have an order.
    ORDERED: ClassVar[tuple[str, ...]] = tuple(
        name for name in (*NAMES, *LAYER_AXES[MOE]) if name not in ("hidden", "depth", *NUMBERS)
    )

    def __post_init__(self) -> None:
        for name in (*self.NAMES, *self.OF_EXPERTS):
            choices = self.choices(name)
            if any(c <= 0 for c in choices):
                raise ValueError(f"{name}={list(choices)} must be greater than 0")
            if list(choices) != sorted(set(choices), reverse=True):
                raise ValueError(f"{name}={list(choices)} must fall from the largest, each once")

    def choices(self, name: str) -> tuple[int, ...]:
        """The choices of the axis called `name`."""
        return typing.cast(tuple[int, ...], getattr(self, name))

    @property
    def names(self) -> tuple[str, ...]:
        """The axes of every model, and of those of experts the ones that have choices."""
        return (*self.NAMES, *(name for name in self.OF_EXPERTS if self.choices(name)))

    @property
    def widths(self) -> tuple[str, ...]:
        """Those of `names` that may differ by layer."""
        return tuple(name for name in self.WIDTHS if name in self.names)

    @property
    def shared(self) -> tuple[str, ...]:
        """Those of `names` that all layers which have the axis share."""
        return tuple(name for name in self.SHARED if name in self.names)

    def bind(self, model: ModelConfig) -> "Axes":
        """These axes for `model`: empty ones hold the full size alone, and every choice is checked against it.

        The axes of experts stay empty where the model has none, and that of latent channels where they have none.
        """
        names = (*self.NAMES, *(name for name in self.OF_EXPERTS if model.layers_on(name)))
        for name in self.OF_EXPERTS:
            if self.choices(name) and name not in names:
                lacked = "latent channels" if model.layers_of(MOE) else "experts"
                raise ValueError(f"axes.{name} is given, but the teacher has no layers with {lacked}")
        full = {name: getattr(model, FULL_SIZES[name]) for name in names}
        for name in BY_LAYER:
            if len(set(widths := model.full_sizes(name))) > 1:
                raise ValueError(
                    f"the teacher's {FULL_SIZES[name]} differs by layer; an elastic model starts from one width"
                )
            full[name] = max(widths, default=1)
        sizes: dict[str, Any] = {name: self.choices(name) or (full[name],) for name in names}
        bound = dataclasses.replace(self, **sizes)
        for name in names:
            if bound.choices(name)[0] != full[name]:
                raise ValueError(
                    f"axes.{name} begins with {bound.choices(name)[0]}; it must begin with the teacher's {full[name]}"
                )
        bound._check_layers(model)
        return bound

    def _check_layers(self, model: ModelConfig) -> None:
        for name in self.per_layer:
            if not model.layers_on(name):
                raise ValueError(f"axes.per_layer names {name}, but the teacher has no such layers")
        for axis, groups in GROUPS.items():
            for size in self.choices(axis):
                multiple_of(f"axes.{axis}", size, groups, model.groups(axis))
        for size in self.experts:
            model.check_routing("axes.experts", size)
        if model.layers_of(MOE):
            for axis in ("expert_ffn", "hidden" if model.moe_latent_size is None else "latent"):
                for size in self.choices(axis)[1:]:
                    multiple_of(
                        f"axes.{axis}", size, "the 16 bytes in which transformers reads experts,", EXPERTS_MULTIPLE
                    )
