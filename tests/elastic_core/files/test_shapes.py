"""Laws of shapes.json: what was measured comes back, and the weights of a shaped family are those it came from."""

import dataclasses
import json
from pathlib import Path

import pytest
from trainee import write_family

from elastic_core.cost import subnet_params
from elastic_core.files import checkpoint
from elastic_core.files.shapes import MeasuredShapes, read_shapes, write_shaped
from elastic_core.search import Candidate
from elastic_core.training.job import load_router


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return write_family(tmp_path / "family")


def shape_again(
    source: Path, directory: Path, lineage: dict[str, object] | None = None, hidden: int | None = None
) -> MeasuredShapes:
    described = checkpoint.read_family(source)
    if lineage is not None:
        described = dataclasses.replace(described, lineage=lineage)
    if hidden is not None:
        last = described.budgets[-1]
        subnet = dataclasses.replace(last.subnet, hidden=hidden)
        config = checkpoint.read_config(source)
        smaller = dataclasses.replace(last, subnet=subnet, params=subnet_params(config, subnet))
        described = dataclasses.replace(described, budgets=(*described.budgets[:-1], smaller))
    router = load_router(source, checkpoint.read_config(source), described)
    measured = {
        budget.name: (Candidate(subnet=budget.subnet, cost=budget.params, loss=0.1 * index),)
        for index, budget in enumerate(described.budgets)
    }
    shapes = MeasuredShapes(tokens=64, budgets=measured)
    write_shaped(source, directory, described, router, shapes)
    return shapes


def test_what_was_measured_comes_back_and_the_rest_of_the_family_is_as_it_was(family, tmp_path):
    shapes = shape_again(family, tmp_path / "shaped")
    assert read_shapes(tmp_path / "shaped") == shapes
    assert read_shapes(family) is None
    assert checkpoint.read_family(tmp_path / "shaped") == checkpoint.read_family(family)
    for path in family.iterdir():
        assert (tmp_path / "shaped" / path.name).read_bytes() == path.read_bytes(), path.name


def test_weights_are_linked_and_not_copied_and_nothing_else_is(family, tmp_path):
    shape_again(family, tmp_path / "shaped")
    linked = {path.name for path in family.iterdir() if path.samefile(tmp_path / "shaped" / path.name)}
    assert linked == {"model.safetensors"}


def test_other_shapes_leave_the_family_that_they_came_from_as_it_was(family, tmp_path):
    before = {path.name: path.read_bytes() for path in family.iterdir()}
    shape_again(family, tmp_path / "shaped", lineage={"teacher": "another"}, hidden=8)
    assert {path.name: path.read_bytes() for path in family.iterdir()} == before
    assert (tmp_path / "shaped/README.md").read_bytes() != before["README.md"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"budgets": {"s": [{"loss": 0.1}]}}, "budgets.s"),
        ({"more": 1}, "more is not a known setting"),
    ],
    ids=str,
)
def test_a_file_of_something_else_is_named_with_its_field(family, tmp_path, change, says):
    shapes = shape_again(family, tmp_path / "shaped")
    path = tmp_path / "shaped/shapes.json"
    path.write_text(json.dumps(dataclasses.asdict(shapes) | change))
    with pytest.raises(checkpoint.CheckpointError, match=f"{path}: .*{says}"):
        read_shapes(tmp_path / "shaped")
