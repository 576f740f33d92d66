"""Ablations as a program, on services of its own. `make ablations`"""

from pathlib import Path
from typing import Annotated

import typer

from elastic_core.schema import build
from flows.commands.recipes import load_recipe, read_yaml
from flows.commands.run import own_services
from tasks.reporting.race import BASE, ROWS, write_ablations


def main(
    recipe: Annotated[Path, typer.Argument(help="A recipe's file, or its name, such as tiny.")],
    changes: Annotated[Path, typer.Argument(help="A YAML file: for each name the settings to change.")],
    page: Annotated[Path, typer.Argument(help="The Markdown page to write; its rows go beside it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change in all of them.")] = None,
    share: Annotated[float, typer.Option(help="The share of the recipe's tokens that each training has.")] = 0.25,
    seeds: Annotated[int, typer.Option(help="Trainings of each, from different seeds.")] = 3,
) -> None:
    """Train a recipe's sizes as it stands and with each of the changes, and write how they compare."""
    changed = build(dict[str, tuple[str, ...]], read_yaml(changes), str(changes))
    if BASE in changed:
        raise typer.BadParameter(f"{changes}: {BASE!r} is the recipe without a change; call the change otherwise")
    named = {BASE: (), **changed}
    recipes = {name: load_recipe(recipe, (*(overrides or ()), *settings)) for name, settings in named.items()}
    with own_services():
        from flows.ablations import ablations

        found = ablations(recipes, share, seeds, page.with_suffix(ROWS))
    write_ablations(page, recipes[BASE].family, found, named)
    typer.echo(f"{page} has the results")


if __name__ == "__main__":
    typer.run(main)
