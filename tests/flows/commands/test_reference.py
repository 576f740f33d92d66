"""Laws of what may be written in a recipe: every field is described; page, schema and form say what the classes say."""

import copy
import dataclasses
import json
import re
import typing
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jsonschema.exceptions import best_match
from pydantic import TypeAdapter

from elastic_core.recipe import Recipe
from elastic_core.schema import build, descriptions, example
from flows.commands.reference import recipe_page, recipe_schema, settings_classes

RECIPES = Path(__file__).parents[3] / "flows/recipes"
FIELDS = [(cls, field.name) for cls in settings_classes() for field in dataclasses.fields(cls)]
NAMES = [f"{cls.__name__}.{name}" for cls, name in FIELDS]


def is_made_of_settings(hint: Any) -> bool:
    """Whether a field holds settings that have descriptions of their own, one set of them or a list."""
    return dataclasses.is_dataclass(hint) or any(map(is_made_of_settings, typing.get_args(hint)))


def test_every_class_of_settings_is_found() -> None:
    places = {cls.__name__: places for cls, places in settings_classes().items()}
    assert len(places) >= 20
    assert places["Optimizer"] == ["teacher.pretrain.optimizer", "stages[].optimizer"]
    assert places["Serving"] == ["budgets[].memory.serving", "budgets[].latency.serving"]


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=NAMES)
def test_every_field_has_a_sentence_and_an_example_that_it_takes(cls: type, name: str) -> None:
    description, hint = descriptions(cls)[name], typing.get_type_hints(cls)[name]
    assert re.fullmatch(r"[A-Z`].+\.", description)
    given = example(description)
    if given is None:
        assert is_made_of_settings(hint), f"{name} shows no example"
    else:
        build(hint, yaml.safe_load(given))


def test_the_page_and_the_schema_in_the_repository_are_those_of_the_classes() -> None:
    written_by = "run `make reference`"
    assert (RECIPES / "README.md").read_text() == recipe_page(), written_by
    assert json.loads((RECIPES / "recipe.schema.json").read_text()) == recipe_schema(), written_by


def test_the_page_has_every_field_with_its_default() -> None:
    page = recipe_page()
    for cls, name in FIELDS:
        section = page.partition(f"\n## {cls.__name__}\n")[2].partition("\n## ")[0]
        assert f"\n| `{name}` |" in section
    assert "| `warmup_steps` | whole number | `60` | Steps in which" in page


def test_the_form_of_prefect_shows_what_each_field_is() -> None:
    schema = TypeAdapter(Recipe).json_schema()
    for cls, name in FIELDS:
        definition = schema if cls is Recipe else schema["$defs"][cls.__name__]
        assert definition["properties"][name]["description"] == descriptions(cls)[name]


@cache
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(recipe_schema())


def faults_of(data: Any) -> list[str]:
    """What an editor underlines."""
    return [f"{error.json_path}: {error.message}" for error in validator().iter_errors(data)]


def read(name: str) -> Any:
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_schema_takes_every_recipe_in_the_repository_and_an_editor_finds_it(path: Path) -> None:
    found = re.fullmatch(r"# yaml-language-server: \$schema=(.+)", path.read_text().splitlines()[0])
    assert found is not None
    assert (path.parent / found[1]).samefile(RECIPES / "recipe.schema.json")
    assert faults_of(yaml.safe_load(path.read_text())) == []


def test_the_schema_takes_budgets_as_text() -> None:
    data = read("tiny")
    data["budgets"][1:] = [{"name": "m", "memory": "16GiB@ctx=131072"}, {"name": "s", "latency": "12ms"}]
    assert faults_of(data) == []


WRONG: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "seeed": (("seeed",), 1),
    "hiden_size": (("router", "hiden_size"), 64),
    "lerning_rate": (("stages", 1, "optimizer", "lerning_rate"), 1e-3),
    "sources": (("data",), {"seed": 1}),
    "steps": (("stages", 0), {"name": "a", "sequence_length": 1, "batch_size": 1, "budgets": {}, "optimizer": {}}),
    "family": (("family",), 12),
    "teacher": (("teacher",), "org/name"),
    "stages": (("stages",), {"stage1": {}}),
    "budgets": (("stages", 0, "budgets"), ["l"]),
    "budgets.l": (("stages", 0, "budgets", "l"), "much"),
    "batch_size": (("stages", 0, "batch_size"), "many"),
    "micro_batch_size": (("stages", 0, "micro_batch_size"), 2.5),
    "checkpoint_every": (("stages", 0, "checkpoint_every"), None),
    "recompute": (("stages", 0, "recompute"), "sometimes"),
    "temperature": (("stages", 0, "router"), {"temperature": [1.0]}),
    "scale": (("stages", 0, "router"), {"scale": [1, 2, 3]}),
    "mode": (("stages", 0, "router"), {"mode": "warm"}),
    "schedule": (("stages", 0, "optimizer", "schedule"), "linear"),
    "dtype": (("dtype",), "float16"),
    "ffn_layout": (("ffn_layout",), "puzzle"),
    "hidden": (("axes", "hidden"), 128),
    "per_layer": (("axes", "per_layer"), ["depth"]),
    "params": (("budgets", 1, "params"), "small"),
    "memory": (("budgets", 1, "memory"), 16),
    "hidden_size": (("teacher", "pretrain", "model", "hidden_size"), "wide"),
    "vocab_size": (("teacher", "pretrain", "model", "vocab_size"), [1024]),
    "heldout_fraction": (("data", "heldout_fraction"), "2 %"),
    "max_tokens": (("data", "sources", 0, "max_tokens"), "all"),
}


@pytest.mark.parametrize(("field", "wrong"), WRONG.items(), ids=WRONG)
def test_the_schema_refuses_what_is_wrong_and_names_the_field(
    field: str, wrong: tuple[tuple[str | int, ...], Any]
) -> None:
    data = copy.deepcopy(read("tiny"))
    inner, (path, value) = data, wrong
    for key in path[:-1]:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
    inner[path[-1]] = value
    error = best_match(validator().iter_errors(data))
    assert error is not None
    line = f"{error.json_path}: {error.message}"
    assert field in line
    with pytest.raises(ValueError, match=re.escape(field)):
        build(Recipe, data)
