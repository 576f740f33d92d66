"""The MLflow run of a recipe: one of its own for every change of its parameters."""

import uuid
from pathlib import Path

from micro import write_micro

from elastic_core.schema import to_dict
from flows.commands.recipes import load_recipe
from tasks import tracking
from tasks.running.recipe_run import run_key


def test_a_setting_that_begins_no_step_anew_still_begins_another_run(tracking_uri: str, tmp_path: Path) -> None:
    """MLflow refuses a parameter of another value: the run of before could not be gone on with."""
    path, family = write_micro(tmp_path), f"micro{uuid.uuid4().hex[:8]}"
    runs = []
    for override in ([], ["stages.0.checkpoint_minutes=1.5"], ["stages.0.sharding=hybrid"], []):
        recipe = load_recipe(path, override)
        key = run_key(recipe)
        runs.append(tracking.open_run(tracking_uri, experiment=family, run_key=key, run_name=key, tags={}))
        tracking.log_params(tracking_uri, runs[-1], to_dict(recipe))
    assert len({*runs}) == 3 and runs[0] == runs[3]
