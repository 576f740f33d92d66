"""Ablations: what each setting of a recipe brings, by training its sizes with and without it. `make ablations`

Every training is a lap of the race, so a cached step: ablations that were killed go on with the lap they were in. What
was reached is kept in a file, and not run again, wherever they go on.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from prefect import flow

from elastic_core.recipe import Recipe
from flows.race import course
from tasks.reporting.race import Entry, Rows
from tasks.running.usage import noting
from tasks.settings import home_directory


@flow(name="ablations")
def ablations(recipes: Mapping[str, Recipe], share: float, seeds: int, rows: Path) -> list[Entry]:
    """What the sizes of each recipe reach together on a share of its tokens, from so many seeds of training.

    A stage whose router learns ends at the subnets that the router chooses. What `rows` has of a recipe is taken from
    there, and what is found is added to it.
    """
    home, found = home_directory(), list[Entry]()
    with noting(home):
        for name, recipe in recipes.items():
            first = course(recipe, str(home / "workspace"))
            kept = Rows(rows, recipe.family, first.key(share))
            for number in range(seeds):
                kept.of(name, recipe.seed + number, partial(first.again(number).elastic, name, share))
            found += [entry for entry in kept.entries if entry.way == name]
    return found
