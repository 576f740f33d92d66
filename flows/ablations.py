"""Ablations: what each setting of a recipe brings, by training its sizes with and without it. `make ablations`

Every training is a lap of the race, so a cached step: ablations that were killed go on with the lap they were in.
"""

from prefect import flow

from elastic_core.recipe import Recipe
from flows.race import course
from tasks.reporting.race import Entry
from tasks.running.usage import noting
from tasks.settings import home_directory


@flow(name="ablations")
def ablations(recipes: dict[str, Recipe], share: float, seeds: int) -> list[Entry]:
    """What the sizes of each recipe reach together on a share of its tokens, from so many seeds of training.

    A stage whose router learns ends at the subnets that the router chooses.
    """
    home = home_directory()
    with noting(home):
        courses = {name: course(recipe, str(home / "workspace")) for name, recipe in recipes.items()}
        return [
            entry
            for seed in range(seeds)
            for name, each in courses.items()
            for entry in each.again(seed).elastic(name, share)
        ]
