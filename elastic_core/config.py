"""Everything a run is configured by: frozen dataclasses, validated on construction, filled from YAML or JSON.

`Recipe` is the root. A recipe file fills these classes and nothing more; the Prefect form and the command line are
made from the same classes, so a default lives here or nowhere.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")

Dtype = Literal["float32", "bfloat16"]
Storage = Literal["materialised", "nested"]

MAMBA, ATTENTION, FFN = "M", "*", "-"


def build(cls: type[T], data: object, where: str = "") -> T:
    """Build the dataclass `cls` from plain YAML or JSON data, strictly.

    Raises ValueError with the dotted path of the field for an unknown key (with the nearest known one), a missing
    required field, a value of the wrong type, or a value that the class itself refuses.
    """
    return typing.cast(T, _convert(cls, data, where))


def _build_dataclass(cls: Any, data: object, where: str) -> Any:
    if isinstance(data, cls):
        return data
    if isinstance(data, str) and hasattr(cls, "from_text"):
        data = cls.from_text(data, where or cls.__name__)
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or cls.__name__} is {data!r}; expected a mapping")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise ValueError(f"{prefix}{key} is not a known setting; {hint}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ValueError(f"{prefix}{name} is missing; it has no default")
    values = {str(key): _convert(hints[str(key)], value, f"{prefix}{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; only conversions that lose nothing are made (YAML reads 1e9 as text)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; expected one of: {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is {value!r}; expected a list")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ValueError(f"{where} has {len(value)} entries; expected {len(inner)}")
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}; expected a mapping")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    problems = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, where)
        except ValueError as error:
            problems.append(str(error))
    raise ValueError(problems[-1] if isinstance(value, Mapping | list | tuple) else problems[0])


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint in (int, float) and isinstance(value, str | float | int) and not isinstance(value, bool):
        return _convert_number(hint, value, where)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise ValueError(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")


def _convert_number(hint: Any, value: str | float, where: str) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{where} is {value!r}; expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{where} is {value!r}; expected a finite number")
    if hint is float:
        return number
    if not number.is_integer():
        raise ValueError(f"{where} is {value!r}; expected a whole number")
    return value if isinstance(value, int) else int(Decimal(value))


def to_dict(config: Any) -> dict[str, Any]:
    """The plain data that `build` turns back into `config`; tuples become lists, as in JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return value

    return typing.cast(dict[str, Any], plain(config))


def _positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not value > 0:
            raise ValueError(f"{name}={value} must be greater than 0")


