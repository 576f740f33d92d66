"""The race as a program, on services of its own. `make race`"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from elastic_core.planning.machine import H100
from elastic_core.planning.plan import plan_recipe
from elastic_core.planning.profile import recipe_table
from elastic_core.recipe import Recipe
from flows.commands.recipes import load_recipe
from flows.commands.run import own_services
from flows.commands.teacher import teacher_geometry
from flows.commands.terminal import text_table, wide_console
from tasks.reporting.numbers import human_count, human_seconds
from tasks.reporting.race import ROWS, write_race


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe's file, or its name, such as tiny.")],
    page: Annotated[Path, typer.Argument(help="The Markdown page to write; its picture and its rows go beside it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: stages.0.steps=100 ...")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each way, from different seeds.")] = 3,
    share: Annotated[float, typer.Option(help="The share of the recipe's tokens that the elastic run has.")] = 1.0,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the race takes.")] = False,
) -> None:
    """Run the race on a recipe's teacher, data, axes and budgets, and write what came of it."""
    loaded = load_recipe(recipe, overrides or [])
    if plan:
        wide_console().print(text_table(planned(loaded, seeds, share)))
        return
    with own_services():
        from flows.race import race

        found = race(loaded, seeds, page.with_suffix(ROWS), share)
    write_race(page, loaded.family, found)
    typer.echo(f"{page} has the results")


def planned(recipe: Recipe, seeds: int, share: float) -> list[dict[str, str]]:
    """What the laps of each way train, and how long that takes an H100."""
    from flows.race import laps, raced  # which imports Prefect

    model, table = teacher_geometry(recipe), recipe_table(recipe)
    number, tokens, flops = Counter[str](), Counter[str](), Counter[str]()
    for way, alike, lap in laps(raced(recipe, share), seeds):
        stages = plan_recipe(lap, model, H100, (1,), table).stages[-len(lap.stages) :]
        number[way] += alike
        tokens[way] += alike * sum(stage.tokens for stage in stages)
        flops[way] += alike * sum(stage.flops.total for stage in stages)
    return [
        {
            "way": way,
            "laps": str(count),
            "tokens": human_count(tokens[way]),
            "time of an H100": human_seconds(3600 * H100.hours(flops[way])),
        }
        for way, count in number.items()
    ]


if __name__ == "__main__":
    typer.run(main)
