"""What preflight refuses before hours are spent."""

import dataclasses

import pytest
from micro import MICRO

from elastic_core.geometry import ModelConfig
from elastic_core.recipe import Recipe
from elastic_core.schema import build
from tasks.running.preflight import check_model

FOUND = build(ModelConfig, MICRO["teacher"]["pretrain"]["model"])


def recipe(expected: ModelConfig | None) -> Recipe:
    return build(Recipe, {**MICRO, "teacher": {"path": "org/teacher", "model": expected}})


def test_a_teacher_of_the_expected_geometry_passes_whatever_does_not_shape_it() -> None:
    check_model(recipe(None), FOUND)
    check_model(recipe(dataclasses.replace(FOUND, max_position_embeddings=1 << 20, eos_token_id=7)), FOUND)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, "teacher.model.hidden_size is 48, but the checkpoint at org/teacher has 32"),
        ({"hybrid_override_pattern": "M-M-*"}, "teacher.model.hybrid_override_pattern is M-M-., but .* has M-M.-"),
        ({"conv_kernel": 3}, "teacher.model.conv_kernel is 3, but .* has 4"),
    ],
)
def test_a_teacher_of_another_geometry_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        check_model(recipe(dataclasses.replace(FOUND, **change)), FOUND)
    assert "\n" not in str(raised.value)
