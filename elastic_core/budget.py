"""What a budget allows, as fields or as text.

Parameters, all of them or those that a token passes through; memory when serving; or the time of a decoding step.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from elastic_core.schema import OPTIONAL, Strict, checked_name, positive

Dtype = Literal["float32", "bfloat16"]

WHOLE = "family"  # what the elastic checkpoint itself is called beside its budgets

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
class Serving(Strict):
    """How a submodel is served."""

    context: int
    """Tokens in a sequence at most, the prompt included. Example: `131072`."""
    batch: int = 1
    """Sequences served at once. Example: `8`."""
    dtype: Dtype = "bfloat16"
    """The floating-point type that it computes in. Example: `bfloat16`."""

    def __post_init__(self) -> None:
        positive(self, "context", "batch")

    def __str__(self) -> str:
        return f"ctx={self.context},batch={self.batch},dtype={self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTarget(Strict):
    """Memory when serving: weights, caches and activations.

    As text: 16GiB@ctx=131072 or, with everything said, 16GiB@ctx=131072,batch=8,dtype=bfloat16,prefill=2048.
    """

    bytes: int
    """Bytes of memory at most. Example: `17179869184`."""
    serving: Serving
    """How the submodel is served."""
    prefill: int = 2048
    """Tokens of a prompt that are read at a time. Example: `2048`."""

    def __post_init__(self) -> None:
        positive(self, "bytes", "prefill")

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
class LatencyTarget(Strict):
    """The time of a decoding step, by a latency table.

    As text: 12ms, or 12ms@ctx=32768,batch=1.
    """

    seconds: float
    """Seconds of a decoding step at most. Example: `0.012`."""
    serving: Serving | None = None
    """How the submodel is served, which must be as the latency table was measured; unset, as that was."""

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
class Budget(Strict):
    """A named target for a subnet: parameters, active ones, memory or latency; without a target, the full model."""

    name: str
    """What the size is called, once in a recipe. Example: `9b`."""
    params: int | None = None
    """Parameters at most. Example: `8900000000`."""
    memory: MemoryTarget | None = None
    """Memory when serving, at most. Example: `16GiB@ctx=131072`."""
    latency: LatencyTarget | None = None
    """The time of a decoding step, at most; it needs `latency_table`. Example: `12ms`."""
    active_params: int | None = field(default=None, metadata=OPTIONAL)
    """Parameters that a token passes through, at most: all but those of the experts that it does not choose.
    Example: `2800000000`."""

    def __post_init__(self) -> None:
        checked_name("budget", self.name)
        if self.name.lower() == WHOLE:
            raise ValueError(f"budget {self.name!r} needs another name: the elastic checkpoint is stored as {WHOLE!r}")
        positive(self, *(name for name in ("params", "active_params") if getattr(self, name) is not None))
        targets = ("params", "active_params", "memory", "latency")
        given = [name for name in targets if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"budget {self.name} has {' and '.join(given)}; give it one target, or none")

    @property
    def target(self) -> int | None:
        """The target in whole parameters, bytes or nanoseconds."""
        if self.memory is not None:
            return self.memory.bytes
        if self.latency is not None:
            return self.latency.nanoseconds
        return self.params if self.active_params is None else self.active_params

    @property
    def kind(self) -> str:
        """What it counts, by the name of the field; without a target, parameters."""
        kinds = ("active_params", "memory", "latency")
        return next((name for name in kinds if getattr(self, name) is not None), "params")

    def __str__(self) -> str:
        if self.active_params is not None:
            return f"{self.active_params:,} active"
        return str(self.memory or self.latency or ("full" if self.params is None else f"{self.params:,}"))


def check_order(budgets: tuple[Budget, ...]) -> None:
    """Of targets that can be compared without a model, each must be below the ones before, and the full model first."""
    names = [b.name for b in budgets]
    if not names or len({name.lower() for name in names}) < len(names):
        raise ValueError(f"budgets {names} must be at least one, each name once, whatever its case")
    least: dict[object, int] = {}
    for index, budget in enumerate(budgets):
        comparable = None
        if budget.memory is not None:
            comparable = (budget.memory.serving, budget.memory.prefill)
        kind = (budget.kind, comparable)
        rises = budget.target is not None and budget.target >= least.get(kind, budget.target + 1)
        if rises or (budget.target is None and index):
            raise ValueError(f"budgets {names} must fall from the largest to the smallest, each size once")
        if budget.target is not None:
            least[kind] = budget.target
