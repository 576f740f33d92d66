"""What a subnet costs: parameters, bytes of memory when serving, or nanoseconds of a decoding step (C4).

Every cost is a whole number, so that a subnet is within its budget or is not. It is made of parts that depend on a few
choices each: what a hidden size costs, what each kept layer adds, and for memory the largest of the layers' peaks. Of
the same parts the router makes its differentiable expectation and the resolver its integer program.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import ceil

from elastic_core.budget import Budget, Dtype, Serving, bytes_text
from elastic_core.geometry import ATTENTION, FFN, MAMBA, Axes, ModelConfig
from elastic_core.subnet import Subnet

WIDTH_AXIS = {FFN: "ffn", MAMBA: "mamba_heads", ATTENTION: "attention_heads"}

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
FLOAT32_BYTES = 4


# Parameters


def subnet_params(model: ModelConfig, subnet: Subnet) -> int:
    """Parameters of a subnet: the number of elements in its sliced checkpoint."""
    return ParamsCost(model=model).of(subnet)


def embedding_params(model: ModelConfig, hidden: int) -> int:
    """Embedding, output head and final norm."""
    return 2 * model.vocab_size * hidden + hidden


def mamba_params(model: ModelConfig, hidden: int, heads: int, head_dim: int) -> int:
    """in_proj [z, x, B, C, dt], conv1d over [x, B, C], A_log, D and dt_bias, gated norm, out_proj, layer norm."""
    channels = heads * head_dim
    in_proj = hidden * (2 * channels + model.state_rows + heads)
    conv = (channels + model.state_rows) * (model.conv_kernel + int(model.use_conv_bias))
    return in_proj + conv + 3 * heads + channels + channels * hidden + hidden


def attention_params(model: ModelConfig, hidden: int, heads: int) -> int:
    """Query and output projections over `heads`, key and value projections over all KV heads, layer norm."""
    return 2 * hidden * model.head_dim * (heads + model.num_key_value_heads) + hidden


def ffn_params(hidden: int, ffn: int) -> int:
    """Up and down projections, layer norm."""
    return 2 * hidden * ffn + hidden


# Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that a layer's cost depends on.

    `width` is its FFN width, Mamba heads or query heads; `mamba_head_dim` is 0 where the layer is not a Mamba layer.
    """

    kind: str
    hidden: int
    width: int
    mamba_head_dim: int = 0


def shape_of(kind: str, hidden: int, width: int, mamba_head_dim: int) -> Shape:
    """The shape of a layer of `kind`."""
    return Shape(kind=kind, hidden=hidden, width=width, mamba_head_dim=mamba_head_dim if kind == MAMBA else 0)


def shapes(model: ModelConfig, subnet: Subnet) -> Iterator[Shape]:
    """The shape of each kept layer."""
    for layer in subnet.layers:
        kind = model.hybrid_override_pattern[layer]
        width = getattr(subnet, WIDTH_AXIS[kind])[model.ordinal(layer)]
        yield shape_of(kind, subnet.hidden, width, subnet.mamba_head_dim)


def choices(model: ModelConfig, axes: Axes, kind: str) -> tuple[Shape, ...]:
    """Every shape that a layer of `kind` may have on the (bound) `axes`, each once; none if the model has no such."""
    sizes = product(axes.hidden, axes.choices(WIDTH_AXIS[kind]), axes.mamba_head_dim)
    found = dict.fromkeys(shape_of(kind, *size) for size in sizes)
    return tuple(found) if model.layers_of(kind) else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost(ABC):
    """What a budget counts.

    A subnet costs `fixed` of its hidden size, the sum of `layer` over its kept layers, and the largest of their `peak`
    and `fixed_peak`.
    """

    model: ModelConfig

    @abstractmethod
    def fixed(self, hidden: int) -> int:
        """Embedding, final norm and output head."""

    @abstractmethod
    def layer(self, shape: Shape) -> int:
        """What a kept layer adds."""

    def fixed_peak(self, hidden: int) -> int:
        """What is needed for a while outside the layers."""
        return 0

    def peak(self, shape: Shape) -> int:
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

    def layer(self, shape: Shape) -> int:
        if shape.kind == MAMBA:
            return mamba_params(self.model, shape.hidden, shape.width, shape.mamba_head_dim)
        if shape.kind == ATTENTION:
            return attention_params(self.model, shape.hidden, shape.width)
        return ffn_params(shape.hidden, shape.width)

    def text(self, amount: int) -> str:
        return f"{amount:,} parameters"


