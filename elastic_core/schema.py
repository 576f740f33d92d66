"""Frozen dataclasses from plain data, strictly: from YAML, the command line and the Prefect form alike."""

import ast
import dataclasses
import difflib
import inspect
import math
import re
import sys
import threading
import time
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")

# What a family, a budget, a stage and a version may be called: the registry, S3 and file systems take it as it is.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

# Python 3.11 raises SystemError where two threads parse at once ("AST constructor recursion depth mismatch"). Ours take
# turns; where a thread of another library parses beside one of ours, ours does it again.
_parser = threading.Lock()
_PARSES = 6

# Metadata of a field that `to_dict` leaves out where it has its default: it is of something that few models have.
OPTIONAL = types.MappingProxyType({"optional": True})

# Metadata of a setting that is in no step's key: no result depends on it, or a step is given it by itself.
UNKEYED_FIELD = "unkeyed"
UNKEYED = {UNKEYED_FIELD: True}


class _Mistyped(ValueError):
    """A value of another type than its field has: its message still lacks what the field is."""


def build(cls: type[T], data: object, where: str = "") -> T:
    """Build the dataclass `cls` from plain YAML or JSON data, strictly.

    Raises ValueError with the dotted path of the field for an unknown key (with the nearest known one), a missing
    required field or a value of the wrong type (with the field's description), or a value that the class refuses.
    """
    return typing.cast(T, _convert(cls, data, where))


def descriptions(cls: type) -> dict[str, str]:
    """What each field of a dataclass is: the text that stands below it in the source, in one line."""
    return _described_classes(cls.__module__).get(cls.__name__, {})


def syntax_tree(source: str) -> ast.Module:
    """Python source, parsed, in any thread."""
    with _parser:
        for attempt in range(_PARSES):
            try:
                return ast.parse(source)
            except SystemError:
                if attempt == _PARSES - 1:
                    raise
                time.sleep(0.01 * 2**attempt)
    raise AssertionError("unreachable")


@cache
def _described_classes(module: str) -> dict[str, dict[str, str]]:
    tree = syntax_tree(inspect.getsource(sys.modules[module]))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: dict(_described_fields(node.body)) for node in classes}


def _described_fields(body: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, below in pairwise(body):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


def example(description: str) -> str | None:
    """The example, in YAML, that a description ends with."""
    found = re.search(r"Example: `(.+)`\.$", description)
    return found[1] if found else None


def _described(cls: type, name: str, error: object) -> ValueError:
    description = descriptions(cls).get(name)
    return ValueError(f"{error}. {name}: {description}" if description else str(error))


def _build_dataclass(cls: Any, data: object, where: str) -> Any:
    if isinstance(data, cls):
        return data
    if isinstance(data, str) and hasattr(cls, "from_text"):
        data = cls.from_text(data, where or cls.__name__)
    if not isinstance(data, Mapping):
        raise _Mistyped(f"{where or cls.__name__} is {data!r}; expected a mapping")
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
            raise _described(cls, name, f"{prefix}{name} is missing; it has no default")
    values = {str(key): _convert_field(cls, str(key), hints, value, prefix) for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def _convert_field(cls: type, name: str, hints: Mapping[str, Any], value: Any, prefix: str) -> Any:
    try:
        return _convert(hints[name], value, f"{prefix}{name}")
    except _Mistyped as error:
        raise _described(cls, name, error) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`; only conversions that lose nothing are made (YAML reads 1e9 as text)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise _Mistyped(f"{where} is {value!r}; expected one of: {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _Mistyped(f"{where} is {value!r}; expected a list")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise _Mistyped(f"{where} has {len(value)} entries; expected {len(inner)}")
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _Mistyped(f"{where} is {value!r}; expected a mapping")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    problems: list[ValueError] = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, where)
        except ValueError as error:
            problems.append(error)
    raise problems[-1] if isinstance(value, Mapping | list | tuple) else problems[0]


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint in (int, float) and isinstance(value, str | float | int) and not isinstance(value, bool):
        return _convert_number(hint, value, where)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise _Mistyped(f"{where} is {value!r}; expected {getattr(hint, '__name__', hint)}")


def _convert_number(hint: Any, value: str | float, where: str) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Mistyped(f"{where} is {value!r}; expected a number") from None
    if not math.isfinite(number):
        raise _Mistyped(f"{where} is {value!r}; expected a finite number")
    if hint is float:
        return number
    if not number.is_integer():
        raise _Mistyped(f"{where} is {value!r}; expected a whole number")
    return value if isinstance(value, int) else int(Decimal(value))


def to_dict(config: Any) -> dict[str, Any]:
    """The plain data that `build` turns back into `config`; tuples become lists, as in JSON.

    An OPTIONAL field is left out where it has its default.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            there = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not _is_absent(value, f)}
            return {name: plain(inner) for name, inner in there.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        return value

    return typing.cast(dict[str, Any], plain(config))


def _is_absent(config: Any, field: dataclasses.Field[Any]) -> bool:
    return "optional" in field.metadata and getattr(config, field.name) == field.default


def told(config: Any) -> dict[str, Any]:
    """The plain data of `to_dict` without what has its default: what a person would write."""
    values, plain = dict[str, Any](), to_dict(config)
    for field in dataclasses.fields(config):
        inner = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if inner == default:
            continue
        if dataclasses.is_dataclass(inner):
            values[field.name] = told(inner)
        elif isinstance(inner, tuple) and inner and all(dataclasses.is_dataclass(one) for one in inner):
            values[field.name] = [told(one) for one in inner]
        else:
            values[field.name] = plain[field.name]
    return values


def checked_name(what: str, value: str) -> str:
    """`value`, if it is a NAME; ValueError otherwise. MLflow takes 256 characters for FAMILY-BUDGET."""
    if not NAME.fullmatch(value):
        raise ValueError(
            f"{what} {value!r} is not a name: a letter or digit, then letters, digits, '.', '_' or '-', all ASCII, "
            "at most 100"
        )
    return value


def positive(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not value > 0:
            raise ValueError(f"{name}={value} must be greater than 0")


def multiple_of(name: str, value: int, of: str, divisor: int) -> None:
    if value % divisor:
        below = value // divisor * divisor
        nearest = f"{below} or {below + divisor}" if below else f"{divisor}"
        raise ValueError(f"{name}={value} is not a multiple of {of}={divisor}; nearest valid: {nearest}")


def not_negative(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0")


def _leave_empty(shown: dict[str, Any]) -> None:
    """Take the choice of null, which is the default, out of a field's JSON schema."""
    del shown["default"]
    choices = [choice for choice in shown.pop("anyOf", ()) if choice != {"type": "null"}]
    shown |= choices[0] if len(choices) == 1 else {"anyOf": choices}


class Strict:
    """Makes pydantic, which builds Prefect's forms, refuse unknown keys and infinite numbers as `build` does.

    In the form the fields keep their order, which it would lose, and the names that they have in a recipe; below each
    stands its description. A field that may be unset is left empty: the form has no choice of "None" for it.
    """

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema, described = handler(core_schema), descriptions(cls)
        for position, (name, shown) in enumerate(handler.resolve_ref_schema(schema)["properties"].items()):
            shown |= {"title": name, "position": position}
            if shown.get("default", ...) is None:
                _leave_empty(shown)
            if name in described:
                shown["description"] = described[name]
        return schema
