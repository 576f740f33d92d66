"""Retraining on a schedule: where the teacher, the data, the recipe or the code changed, a new candidate."""

import logging
from typing import Annotated

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from elastic_core.recipe import Recipe
from flows.commands.recipes import checked
from flows.elastify import elastify, pipeline
from flows.serving.ceiling import ask_first
from flows.serving.failures import explain_failure
from flows.serving.guard import guard_run
from flows.serving.naming import called, name_after, tag_run
from flows.serving.page import headline
from flows.serving.turn import only_one
from tasks.running.recipe_run import to_do
from tasks.settings import Settings

UNCHANGED, SKIPPED = "Unchanged", "Skipped"  # states of runs that had nothing to do

logger = logging.getLogger(__name__)


@flow(name="retrain", flow_run_name=called(lambda given: given["recipe"].family), on_failure=[explain_failure])
def retrain(*, max_gpu_hours: float = 0.0, force: bool = False, recipe: Annotated[Recipe, checked(Recipe)]) -> State:
    """Look for a new teacher, new data or new code; make and register a family where there is any.

    Nothing is done when this recipe was carried out before, by the same code, on the same teacher and data. A new
    family becomes champion where no budget is worse than the present champion; otherwise it stays a candidate.

    Args:
        max_gpu_hours: The GPU-hours that a run of a schedule may take by its plan. Above them it is suspended, before
            its first step, until a person resumes it. A run that a person starts does not ask.
        force: Go through the steps even if nothing changed.
        recipe: The whole run, as in a recipe file.
    """
    guard_run()
    tag_run(recipe.family)
    with only_one(f"retrain {recipe.family}") as mine:
        if not mine:
            return Completed(name=SKIPPED, message=f"another retraining of {recipe.family} is under way")
        return _retrain(recipe, max_gpu_hours, force)


def _retrain(recipe: Recipe, max_gpu_hours: float, force: bool) -> State:
    settings = Settings.from_environment()
    reason = "it was asked for" if force else to_do(recipe, settings, pipeline)
    if not reason:
        return Completed(name=UNCHANGED, message="the teacher, the data, the recipe and the code are unchanged")
    if waits := ask_first(recipe, settings, pipeline, max_gpu_hours):
        return Completed(name=SKIPPED, message=waits)
    logger.info("%s is made: %s", recipe.family, reason)
    evaluation, _, release, verdict = elastify(recipe)
    name_after(release)
    return Completed(message=headline(evaluation, release, verdict))