# Memory

# On a CPU ssm.py walks over runs of at most so many values, in float32, and scans chunks of at most so many tokens.
SEGMENT_VALUES = 2**18
CPU_CHUNK = 64


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

    def layer(self, shape: Shape) -> int:
        return ParamsCost(model=self.model).layer(shape) * self._bytes + self.cache(shape)

    def cache(self, shape: Shape) -> int:
        """What model.Cache holds for a layer: keys and values, or the state (in float32) and the convolution's tail."""
        batch, model = self.serving.batch, self.model
        if shape.kind == ATTENTION:
            return 2 * batch * self.serving.context * model.num_key_value_heads * model.head_dim * self._bytes
        if shape.kind == FFN:
            return 0
        channels = shape.width * shape.mamba_head_dim
        tail = (model.conv_kernel - 1) * (channels + model.state_rows) * self._bytes
        return batch * (channels * model.ssm_state_size * FLOAT32_BYTES + tail)

    def fixed_peak(self, hidden: int) -> int:
        """A norm over the step's tokens, or the logits of each sequence's last token; each cast to float32."""
        cast = FLOAT32_BYTES if self._bytes < FLOAT32_BYTES else 0
        norm = self._rows * hidden * (3 * self._bytes + 2 * cast) + hidden * cast
        logits = self._rows * hidden * self._bytes + self.serving.batch * self.model.vocab_size * (self._bytes + cast)
        return max(norm, logits)

    def peak(self, shape: Shape) -> int:
        """A mixer's tensors at their most, beside the residual stream, its norm, and the output of the step before."""
        mixers = {MAMBA: self._mamba, ATTENTION: self._attention, FFN: self._ffn}
        return 3 * self._rows * shape.hidden * self._bytes + mixers[shape.kind](shape)

    def text(self, amount: int) -> str:
        return bytes_text(amount)

    @property
    def _bytes(self) -> int:
        return DTYPE_BYTES[self.serving.dtype]

    @property
    def _tokens(self) -> int:
        return min(self.prefill, self.serving.context)

    @property
    def _rows(self) -> int:
        return self.serving.batch * self._tokens

    def _ffn(self, shape: Shape) -> int:
        """The neurons, and the output."""
        return self._rows * (shape.width + shape.hidden) * self._bytes

    def _attention(self, shape: Shape) -> int:
        """Queries, with the layer's cache while it is copied to grow, or the mask, or the heads' and layer's output."""
        later = min(self._tokens, self.serving.context - self._tokens)  # the most that are read on top of a full piece
        mask = later * self.serving.context if later > 1 else 0
        queries = self._rows * shape.width * self.model.head_dim * self._bytes
        output = queries + self._rows * shape.hidden * self._bytes
        return queries + max(self.cache(shape) if later else 0, 2 * mask, mask + output)

    def _mamba(self, shape: Shape) -> int:
        """What in_proj gives, with the convolution at work; or both and dt, with the scan or the gated norm at work."""
        model, heads, channels = self.model, shape.width, shape.width * shape.mamba_head_dim
        mixed = channels + model.state_rows
        taps = 2 * mixed * model.conv_kernel * FLOAT32_BYTES
        projected = self._rows * (channels + mixed + heads) * self._bytes + taps
        held = self._rows * (mixed * self._bytes + heads * FLOAT32_BYTES)
        scan = max(self._plain_scan(heads, channels), self._fused_scan(heads, channels))
        return projected + max(self._piecewise(mixed), held + max(scan, self._piecewise(channels)))

    def _piecewise(self, channels: int) -> int:
        """Input, output in pieces, and these joined; two copies of a piece in float32, four once there are several."""
        values = self._rows * channels
        return 3 * values * self._bytes + 2 * min(values, 2 * SEGMENT_VALUES) * FLOAT32_BYTES

    def _plain_scan(self, heads: int, channels: int) -> int:
        """The output so far, and of one chunk: decays of each pair of tokens, seven copies of x, the states around."""
        model, tokens = self.model, min(self._tokens, self.model.chunk_size, CPU_CHUNK)
        pairs = tokens * tokens * (2 * heads + model.n_groups)
        chunk = pairs + tokens * (7 * channels + 2 * model.state_rows + 8 * heads) + 3 * channels * model.ssm_state_size
        return self._rows * channels * self._bytes + self.serving.batch * chunk * FLOAT32_BYTES

    def _fused_scan(self, heads: int, channels: int) -> int:
        """In mamba-ssm: the output, each chunk's state twice and the last one, each chunk's scores, dt and decays."""
        model, chunks = self.model, self.serving.batch * ceil(self._tokens / self.model.chunk_size)
        state = channels * model.ssm_state_size
        states = chunks * state * (FLOAT32_BYTES + self._bytes) + self.serving.batch * state * FLOAT32_BYTES
        scores = chunks * model.n_groups * model.chunk_size**2 * FLOAT32_BYTES
        decays = 2 * chunks * model.chunk_size * heads * FLOAT32_BYTES
        return self._rows * channels * self._bytes + states + scores + decays


