"""A family that is registered is not made yet: whoever asks learns so until it was promoted or refused."""

from dataclasses import replace
from pathlib import Path

import pytest
from records import evaluated, measured
from trainee import AXES, BUDGETS, STAGE, write_family

from elastic_core.files import checkpoint
from elastic_core.recipe import DataConfig, DataSource, Recipe, Teacher
from flows.elastify import elastify
from tasks.records import OrderComparison, StageRecord
from tasks.register import destination, register
from tasks.running import steps
from tasks.running.code import CODE, project_version
from tasks.running.digests import artifact, file_digest
from tasks.running.recipe_run import to_do, tracked
from tasks.settings import Settings


def test_a_recipe_is_not_made_before_its_family_was_promoted_or_refused_nor_once_the_code_changed(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between registering and promoting leaves a run that a schedule carries on."""
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat sat on the mat\n")
    directory = write_family(tmp_path / "family")
    checkpoint.write_family(directory, replace(checkpoint.read_family(directory), lineage={CODE: "1.0"}))
    family = artifact(directory)
    recipe = Recipe(
        family=f"nano{settings.bucket.removeprefix('test-')}",
        teacher=Teacher(path=family.path),
        data=DataConfig(sources=(DataSource(path=str(texts)),)),
        axes=AXES,
        budgets=BUDGETS,
        stages=(STAGE,),
    )
    metrics = tmp_path / "metrics.jsonl"
    metrics.touch()
    with tracked(recipe, settings, elastify.fn) as run_id:
        release = register.fn(
            recipe=recipe,
            family=family,
            slices={budget.name: family for budget in BUDGETS},
            stages=[StageRecord(family=family, metrics=str(metrics), metrics_sha256=file_digest(metrics))],
            evaluation=evaluated(*(measured(budget.name, 1.0) for budget in BUDGETS)),
            orders=OrderComparison(heldout_tokens=400, cuts=()),
            corpus=family,
            destination=destination(settings),
            run_id=run_id,
            workspace=str(tmp_path / "workspace"),
        )
        assert release.exists() and "not yet carried out" in to_do(recipe, settings, elastify.fn)
    assert not to_do(recipe, settings, elastify.fn)
    monkeypatch.setitem(steps.WAYS, "distill", lambda: "by other code")
    assert to_do(recipe, settings, elastify.fn) == f"distill changed since {project_version()}"
