"""What a subnet costs (C4): parameters, or those of a token; bytes of memory when serving; nanoseconds of decoding.

Every cost is a whole number, so that a subnet is within its budget or is not. It is made of parts that depend on a few
choices each: what a hidden size costs, what each kept layer adds, and for memory the largest of the layers' peaks. Of
the same parts the router makes its differentiable expectation and the resolver its integer program.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product

from elastic_core.budget import Budget, Dtype, Serving, bytes_text
from elastic_core.geometry import LAYER_AXES, Axes, ModelConfig
from elastic_core.layers.kind import FLOAT32_BYTES, LayerShape, ServingStep
from elastic_core.layers.kinds import KINDS
from elastic_core.subnet import Subnet

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}


# Parameters


def subnet_params(model: ModelConfig, subnet: Subnet) -> int:
    """Parameters of a subnet: the number of elements in its sliced checkpoint."""
    return ParamsCost(model=model).of(subnet)


def active_params(model: ModelConfig, subnet: Subnet) -> int:
    """Parameters of a subnet that a token passes through; all of them where there are no experts.

    Embedding and output head count whole, as in the 3.6B of Nemotron 3 Nano 30B.
    """
    return ActiveParamsCost(model=model).of(subnet)


def embedding_params(model: ModelConfig, hidden: int) -> int:
    """Embedding, output head and final norm."""
    return 2 * model.vocab_size * hidden + hidden


@cache
def layer_params(model: ModelConfig, shape: LayerShape) -> int:
    """A layer's norm, and what its kind lays out."""
    layouts, kept = KINDS[shape.kind].mixer.lay_out(model, model.layers_of(shape.kind)[0]), shape.kept(model)
    return shape.hidden + sum(layout.numel(kept) for layout in layouts.values())


# Costs


def shape_of(kind: str, hidden: int, width: int, shared: Sequence[int]) -> LayerShape:
    """The shape of a layer of `kind`; `shared` has a size of each axis that layers share, whatever their kind.

    Where the model has no experts or these no latent channels, `shared` lacks their sizes, which come last.
    """
    sizes = {axis: size for axis, size in zip(Axes.SHARED, shared, strict=False) if axis in LAYER_AXES[kind]}
    return LayerShape(kind=kind, hidden=hidden, width=width, **sizes)


def shapes(model: ModelConfig, subnet: Subnet) -> Iterator[LayerShape]:
    """The shape of each kept layer."""
    shared = [getattr(subnet, axis) for axis in Axes.SHARED]
    for layer in subnet.layers:
        kind = model.hybrid_override_pattern[layer]
        width = getattr(subnet, LAYER_AXES[kind][0])[model.ordinal(layer)]
        yield shape_of(kind, subnet.hidden, width, shared)


def choices(model: ModelConfig, axes: Axes, kind: str) -> tuple[LayerShape, ...]:
    """Every shape that a layer of `kind` may have on the (bound) `axes`, each once; none if the model has no such."""
    sizes = product(axes.hidden, axes.choices(LAYER_AXES[kind][0]), product(*map(axes.choices, axes.shared)))
    found = dict.fromkeys(shape_of(kind, *size) for size in sizes)
    return tuple(found) if model.layers_of(kind) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost(ABC):
    """What a budget counts.

    A subnet costs `fixed` of its hidden size, the sum of `layer` over its kept layers, and the largest of `fixed_peak`
    and each layer's `peak`.
    """

    model: ModelConfig

    @abstractmethod
    def fixed(self, hidden: int) -> int:
        """Embedding, final norm and output head."""

    @abstractmethod
    def layer(self, shape: LayerShape) -> int:
        """What a kept layer adds."""

    def fixed_peak(self, hidden: int) -> int:
        """What is needed for a while outside the layers."""
        return 0

    def peak(self, shape: LayerShape) -> int:
        """What a layer needs for a while, and gives back to the next."""
        return 0

    @abstractmethod
    def text(self, amount: int) -> str:
        """An amount with its unit."""

    def of(self, subnet: Subnet) -> int:
        """What `subnet` costs."""
        kept = list(shapes(self.model, subnet))
        peak = max([self.fixed_peak(subnet.hidden), *map(self.peak, kept)])
        return self.fixed(subnet.hidden) + sum(map(self.layer, kept)) + peak


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamsCost(Cost):
    """Parameters: the elements of the sliced checkpoint."""

    def fixed(self, hidden: int) -> int:
        return embedding_params(self.model, hidden)

    def layer(self, shape: LayerShape) -> int:
        return layer_params(self.model, shape)

    def text(self, amount: int) -> str:
        return f"{amount:,} parameters"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveParamsCost(ParamsCost):
    """Active parameters: all but those of the experts that a token does not choose."""

    def layer(self, shape: LayerShape) -> int:
        return layer_params(self.model, shape) - KINDS[shape.kind].idle_params(self.model, shape)

    def text(self, amount: int) -> str:
        return f"{amount:,} active parameters"