def _multiple(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        below = value // divisor * divisor
        nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise ValueError(f"{name}={value} is not a multiple of {of}={divisor}; nearest valid: {nearest}")


def _not_negative(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0")


class _Strict:
    """Makes pydantic, which builds Prefect's forms, refuse unknown keys and infinite numbers as `build` does.

    In the form the fields keep their order, which it would lose, and the names that they have in a recipe.
    """

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        for position, (name, shown) in enumerate(handler.resolve_ref_schema(schema)["properties"].items()):
            shown |= {"title": name, "position": position}
        return schema


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(_Strict):
    """Geometry of a Nemotron-H model; names are those of its `config.json`.

    `hybrid_override_pattern` has one letter a residual layer: M Mamba-2, * attention, - FFN (relu squared, not gated).
    `intermediate_size` is one FFN width, or one per `-` layer.
    """

    hybrid_override_pattern: str
    hidden_size: int
    intermediate_size: int | tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    vocab_size: int
    conv_kernel: int = 4
    use_conv_bias: bool = True
    chunk_size: int = 128
    layer_norm_epsilon: float = 1e-5
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    initializer_range: float = 0.02
    max_position_embeddings: int = 4096
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    def __post_init__(self) -> None:
        unknown = set(self.hybrid_override_pattern) - {MAMBA, ATTENTION, FFN}
        if unknown or not self.hybrid_override_pattern:
            raise ValueError(
                f"hybrid_override_pattern={self.hybrid_override_pattern!r} must be made of M (Mamba-2), * (attention) "
                f"and - (FFN); found {', '.join(sorted(unknown)) or 'nothing'}"
            )
        _positive(self, "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "mamba_num_heads")
        _positive(self, "mamba_head_dim", "ssm_state_size", "n_groups", "vocab_size", "conv_kernel", "chunk_size")
        _positive(self, "layer_norm_epsilon", "time_step_min", "time_step_floor", "initializer_range")
        if self.time_step_max < self.time_step_min:
            raise ValueError(f"time_step_max={self.time_step_max} is below time_step_min={self.time_step_min}")
        _multiple("mamba_num_heads", self.mamba_num_heads, "n_groups", self.n_groups)
        _multiple("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        if isinstance(self.intermediate_size, tuple) and len(self.intermediate_size) != len(self.layers_of(FFN)):
            raise ValueError(
                f"intermediate_size lists {len(self.intermediate_size)} widths; "
                f"the pattern has {len(self.layers_of(FFN))} FFN layers"
            )
        if any(width <= 0 for width in self.ffn_sizes):
            raise ValueError(f"intermediate_size={self.intermediate_size} must be greater than 0")

    @property
    def num_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def ffn_sizes(self) -> tuple[int, ...]:
        """The width of each FFN layer, in order."""
        if isinstance(self.intermediate_size, tuple):
            return self.intermediate_size
        return (self.intermediate_size,) * len(self.layers_of(FFN))

    @property
    def mamba_size(self) -> int:
        """Channels of a Mamba layer: heads x head_dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def state_rows(self) -> int:
        """Rows of in_proj, and channels of conv1d, that hold B and C; never pruned."""
        return 2 * self.n_groups * self.ssm_state_size

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Indices of the layers of one kind: M, * or -."""
        return tuple(i for i, k in enumerate(self.hybrid_override_pattern) if k == kind)

    def ordinal(self, layer: int) -> int:
        """Position of `layer` among the layers of its own kind."""
        return self.hybrid_override_pattern[:layer].count(self.hybrid_override_pattern[layer])


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes(_Strict):
    """The sizes that each elastic axis may take, largest first; an empty axis is not elastic.

    `ffn`, `mamba_heads` and `attention_heads` are chosen once for the model, or per layer where the layer's kind is
    named in `per_layer`.
    """

    hidden: tuple[int, ...] = ()
    ffn: tuple[int, ...] = ()
    mamba_heads: tuple[int, ...] = ()
    mamba_head_dim: tuple[int, ...] = ()
    attention_heads: tuple[int, ...] = ()
    depth: tuple[int, ...] = ()
    per_layer: tuple[Literal["ffn", "mamba_heads", "attention_heads"], ...] = ()

    NAMES: ClassVar[tuple[str, ...]] = ("hidden", "ffn", "mamba_heads", "mamba_head_dim", "attention_heads", "depth")

    def __post_init__(self) -> None:
        for name in self.NAMES:
            choices = self.choices(name)
            if any(c <= 0 for c in choices):
                raise ValueError(f"{name}={list(choices)} must be greater than 0")
            if list(choices) != sorted(set(choices), reverse=True):
                raise ValueError(f"{name}={list(choices)} must fall from the largest, each once")

    def choices(self, name: str) -> tuple[int, ...]:
        """The choices of the axis called `name`."""
        return typing.cast(tuple[int, ...], getattr(self, name))

    def bind(self, model: ModelConfig) -> "Axes":
        """These axes for `model`: empty ones hold the full size alone, and every choice is checked against it."""
        full = {
            "hidden": model.hidden_size,
            "ffn": max(model.ffn_sizes, default=1),
            "mamba_heads": model.mamba_num_heads,
            "mamba_head_dim": model.mamba_head_dim,
            "attention_heads": model.num_attention_heads,
            "depth": model.num_layers,
        }
        sizes: dict[str, Any] = {name: self.choices(name) or (full[name],) for name in self.NAMES}
        bound = dataclasses.replace(self, **sizes)
        for name in self.NAMES:
            if bound.choices(name)[0] != full[name]:
                raise ValueError(
                    f"axes.{name} begins with {bound.choices(name)[0]}; it must begin with the teacher's {full[name]}"
                )
        for axis, kind in {"ffn": FFN, "mamba_heads": MAMBA, "attention_heads": ATTENTION}.items():
            if axis in self.per_layer and not model.layers_of(kind):
                raise ValueError(f"axes.per_layer names {axis}, but the teacher has no such layers")
        for heads in bound.mamba_heads:
            _multiple("axes.mamba_heads", heads, "n_groups", model.n_groups)
        for heads in bound.attention_heads:
            _multiple("axes.attention_heads", heads, "num_key_value_heads", model.num_key_value_heads)
        if len(set(model.ffn_sizes)) > 1:
            raise ValueError("the teacher's FFN widths differ by layer; an elastic model starts from a uniform one")
        return bound


BYTE_UNITS = {
    **{"B": Decimal(1), "kB": Decimal(10**3), "MB": Decimal(10**6), "GB": Decimal(10**9), "TB": Decimal(10**12)},
    **{"KiB": Decimal(2**10), "MiB": Decimal(2**20), "GiB": Decimal(2**30), "TiB": Decimal(2**40)},
}
SECOND_UNITS = {"us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1)}
SERVING_KEYS = {"ctx": "context", "batch": "batch", "dtype": "dtype"}

_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)(?:@(.*))?")


def bytes_text(amount: int) -> str:
    """An amount of bytes in its largest binary unit."""
    power = min(max(amount, 1).bit_length() - 1, 40) // 10
    return f"{amount / 2 ** (10 * power):.5g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _amount(text: str, where: str, units: Mapping[str, Decimal], example: str) -> tuple[Decimal, str]:
    """The amount that a text such as 16GiB@ctx=131072 gives, in the unit that counts 1, and what follows its @."""
    found = _AMOUNT.fullmatch(text.strip())
    if not found or found[2] not in units:
        raise ValueError(f"{where} is {text!r}; expected an amount in {', '.join(units)}, such as {example}")
    return Decimal(found[1]) * units[found[2]], found[3] or ""


def parse_bytes(text: str, where: str) -> int:
    """The bytes that a text such as 80GB or 16GiB gives; ValueError, naming `where`, for anything else."""
    amount, rest = _amount(text, where, BYTE_UNITS, "80GB")
    if rest:
        raise ValueError(f"{where} is {text!r}; expected an amount alone, such as 80GB")
    return int(amount)


def _settings(text: str, where: str, keys: Mapping[str, str]) -> dict[str, str]:
    """`ctx=131072,batch=8` as values by field name."""
    settings: dict[str, str] = {}
    for part in text.split(",") if text else ():
        key, equals, value = part.strip().partition("=")
        if key not in keys or not equals or keys[key] in settings:
            known = ", ".join(f"{key}=..." for key in keys)
            raise ValueError(f"{where}: {part.strip()!r} is not one of {known}, each once")
        settings[keys[key]] = value
    return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving(_Strict):
    """How a submodel is served: `batch` sequences at once of at most `context` tokens each, computed in `dtype`."""

    context: int
    batch: int = 1
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        _positive(self, "context", "batch")

    def __str__(self) -> str:
        return f"ctx={self.context},batch={self.batch},dtype={self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTarget(_Strict):
    """At most `bytes` of memory when serving, reading a prompt `prefill` tokens at a time.

    As text: 16GiB@ctx=131072 or, with everything said, 16GiB@ctx=131072,batch=8,dtype=bfloat16,prefill=2048.
    """

    bytes: int
    serving: Serving
    prefill: int = 2048

    def __post_init__(self) -> None:
        _positive(self, "bytes", "prefill")

    @staticmethod
    def from_text(text: str, where: str) -> dict[str, Any]:
        """The fields that `text` gives."""
        amount, rest = _amount(text, where, BYTE_UNITS, "16GiB@ctx=131072")
        fields: dict[str, Any] = dict(_settings(rest, where, {**SERVING_KEYS, "prefill": "prefill"}))
        if "context" not in fields:
            raise ValueError(f"{where} is {text!r}, without a context; write {text.partition('@')[0]}@ctx=131072")
        serving = {name: fields.pop(name) for name in SERVING_KEYS.values() if name in fields}
        return {"bytes": int(amount), "serving": serving, **fields}

    def __str__(self) -> str:
        return f"{bytes_text(self.bytes)} at {self.serving},prefill={self.prefill}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTarget(_Strict):
    """At most `seconds` for a decoding step, by a latency table; a `serving` that is given must be the table's.

    As text: 12ms, or 12ms@ctx=32768,batch=1.
    """

    seconds: float
    serving: Serving | None = None

    def __post_init__(self) -> None:
        if self.nanoseconds < 1:
            raise ValueError(f"seconds={self.seconds} must be at least a nanosecond")

    @property
    def nanoseconds(self) -> int:
        return round(self.seconds * 1e9)

    @staticmethod
    def from_text(text: str, where: str) -> dict[str, Any]:
        """The fields that `text` gives."""
        amount, rest = _amount(text, where, SECOND_UNITS, "12ms or 12ms@ctx=32768")
        serving = _settings(rest, where, SERVING_KEYS)
        if serving and "context" not in serving:
            raise ValueError(f"{where} is {text!r}, without a context; write {text.replace('@', '@ctx=32768,')}")
        return {"seconds": float(amount), "serving": serving or None}

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:.4g} ms" + (f" at {self.serving}" if self.serving else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(_Strict):
    """A named target for a subnet: at most so many `params`, so much `memory` or `latency`; none is the full model."""

    name: str
    params: int | None = None
    memory: MemoryTarget | None = None
    latency: LatencyTarget | None = None

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name):
            raise ValueError(f"budget name {self.name!r} may hold letters, digits, '-', '_' and '.' only")
        if self.params is not None:
            _positive(self, "params")
        given = [name for name in ("params", "memory", "latency") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"budget {self.name} has {' and '.join(given)}; give it one target, or none")

    @property
    def target(self) -> int | None:
        """The target in whole parameters, bytes or nanoseconds."""
        if self.memory is not None:
            return self.memory.bytes
        return self.latency.nanoseconds if self.latency is not None else self.params

    def __str__(self) -> str:
        return str(self.memory or self.latency or ("full" if self.params is None else f"{self.params:,}"))


def _check_order(budgets: tuple[Budget, ...]) -> None:
    """Of targets that can be compared without a model, each must be below the ones before, and the full model first."""
    names = [b.name for b in budgets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"budgets {names} must be at least one, each name once")
    least: dict[object, int] = {}
    for index, budget in enumerate(budgets):
        comparable = None
        if budget.memory is not None:
            comparable = (budget.memory.serving, budget.memory.prefill)
        kind = ("latency" if budget.latency is not None else "params", comparable)
        rises = budget.target is not None and budget.target >= least.get(kind, budget.target + 1)
        if rises or (budget.target is None and index):
            raise ValueError(f"budgets {names} must fall from the largest to the smallest, each size once")
        if budget.target is not None:
            least[kind] = budget.target


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource(_Strict):
    """Documents to train on: a file, glob or directory, `s3://bucket/prefix`, `hf://org/name`, or `stdlib://`.

    A row that holds `messages_field` goes through the tokenizer's chat template; any other row is its `field`.
    """

    path: str
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    field: str = "text"
    messages_field: str = "messages"
    split: str = "train"
    max_documents: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a file, a glob, a directory, s3://, hf:// or stdlib://")
        _positive(self, *(name for name in ("max_documents", "max_tokens") if getattr(self, name) is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(_Strict):
    """What the family is trained and measured on."""

    sources: tuple[DataSource, ...]
    heldout_fraction: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction={self.heldout_fraction} must lie between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer(_Strict):
    """AdamW, with a linear warm-up and then a constant or cosine rate down to `final_fraction` of the peak."""

    learning_rate: float
    warmup_steps: int = 60
    schedule: Literal["constant", "cosine"] = "constant"
    final_fraction: float = 0.1
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "max_grad_norm")
        _not_negative(self, "warmup_steps", "weight_decay")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"final_fraction={self.final_fraction} must lie between 0 and 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: each must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSchedule(_Strict):
    """How the router takes part in a stage (arXiv 2511.16664, section on the router).

    `mode` soft: the student runs under probability-weighted masks. hard: under the sampled choice, which carries the
    selected probability's gradient. frozen: on the subnets resolved from the router as it stands, without masks.
    `temperature` (tau) falls exponentially and `scale` rises linearly, each from its first value to its last.
    """

    mode: Literal["soft", "hard", "frozen"] = "soft"
    learning_rate: float = 1e-2
    temperature: tuple[float, float] = (1.0, 0.05)
    scale: tuple[float, float] = (1.0, 10.0)
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "learning_rate")
        _not_negative(self, "loss_weight")
        if min(*self.temperature, *self.scale) <= 0:
            raise ValueError(f"temperature={self.temperature} and scale={self.scale} must be greater than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(_Strict):
    """One stage of distillation: `batch_size` sequences of `sequence_length` tokens a step, for `steps` steps.

    `budgets` gives each budget's share of every global batch; shares are exact over the batch (C6). Every process
    runs `micro_batch_size` sequences at once. `recompute` keeps of each layer its input alone until the backward pass,
    which costs a second forward pass.
    """

    name: str
    sequence_length: int
    batch_size: int
    steps: int
    budgets: dict[str, float]
    optimizer: Optimizer
    router: RouterSchedule = field(default_factory=RouterSchedule)
    micro_batch_size: int = 1
    recompute: bool = False
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        _positive(self, "sequence_length", "batch_size", "steps", "micro_batch_size", "checkpoint_every")
        if not self.name or not all(c.isalnum() or c in "-_" for c in self.name):
            raise ValueError(f"stage name {self.name!r} may hold letters, digits, '-' and '_' only")
        _multiple("batch_size", self.batch_size, "micro_batch_size", self.micro_batch_size)
        if not self.budgets or min(self.budgets.values()) < 0 or sum(self.budgets.values()) <= 0:
            raise ValueError(f"budgets={self.budgets} must give each budget a share of at least 0, and some more")

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_size * self.sequence_length

    def micro_steps(self, processes: int) -> int:
        """Micro-batches that each of so many processes runs in a step; ValueError where the batch does not divide."""
        together = self.micro_batch_size * processes
        _multiple("batch_size", self.batch_size, "micro_batch_size x processes", together)
        return self.batch_size // together


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation(_Strict):
    """The task loss: kl_weight x forward KL(teacher || student) at `temperature` + ce_weight x cross-entropy.

    `teacher` frozen: a copy of the checkpoint teaches every budget. trainable: the full budget teaches the smaller
    ones and learns from cross-entropy itself.
    """

    teacher: Literal["frozen", "trainable"] = "frozen"
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "temperature")
        if self.kl_weight < 0 or self.ce_weight < 0 or self.kl_weight + self.ce_weight == 0:
            raise ValueError(f"kl_weight={self.kl_weight}, ce_weight={self.ce_weight}: one must be greater than 0")
        if self.teacher == "trainable" and self.ce_weight == 0:
            raise ValueError("teacher=trainable needs ce_weight > 0; without it the full budget has nothing to learn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining(_Strict):
    """Train a teacher from nothing, for recipes without one: a tokenizer, then cross-entropy on the data.

    A micro-batch is the whole batch unless `micro_batch_size` says otherwise.
    """

    model: ModelConfig
    sequence_length: int
    batch_size: int
    steps: int
    optimizer: Optimizer
    micro_batch_size: int | None = None
    tokenizer_bytes: int = 2_000_000

    def __post_init__(self) -> None:
        _positive(self, "sequence_length", "batch_size", "steps", "tokenizer_bytes")
        if self.micro_batch_size is not None:
            _positive(self, "micro_batch_size")
            _multiple("batch_size", self.batch_size, "micro_batch_size", self.micro_batch_size)

    def stage(self) -> Stage:
        """The same run as a stage at the full budget, so that one training loop serves both."""
        return Stage(
            name="pretrain",
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size or self.batch_size,
            steps=self.steps,
            budgets={"full": 1.0},
            optimizer=self.optimizer,
            router=RouterSchedule(mode="frozen"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher(_Strict):
    """The checkpoint to start from: `path` (directory, `s3://...` or Hub name) or `pretrain`, one of them.

    `model` is the geometry expected at `path`: it lets `elastic plan` work without a download, and is checked against
    the checkpoint's config.json when that is fetched.
    """

    path: str | None = None
    model: ModelConfig | None = None
    pretrain: Pretraining | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.pretrain is None):
            raise ValueError("name either path or pretrain, and not both")
        if self.pretrain is not None and self.model is not None:
            raise ValueError("model describes the checkpoint at path; a teacher that is trained has pretrain.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance(_Strict):
    """Calibration of the rankings: sequences for the width scores, and (fewer, being run often) for depth."""

    samples: int = 1024
    sequence_length: int = 8192
    batch_size: int = 1
    depth_samples: int = 64

    def __post_init__(self) -> None:
        _positive(self, "samples", "sequence_length", "batch_size", "depth_samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Router(_Strict):
    """The router's size; its schedule belongs to each stage."""

    hidden_size: int = 256

    def __post_init__(self) -> None:
        _positive(self, "hidden_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(_Strict):
    """What is measured of every budget: held-out tokens, and problems answered by generation (exact match)."""

    heldout_tokens: int = 1_000_000
    sequence_length: int = 8192
    batch_size: int = 1
    problems: str | None = None
    max_problems: int = 256
    max_new_tokens: int = 512

    def __post_init__(self) -> None:
        _positive(self, "heldout_tokens", "sequence_length", "batch_size", "max_problems", "max_new_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion(_Strict):
    """The gate to `champion`: held-out cross-entropy at most `margin` (relative) above the present champion's."""

    margin: float = 0.01

    def __post_init__(self) -> None:
        _not_negative(self, "margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(_Strict):
    """A whole run: from a teacher and a dataset to a registered family.

    `latency_table` is the file of `elastic profile` that latency budgets are counted by. `storage` is how slices are
    published: each whole, for every MLflow client, or nested in one another, for `elastic pull`, at the storage of the
    largest.
    """

    family: str
    teacher: Teacher
    data: DataConfig
    axes: Axes
    budgets: tuple[Budget, ...]
    stages: tuple[Stage, ...]
    importance: Importance = field(default_factory=Importance)
    router: Router = field(default_factory=Router)
    distillation: Distillation = field(default_factory=Distillation)
    evaluation: Evaluation = field(default_factory=Evaluation)
    promotion: Promotion = field(default_factory=Promotion)
    latency_table: str | None = None
    dtype: Dtype = "bfloat16"
    pad_ffn: bool = False
    storage: Storage = "materialised"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.family or not all(c.isalnum() or c in "-_" for c in self.family):
            raise ValueError(f"family {self.family!r} may hold letters, digits, '-' and '_' only")
        _check_order(self.budgets)
        timed = [b.name for b in self.budgets if b.latency is not None]
        if timed and self.latency_table is None:
            raise ValueError(
                f"budget {timed[0]} is a latency, which needs latency_table: the file that `elastic profile` "
                "measures on the device to serve from"
            )
        names = [b.name for b in self.budgets]
        if not self.stages or len({s.name for s in self.stages}) < len(self.stages):
            raise ValueError("stages must be at least one, each name once")
        for stage in self.stages:
            for name in stage.budgets:
                if name not in names:
                    raise ValueError(f"stage {stage.name}: budget {name!r} is not one of {', '.join(names)}")
