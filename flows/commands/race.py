"""The race as a program, on services of its own. `make race`"""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.recipes import load_recipe
from flows.commands.run import own_services
from tasks.reporting.race import write_race


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe's file, or its name, such as tiny.")],
    page: Annotated[Path, typer.Argument(help="The Markdown page to write; its picture goes beside it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change: stages.0.steps=100 ...")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each way, from different seeds.")] = 3,
) -> None:
    """Run the race on a recipe's teacher, data, axes and budgets, and write what came of it."""
    loaded = load_recipe(recipe, overrides or [])
    with own_services():
        from flows.race import race

        found = race(loaded, seeds)
    write_race(page, loaded.family, found)
    typer.echo(f"{page} has the results")


if __name__ == "__main__":
    typer.run(main)
