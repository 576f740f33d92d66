"""Laws of the ceiling: what a schedule may take by itself it takes, and for more it asks a person once."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from micro import write_micro
from prefect.context import FlowRunContext
from typer.testing import CliRunner

from elastic_core.judging import Benchmark, Endpoint
from elastic_core.planning.machine import H100
from elastic_core.planning.plan import plan_recipe
from elastic_core.recipe import Recipe
from flows.cli import app
from flows.commands.recipes import load_recipe
from flows.commands.teacher import teacher_geometry
from flows.elastify import pipeline
from flows.serving import ceiling
from tasks.settings import HOME, Settings


class Suspended(Exception):
    """Stands for the end of the process of a suspended run."""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(write_micro(tmp_path))


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is put on the page of a run that is suspended."""
    found: list[str] = []

    def suspend(**given: Any) -> None:
        raise Suspended

    monkeypatch.setattr(ceiling, "create_markdown_artifact", lambda **given: found.append(given["markdown"]))
    monkeypatch.setattr(ceiling, "suspend_flow_run", suspend)
    monkeypatch.setattr(ceiling, "_waiting", lambda run: None)
    return found


RERUN = {"auto_scheduled": False, "created_by": SimpleNamespace(type="AUTOMATION")}  # what starts a crashed run again


def begin(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Be inside a run that the schedule has begun."""
    policy = SimpleNamespace(pause_keys=changes.pop("pause_keys", None))
    run = {"id": "r", "name": "nano 2026-12-01 03:00", "deployment_id": "d", "auto_scheduled": True, "created_by": None}
    context = SimpleNamespace(flow_run=SimpleNamespace(**{**run, **changes}, empirical_policy=policy))
    monkeypatch.setattr(FlowRunContext, "get", lambda: context)


def ask(recipe: Recipe, tmp_path: Path, max_gpu_hours: float) -> str:
    settings = Settings(tracking_uri="sqlite:///x", bucket="models", home=tmp_path / "home")
    return ceiling.ask_first(recipe, settings, pipeline, max_gpu_hours)


def test_below_the_ceiling_a_scheduled_run_goes_on(
    recipe: Recipe, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch)
    assert ask(recipe, tmp_path, 1.0) == "" and not shown


@pytest.mark.parametrize("changes", [{}, RERUN], ids=str)
def test_above_it_a_run_that_no_person_started_says_what_it_would_take_and_is_suspended(
    changes: dict[str, Any], recipe: Recipe, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, **changes)
    with pytest.raises(Suspended):
        ask(recipe, tmp_path, 0.0)
    (page,) = shown
    for text in ("GPU-hours, about $", "the ceiling of this schedule is 0 GPU-hours", "Resume this run", "cancel it"):
        assert text in page


def test_a_run_that_a_person_starts_does_not_ask(
    recipe: Recipe, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, auto_scheduled=False)
    assert ask(recipe, tmp_path, 0.0) == "" and not shown


def test_what_a_person_has_resumed_goes_on_and_does_not_ask_again_after_a_crash(
    recipe: Recipe, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, pause_keys={ceiling.ASKS})
    assert ask(recipe, tmp_path, 0.0) == ""
    begin(monkeypatch, **RERUN)
    assert ask(recipe, tmp_path, 0.0) == "" and not shown
    begin(monkeypatch)
    with pytest.raises(Suspended):  # the next run of the schedule, which may be of other code
        ask(recipe, tmp_path, 0.0)


def test_what_crashed_before_the_code_changed_asks_again(
    recipe: Recipe, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch, pause_keys={ceiling.ASKS})
    assert ask(recipe, tmp_path, 0.0) == ""
    monkeypatch.setattr(ceiling, "ways", lambda pipeline: {"distill": "of an upgrade"})
    begin(monkeypatch, **RERUN)
    with pytest.raises(Suspended):
        ask(recipe, tmp_path, 0.0)


def test_what_benchmarks_take_at_most_counts_and_one_of_unknown_length_asks(recipe: Recipe) -> None:
    def over(benchmark: Benchmark, hours: float, endpoint: Endpoint | None = None) -> str:
        judges = replace(recipe.evaluation, benchmarks=(benchmark,), endpoint=endpoint)
        return ceiling.over(replace(recipe, evaluation=judges), hours)

    alone = plan_recipe(recipe, teacher_geometry(recipe), H100, (1,)).all_gpu_hours
    assert ceiling.over(recipe, 1.01 * alone) == ""
    assert "answers as long as they may be" in over(Benchmark(name="math-500"), 1.01 * alone)
    assert over(Benchmark(name="math-500"), 100.0) == ""
    far = Benchmark(name="far", path="s3://bucket/far", format="exact")
    assert "how many problems far has is not known, and the ceiling" in over(far, 100.0)
    assert over(far, 1.01 * alone, Endpoint(url="http://vllm:8000/v1", model="{path}")) == ""


def test_while_one_waits_the_next_has_nothing_to_do(
    recipe: Recipe, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(monkeypatch)
    monkeypatch.setattr(ceiling, "_waiting", lambda run: SimpleNamespace(name="nano 2026-11-30 03:00"))
    said = ask(recipe, tmp_path, 0.0)
    assert said == "nano 2026-11-30 03:00 has asked already: resume or cancel that run" and not shown


def test_a_plan_that_cannot_be_made_asks(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(recipe: Recipe) -> None:
        raise ValueError("the Hub does not answer")

    monkeypatch.setattr(ceiling, "teacher_geometry", unknown)
    assert "not known (the Hub does not answer)" in ceiling.over(recipe, 100.0)


def test_the_papers_run_is_above_a_thousand_gpu_hours_and_below_a_million() -> None:
    nano = load_recipe(Path("nano-12b"))
    assert ceiling.over(nano, 1e3) and not ceiling.over(nano, 1e6)


def test_a_schedule_needs_a_ceiling_before_anything_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    raised = CliRunner().invoke(app, ["up", "tiny", "--schedule", "0 3 * * *"]).exception
    assert isinstance(raised, ValueError) and "needs --max-gpu-hours" in str(raised)
    assert not (tmp_path / "home").exists()