# Latency

# The geometry that no subnet changes and that the time of a step depends on.
TIMED_GEOMETRY = ("vocab_size", "head_dim", "num_key_value_heads", "ssm_state_size", "n_groups", "conv_kernel")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLayer(Shape):
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
            if layer.kind not in WIDTH_AXIS:
                raise ValueError(f"layer kind {layer.kind!r} is unknown; expected one of {', '.join(WIDTH_AXIS)}")
        least = min([*self.fixed.values(), *(layer.nanoseconds for layer in self.layers)], default=1)
        if least < 1:
            raise ValueError(f"nanoseconds={least} must be greater than 0; measure again with `elastic profile`")
        if len(self.times) < len(self.layers):
            raise ValueError("a shape is listed more than once; measure again with `elastic profile`")

    @property
    def times(self) -> dict[Shape, int]:
        """The time of each shape."""
        return {
            Shape(kind=t.kind, hidden=t.hidden, width=t.width, mamba_head_dim=t.mamba_head_dim): t.nanoseconds
            for t in self.layers
        }

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
        missing += [shape for kind in WIDTH_AXIS for shape in choices(model, axes, kind) if shape not in times]
        if missing:
            raise ValueError(
                f"latency table: {len(missing)} choices of the axes are missing, such as {missing[0]}; "
                "measure these axes with `elastic profile`"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyCost(Cost):
    """Nanoseconds of a decoding step by a latency table: the sum over its parts, which run one after the other."""

    fixed_times: Mapping[int, int]
    times: Mapping[Shape, int]

    def fixed(self, hidden: int) -> int:
        return self.fixed_times[hidden]

    def layer(self, shape: Shape) -> int:
        return self.times[shape]

    def text(self, amount: int) -> str:
        return f"{amount / 1e6:.4g} ms"


def budget_cost(model: ModelConfig, budget: Budget, table: LatencyTable | None = None) -> Cost:
    """What `budget` counts; ValueError for a latency without a table, or with one of another serving."""
    if budget.memory is not None:
        return MemoryCost(model=model, serving=budget.memory.serving, prefill=budget.memory.prefill)
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
