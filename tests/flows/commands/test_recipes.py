"""Every recipe in the tree builds, fits its teacher, and can be resolved; overrides and mistakes say what they do."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from nano import NANO_4B_PATTERN, NANO_9B, NANO_12B, NANO_30B

from elastic_core.cost import subnet_params
from elastic_core.resolve import resolve_budgets
from elastic_core.router import ElasticModel, Router
from elastic_core.subnet import full_subnet, is_nested
from elastic_core.training.curriculum import generator
from flows.commands.recipes import load_recipe
from flows.commands.teacher import teacher_geometry

RECIPES = Path(__file__).parents[3] / "flows/recipes"


def test_the_papers_recipe_has_the_papers_numbers():
    recipe = load_recipe(RECIPES / "nano-12b.yaml")
    assert [stage.steps for stage in recipe.stages] == [5166, 1788]
    assert [round(stage.tokens / 1e9) for stage in recipe.stages] == [65, 45]
    first, second = (stage.router.temperature for stage in recipe.stages)
    steps = 5166 + 1788
    assert first[1] == second[0] == pytest.approx(0.05 ** (5166 / steps), rel=2e-3)


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.yaml"))])
def test_a_recipes_budgets_resolve_to_nested_subnets_within_them(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model = teacher_geometry(recipe)
    elastic = ElasticModel(model, recipe.axes.bind(model), tuple(range(model.num_layers)))
    router = Router(elastic, len(recipe.budgets), recipe.router.hidden_size)
    router.initialise(generator(0))
    subnets = resolve_budgets(router, recipe.budgets)
    sizes = [subnet_params(model, subnet) for subnet in subnets]
    assert all(b.params is None or size <= b.params for b, size in zip(recipe.budgets, sizes, strict=True))
    assert all(is_nested(small, large) for large, small in pairwise(subnets))


@pytest.mark.parametrize(("name", "model"), [("nano-12b", NANO_12B), ("nano-4b", NANO_9B), ("nano3-30b", NANO_30B)])
def test_nvidias_teachers_have_nvidias_geometry(name, model):
    assert load_recipe(RECIPES / f"{name}.yaml").teacher.model == model


def test_the_budget_of_4b_is_met_exactly_by_the_shape_that_nvidia_published():
    recipe = load_recipe(RECIPES / "nano-4b.yaml")
    teacher, remaining = NANO_9B.hybrid_override_pattern, iter(enumerate(NANO_9B.hybrid_override_pattern))
    layers = [next(i for i, kind in remaining if kind == wanted) for wanted in NANO_4B_PATTERN]
    ranking = (*layers, *sorted(set(range(len(teacher))) - set(layers)))
    published = {"hidden": 3136, "ffn": 12544, "mamba_heads": 96, "depth": 42}

    elastic = ElasticModel(NANO_9B, recipe.axes.bind(NANO_9B), ranking)
    router = Router(elastic, len(recipe.budgets), 8)
    router.initialise(generator(0))
    preferred = {
        axis: torch.tensor([[0.0 if choice == published.get(axis, choice) else -9.0 for choice in choices]])
        for axis in elastic.axes.names
        for choices in [elastic.axes.choices(axis)]
    }
    router.imitate([preferred, preferred])
    full, small = resolve_budgets(router, recipe.budgets)
    assert full == full_subnet(NANO_9B)
    assert "".join(teacher[layer] for layer in small.layers) == NANO_4B_PATTERN
    assert (small.hidden, set(small.ffn), set(small.mamba_heads)) == (3136, {12544}, {96})
    assert subnet_params(NANO_9B, small) == recipe.budgets[1].params == 3_973_556_832


def test_an_override_changes_one_setting_and_nothing_else():
    plain = load_recipe(RECIPES / "tiny.yaml")
    changed = load_recipe(RECIPES / "tiny.yaml", ["stages.0.steps=7"])
    assert changed.stages[0].steps == 7
    assert changed.stages[1:] == plain.stages[1:]
    assert changed.data == plain.data


def test_paths_are_relative_to_the_recipe_and_uris_are_left_alone(tmp_path):
    text = (RECIPES / "tiny.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    paths = [source.path for source in load_recipe(tmp_path / "mine.yaml").data.sources]
    assert set(paths) == {"stdlib://", str(tmp_path / "tiny/problems-train-*.jsonl")}


def test_paths_in_a_home_are_found_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "mine.yaml").write_text((RECIPES / "nano-12b.yaml").read_text())
    changed = ["data.sources=[{path: ~/texts}]", "teacher.path=~/teacher"]
    recipe = load_recipe(tmp_path / "mine.yaml", changed)
    assert recipe.data.sources[0].path == str(tmp_path / "home/texts")
    assert recipe.teacher.path == str(tmp_path / "home/teacher")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.stepz=7", "stages[0].stepz is not a known setting; did you mean 'steps'?"),
        ("stages.0.steps=many", "stages[0].steps is 'many'; expected a number"),
        ("stages.9.steps=1", "'9' is not a position in a list of 2"),
        ("stages", "is not key=value"),
        ("dtype.deeper.still=1", "dtype is a value and has no settings below it"),
        ("axes.hidden=[80, 128]", "must fall from the largest"),
        ("budgets.1.params=0", "params=0 must be greater than 0"),
        ("teacher.path=somewhere", "either path or pretrain"),
        ("stages.0.budgets={xl: 1}", "budget 'xl' is not one of l, m, s"),
        (
            "teacher.pretrain.model.mamba_num_heads=9",
            "mamba_num_heads=9 is not a multiple of n_groups=2; nearest valid: 8 or 10",
        ),
        ("data.sources=[]", "sources is empty"),
        ("family=../other", "is not a name"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_setting(override, message):
    with pytest.raises(ValueError) as raised:
        load_recipe(RECIPES / "tiny.yaml", [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "is not a recipe"), ("family: [\n", "line 2: is not YAML"), (None, "cannot be read")],
)
def test_a_file_that_is_no_recipe_is_refused(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)
