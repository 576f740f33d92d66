"""What flows ask of MLflow outside of steps is asked again, as steps are done again, after a fault that passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_core.budget import Budget
from elastic_core.recipe import DataConfig, DataSource, Evaluation
from flows.commands.recipes import load_recipe
from flows.evaluation import evaluation
from flows.export import export
from flows.retrain import retrain
from tasks import tracking
from tasks.running import patience, recipe_run
from tasks.settings import BUCKET, HOME, TRACKING_URI, ServiceError

ROOT = Path(__file__).parents[2]


def retrained() -> Any:
    return retrain.fn(recipe=load_recipe(ROOT / "flows/recipes/tiny.yaml"))


def exported() -> Any:
    return export.fn("tiny-m", Budget(name="xs", params=18000))


def evaluated() -> Any:
    return evaluation.fn("tiny-m", DataConfig(sources=(DataSource(path="stories.jsonl"),)), Evaluation())


@pytest.mark.parametrize("begin", [retrained, exported, evaluated])
def test_an_mlflow_that_is_away_for_a_moment_does_not_end_a_run(
    begin: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [ServiceError("MLflow: refused", transient=True), ServiceError("MLflow: there is no such model")]

    def answer(*asked: Any, **named: Any) -> Any:
        raise answers.pop(0)

    for name, value in {HOME: str(tmp_path), TRACKING_URI: "http://mlflow:5000", BUCKET: "models"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(recipe_run, "run_key", lambda recipe: "0" * 32)
    monkeypatch.setattr(tracking, "resolve", answer)
    monkeypatch.setattr(tracking, "tags_of_finished", answer)
    with pytest.raises(ServiceError, match="there is no such model"):
        begin()
    assert not answers
