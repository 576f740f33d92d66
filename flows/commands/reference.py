"""What may be written in a recipe, for editors and for people: a JSON Schema and a page, both from its classes."""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter

from elastic_core.recipe import Recipe
from elastic_core.schema import descriptions, example

DRAFT = "https://json-schema.org/draft/2020-12/schema"
SCALARS = {int: "whole number", float: "number", str: "text", bool: "true or false"}

INTRODUCTION = """# What may be written in a recipe

This page and [recipe.schema.json](recipe.schema.json) are written by `make reference`, from the classes that a recipe
fills. A recipe names what differs from the defaults; an unknown setting is refused.

An editor with YAML support completes a recipe and checks it where its first line is

```
# yaml-language-server: $schema=recipe.schema.json
```

with the path from the recipe to the schema; `elastic schema > recipe.schema.json` writes one elsewhere. Relative paths
in a recipe are relative to its file. On the command line a setting is `stages.0.steps=100`, with positions that count
from 0.
"""


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe: its settings, their types, defaults, descriptions and examples."""
    schema = TypeAdapter(Recipe).json_schema()
    definitions = schema["$defs"]
    for cls in settings_classes():
        definition = schema if cls is Recipe else definitions[cls.__name__]
        unset = {field.name for field in dataclasses.fields(cls) if field.default is None}
        for name, shown in definition["properties"].items():
            del shown["position"]  # of Prefect's forms
            if name in unset:
                _allow_null(shown)
            if (given := example(descriptions(cls).get(name, ""))) is not None:
                shown["examples"] = [yaml.safe_load(given)]
        if hasattr(cls, "from_text"):
            as_text = {"type": "string", "description": definition["description"]}
            definitions[cls.__name__] = {"anyOf": [definition, as_text]}
    return {"$schema": DRAFT, **schema}


def _allow_null(shown: dict[str, Any]) -> None:
    """Let a field be null, which a recipe may say of what is unset, and forms leave empty."""
    kind = {name: shown.pop(name) for name in [*shown] if name not in ("title", "description")}
    shown |= {"anyOf": [*kind.get("anyOf", [kind]), {"type": "null"}], "default": None}


def recipe_page() -> str:
    """The page that describes every setting, in Markdown."""
    return "\n".join([INTRODUCTION, *(_section(cls, places) for cls, places in settings_classes().items())])


def settings_classes() -> dict[type, list[str]]:
    """Every class of a recipe's settings, and the places where it stands, such as `stages[].optimizer`."""
    found: dict[type, list[str]] = {}

    def visit(cls: type, place: str) -> None:
        found.setdefault(cls, []).append(place)
        for name, hint in _hints(cls).items():
            for inner, below in _classes(hint):
                visit(inner, f"{place}.{name}{below}".removeprefix("."))

    visit(Recipe, "")
    return found


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _classes(hint: Any) -> Iterator[tuple[type, str]]:
    """The classes in a field's type, each with `[]` where it stands in a list."""
    if dataclasses.is_dataclass(hint):
        yield typing.cast(type, hint), ""
    for inner in typing.get_args(hint):
        for cls, below in _classes(inner):
            yield cls, f"[]{below}" if typing.get_origin(hint) is tuple else below


def _section(cls: Any, places: list[str]) -> str:
    where = ", ".join(f"`{place}`" for place in places if place)
    lines = [
        f"## {cls.__name__}",
        "",
        *([where, ""] if where else []),
        typing.cast(str, cls.__doc__).replace("\n    ", "\n").strip(),
        "",
        "| setting | type | default | meaning | example |",
        "| --- | --- | --- | --- | --- |",
    ]
    hints, described = _hints(cls), descriptions(cls)
    for field in dataclasses.fields(cls):
        meaning, _, given = described[field.name].partition(" Example: ")
        row = (f"`{field.name}`", _type(hints[field.name]), _default(field), meaning, given.removesuffix("."))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |")
    return "\n".join([*lines, ""])


def _type(hint: Any) -> str:
    """A type as people call it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        name = typing.cast(type, hint).__name__
        return f"[{name}](#{name.lower()}){', or text' if hasattr(hint, 'from_text') else ''}"
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in args)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(_type(arg) for arg in args if arg is not type(None))
    if origin is tuple:
        return f"list of {_several(args[0])}" if args[-1] is Ellipsis else f"[{', '.join(map(_type, args))}]"
    if origin is dict:
        return f"mapping of names to {_several(args[1])}"
    return SCALARS[hint]


def _several(hint: Any) -> str:
    return f"{_type(hint)}s" if hint in (int, float, str) else _type(hint)


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return "unset" if field.default is None else f"`{json.dumps(field.default)}`"
    if field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory()
    return "its defaults" if dataclasses.is_dataclass(made) else f"`{json.dumps(made)}`"
