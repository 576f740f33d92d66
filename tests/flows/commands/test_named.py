"""Recipes by name: the package's own, and those that `elastic up` was given, wherever the command is called."""

from pathlib import Path

import pytest
from micro import write_micro

from elastic_core.recipe import Recipe
from elastic_core.schema import build, told
from flows.commands.recipes import RECIPES, keep_recipe, load_recipe, recipe_names
from tasks.settings import HOME

OWN = {"tiny", "small", "nano-12b", "nano-4b", "nano3-30b"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with nothing in it, and a state directory beside."""
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return tmp_path


def test_the_packages_recipes_are_known_by_name_anywhere() -> None:
    assert set(recipe_names()) >= OWN
    for name in recipe_names():
        assert load_recipe(Path(name), ["seed=7"]) == load_recipe(RECIPES / f"{name}.yaml", ["seed=7"])


def test_a_recipe_that_was_kept_is_the_same_by_name(elsewhere: Path) -> None:
    mine = load_recipe(write_micro(elsewhere))
    keep_recipe(mine)
    assert "micro" in recipe_names() and load_recipe(Path("micro")) == mine


def test_the_packages_own_recipe_is_not_kept_and_ends_a_copy_that_differed() -> None:
    changed = load_recipe(Path("tiny"), ["seed=7"])
    keep_recipe(changed)
    assert load_recipe(Path("tiny")) == changed
    own = load_recipe(RECIPES / "tiny.yaml")
    keep_recipe(own)
    assert load_recipe(Path("tiny")) == own and recipe_names().count("tiny") == 1


def test_a_name_that_is_none_is_told_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"nano: cannot be read .*; name a recipe's file, or one of nano-12b, .*tiny"):
        load_recipe(Path("nano"))


def test_a_file_goes_before_a_name(elsewhere: Path) -> None:
    Path("tiny").write_text(write_micro(elsewhere).read_text())
    assert load_recipe(Path("tiny")).family == "micro"


@pytest.mark.parametrize("name", sorted(OWN))
def test_what_a_person_would_write_of_a_recipe_is_the_recipe_and_leaves_nothing_unset(name: str) -> None:
    recipe = load_recipe(Path(name))
    assert build(Recipe, told(recipe)) == recipe
    assert "None" not in repr(told(recipe))
