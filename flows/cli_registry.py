"""The commands of `elastic` that are about registered models. As in `cli`, nothing heavy is imported before its use."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

Model = Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION; NAME alone is its champion.")]
Version = Annotated[
    str, typer.Argument(help="NAME, NAME@ALIAS or NAME:VERSION; NAME alone is its champion or candidate.")
]
Reason = Annotated[str, typer.Option(help="Why; it is recorded in the registry.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def pull(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The directory to write: a new one, or one with a smaller size to grow."),
    ],
    elastic: Annotated[
        bool, typer.Option("--elastic", help="The checkpoint that it is cut from, which holds every size.")
    ] = False,
) -> None:
    """Bring a registered model here, every digest verified; a smaller size of it that is there already is grown.

    With --elastic it is what `elastic slice` cuts other sizes from.
    """
    from flows.commands.pull import pull_model

    pull_model(model, output, elastic=elastic)


@app.command()
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            help="NAME, NAME@ALIAS or NAME:VERSION, to start; other sizes of it start when they are asked for."
        ),
    ],
    host: Annotated[str, typer.Option(help="The address to listen at; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    memory: Annotated[
        str | None, typer.Option(help="For all weights and caches, such as 80GB; by default what this device has.")
    ] = None,
    cache: Annotated[str, typer.Option(help="Of it, what each size has for its requests.")] = "4GiB",
    engine: Annotated[
        str | None, typer.Option(help="vllm, transformers, or such a program's path; by default vLLM where it is.")
    ] = None,
    engine_options: Annotated[str, typer.Option(help="Options that the engine is to have besides.")] = "",
) -> None:
    """Serve registered models by OpenAI's protocol, sizes started on demand; a small one may think for a large one.

    ELASTIC_SERVE_KEY in the environment is the key that clients need.
    """
    from elastic_core.budget import parse_bytes
    from flows.commands.serve import serve_models
    from tasks.running.engines import find_program

    serve_models(
        models,
        find_program(engine, shlex.split(engine_options)),
        host=host,
        port=port,
        memory=None if memory is None else parse_bytes(memory, "--memory"),
        cache=parse_bytes(cache, "--cache"),
    )


@app.command()
def gc(
    older_than: Annotated[float, typer.Option(min=0.0, help="Days in which it was not used.")] = 7.0,
    max_size: Annotated[
        str | None, typer.Option(help="Of the workspace, such as 500GB: what is superseded goes earlier, down to it.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is found, instead of only listing it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove published versions without asking.")] = False,
) -> None:
    """List or remove what is of no use: versions that nothing in the registry points to, what was interrupted, what
    later runs have superseded in the workspace, and what was pulled to be served.
    """
    from elastic_core.budget import parse_bytes
    from flows.commands.garbage import collect
    from flows.commands.terminal import confirmed
    from flows.serving.services import embedded_services
    from tasks.settings import Settings, make_home

    max_bytes = None if max_size is None else parse_bytes(max_size, "--max-size")
    with embedded_services(make_home(), share=True):
        collect(
            Settings.from_environment(),
            older_than_days=older_than,
            max_bytes=max_bytes,
            delete=delete,
            confirm=confirmed(yes),
        )


@app.command()
def ls(
    family: Annotated[str | None, typer.Argument(help="The versions of this family alone.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Older versions without an alias too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the registered families: sizes, aliases, scores, storage, age."""
    from flows.commands.ls import list_families

    list_families(family, every=every, as_json=as_json)


@app.command()
def show(model: Version, as_json: AsJson = False) -> None:
    """Say of a registered model from what and by what it was made, how good it is, and how to load it."""
    from flows.commands.show import show_model

    show_model(model, as_json=as_json)


@app.command()
def diff(first: Version, second: Version, as_json: AsJson = False) -> None:
    """Say in what two registered models differ: recipe, data and code, shape, scores."""
    from flows.commands.diff import diff_models

    diff_models(first, second, as_json=as_json)


@app.command()
def promote(
    model: Annotated[str, typer.Argument(help="NAME or NAME:VERSION; NAME alone is its candidate.")], reason: Reason
) -> None:
    """Make a registered model the champion, with all sizes that were registered with it."""
    from flows.commands.promote import promote_model

    promote_model(model, reason)


@app.command()
def rollback(model: Annotated[str, typer.Argument(help="The NAME of a registered model.")], reason: Reason) -> None:
    """Give the place of a champion, and of all sizes promoted with it, back to the champion before."""
    from flows.commands.rollback import roll_back_model

    roll_back_model(model, reason)
