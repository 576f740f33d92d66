"""A recipe file, with overrides from the command line, as a `Recipe`; by its path, or by the name of one at hand."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BeforeValidator

from elastic_core.recipe import Recipe
from elastic_core.schema import build, told
from tasks.settings import home_directory

RECIPES = Path(__file__).parents[1] / "recipes"  # the package's own


def checked(cls: type) -> BeforeValidator:
    """An annotation for a flow's parameter: built as strictly as a recipe file; pydantic alone makes 1 of true."""
    return BeforeValidator(partial(build, cls))


class _UniqueKeys(yaml.SafeLoader):
    """YAML's plain data, where a key that is given twice is an error: of two values one would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, (key, mark) in enumerate(keys):
            if any(key == before for before, _ in keys[:place]):
                raise yaml.constructor.ConstructorError(problem=f"{key} is given twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, given by its file or its name; `overrides` are `dotted.key=value`: `stages.0.steps=100`.

    Relative paths in a recipe are relative to its file. ValueError, one line, names the file and the setting at fault.
    """
    path = recipe_file(path)
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(
            f"{path}: is not a recipe; expected a mapping with family, teacher, data, axes, budgets, stages"
        )
    for override in overrides:
        _apply(data, override)
    _anchor(data, path.absolute().parent)
    try:
        return build(Recipe, data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_yaml(path: Path) -> Any:
    """Plain data from a YAML file; ValueError, one line, for one that cannot be read, or that gives a key twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text in UTF-8; name a recipe, such as tiny") from error
    except OSError as error:
        names = ", ".join(recipe_names())
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); name a recipe's file, or one of {names}"
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{where}: is not YAML ({_problem(error)})") from error


def recipe_file(path: Path) -> Path:
    """The file of a recipe: the path itself, or where it is a bare name with no such file, that of the named recipe."""
    if path.is_file() or path.suffix or len(path.parts) != 1:
        return path
    return next((file for file in _named() if file.stem == path.name), path)


def recipe_names() -> list[str]:
    """The recipes at hand: those that `elastic up` was given, which are in the state directory, and the package's."""
    return sorted({file.stem for file in _named()})


def keep_recipe(recipe: Recipe) -> None:
    """Put a recipe at hand, by the name of its family, for all who have this state directory."""
    file, own = _kept() / f"{recipe.family}.yaml", RECIPES / f"{recipe.family}.yaml"
    if own.exists() and load_recipe(own) == recipe:  # a copy would outlive the package's next version
        file.unlink(missing_ok=True)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(yaml.safe_dump(told(recipe), sort_keys=False), encoding="utf-8")
    part.replace(file)


def _named() -> list[Path]:
    return [file for folder in (_kept(), RECIPES) for file in sorted(folder.glob("*.yaml"))]


def _kept() -> Path:
    return home_directory() / "recipes"


def _apply(data: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} is not key=value, such as stages.0.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not YAML ({_problem(error)})") from error
    *parents, last = key.split(".")
    for part in parents:
        data = _enter(data, part, key)
        if not isinstance(data, dict | list):
            raise ValueError(f"override {key}: {part} is a value and has no settings below it")
    if isinstance(data, list):
        data[_index(data, last, key)] = value
    else:
        data[last] = value


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or "unreadable"


def _enter(data: Any, part: str, key: str) -> Any:
    if isinstance(data, list):
        return data[_index(data, part, key)]
    return data.setdefault(part, {})


def _index(data: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(data):
        raise ValueError(f"override {key}: {part!r} is not a position in a list of {len(data)}; they count from 0")
    return int(part)


def _anchor(data: dict[str, Any], directory: Path) -> None:
    """Make the paths that are relative to the recipe, or to a home, absolute; Hub names, URIs and empty paths stay."""

    def anchor(settings: dict[str, Any], name: str, *, must_be_here: bool = True) -> None:
        path = settings.get(name)
        if not isinstance(path, str) or not path or "://" in path:
            return
        anchored = directory / os.path.expanduser(path)
        if must_be_here or path.startswith("~") or anchored.exists():
            settings[name] = str(anchored)

    evaluation = _mapping(data.get("evaluation"))
    for source in (*_mappings(_mapping(data.get("data")).get("sources")), *_mappings(evaluation.get("benchmarks"))):
        anchor(source, "path")
    anchor(data, "latency_table")
    anchor(evaluation, "problems")
    for model in (_mapping(data.get("teacher")), *_mappings(data.get("references"))):
        anchor(model, "path", must_be_here=False)  # else it is a name on the Hub


def _mapping(value: Any) -> dict[str, Any]:
    """A mapping of a recipe that is not checked yet; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> list[dict[str, Any]]:
    """The mappings in a list of such a recipe."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