# Memory


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCost(Cost):
    """Bytes of memory when a slice is served: its weights, its caches at full context, and its peak activations.

    Weights and caches are exact. The activations are those of the step that needs most: it reads `prefill` tokens, or
    all if the context is shorter, and leaves the caches full. They are an upper bound on the tensors that model.py
    holds at once, by the plain scan of ssm.py on a CPU or by the fused kernels, whichever needs more; what a kernel or
    an allocator takes for itself comes on top.
    """

    serving: Serving
    prefill: int

    def fixed(self, hidden: int) -> int:
        return embedding_params(self.model, hidden) * self._bytes

    def layer(self, shape: LayerShape) -> int:
        return ParamsCost(model=self.model).layer(shape) * self._bytes + self.cache(shape)

    def cache(self, shape: LayerShape) -> int:
        """What the cache of decoding holds for a layer."""
        return KINDS[shape.kind].cache_bytes(self.model, shape, self._step)

    def fixed_peak(self, hidden: int) -> int:
        """A norm over the step's tokens, or the logits of each sequence's last token; each cast to float32."""
        cast = FLOAT32_BYTES if self._bytes < FLOAT32_BYTES else 0
        norm = self._step.rows * hidden * (3 * self._bytes + 2 * cast) + hidden * cast
        logits = self._step.rows * hidden * self._bytes + self.serving.batch * self.model.vocab_size * (
            self._bytes + cast
        )
        return max(norm, logits)

    def peak(self, shape: LayerShape) -> int:
        """A mixer's tensors at their most, beside the residual stream, its norm, and the output of the step before."""
        mixer = KINDS[shape.kind].serving_bytes(self.model, shape, self._step)
        return 3 * self._step.rows * shape.hidden * self._bytes + mixer

    def text(self, amount: int) -> str:
        return bytes_text(amount)

    @property
    def _bytes(self) -> int:
        return DTYPE_BYTES[self.serving.dtype]

    @property
    def _step(self) -> ServingStep:
        serving = self.serving
        tokens = min(self.prefill, serving.context)
        return ServingStep(batch=serving.batch, context=serving.context, tokens=tokens, width=self._bytes)


# Latency

# The geometry that no subnet changes and that the time of a step depends on.
TIMED_GEOMETRY = ("vocab_size", "head_dim", "num_key_value_heads", "ssm_state_size", "n_groups", "conv_kernel")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLayer(LayerShape):
    """How long a layer of this shape takes."""

    nanoseconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """Nanoseconds of one decoding step, measured on `device` by `elastic profile` as `serving` says.

    `fixed` has what is outside the layers by hidden size: embedding, final norm, output head. The table is of any
    model with the geometry of `model` that no subnet changes.
    """

    device: str
    serving: Serving
    model: ModelConfig
    fixed: dict[int, int]
    layers: tuple[TimedLayer, ...]

    def __post_init__(self) -> None:
        for layer in self.layers:
            if layer.kind not in KINDS:
                raise ValueError(f"layer kind {layer.kind!r} is unknown; expected one of {', '.join(KINDS)}")
        least = min([*self.fixed.values(), *(layer.nanoseconds for layer in self.layers)], default=1)
        if least < 1:
            raise ValueError(f"nanoseconds={least} must be greater than 0; measure again with `elastic profile`")
        if len(self.times) < len(self.layers):
            raise ValueError("a shape is listed more than once; measure again with `elastic profile`")

    @property
    def times(self) -> dict[LayerShape, int]:
        """The time of each shape."""
        names = [field.name for field in fields(LayerShape)]
        return {LayerShape(**{name: getattr(t, name) for name in names}): t.nanoseconds for t in self.layers}

    def check(self, model: ModelConfig, axes: Axes) -> None:
        """ValueError unless the table is of such a model and has every choice of its (bound) `axes`."""
        for name in TIMED_GEOMETRY:
            if getattr(self.model, name) != getattr(model, name):
                raise ValueError(
                    f"latency table: it was measured with {name}={getattr(self.model, name)}, but the model has "
                    f"{getattr(model, name)}; measure this one with `elastic profile`"
                )
        times = self.times
        missing: list[object] = [hidden for hidden in axes.hidden if hidden not in self.fixed]
        missing += [shape for kind in KINDS for shape in choices(model, axes, kind) if shape not in times]
        if missing:
            raise ValueError(
                f"latency table: {len(missing)} choices of the axes are missing, such as {missing[0]}; "
                "measure these axes with `elastic profile`"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyCost(Cost):
    """Nanoseconds of a decoding step by a latency table: the sum over its parts, which run one after the other."""

    fixed_times: Mapping[int, int]
    times: Mapping[LayerShape, int]

    def fixed(self, hidden: int) -> int:
        return self.fixed_times[hidden]

    def layer(self, shape: LayerShape) -> int:
        return self.times[shape]

    def text(self, amount: int) -> str:
        return f"{amount / 1e6:.4g} ms"


def budget_cost(model: ModelConfig, budget: Budget, table: LatencyTable | None = None) -> Cost:
    """What `budget` counts; ValueError for a latency without a table, or with one of another serving."""
    if budget.memory is not None:
        return MemoryCost(model=model, serving=budget.memory.serving, prefill=budget.memory.prefill)
    if budget.active_params is not None:
        return ActiveParamsCost(model=model)
    if budget.latency is None:
        return ParamsCost(model=model)
    if table is None:
        raise ValueError(
            f"budget {budget.name}: a latency needs a latency table; measure one on the device to serve from with "
            "`elastic profile`, and name it in latency_table or --profile"
        )
    if budget.latency.serving not in (None, table.serving):
        raise ValueError(
            f"budget {budget.name}: it is for {budget.latency.serving}, but the latency table was measured at "
            f"{table.serving}; measure another with `elastic profile`"
        )
    return LatencyCost(model=model, fixed_times=table.fixed, times=table.times)
