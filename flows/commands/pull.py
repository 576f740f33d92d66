"""`elastic pull`: bring a registered model here, or grow a smaller size of it."""

from pathlib import Path

import typer

from elastic_core.budget import WHOLE
from flows.commands.models import describe
from flows.serving.services import registry_services
from tasks import artifacts, tracking
from tasks.running.bars import bar
from tasks.settings import Settings, home_directory


def pull_model(model: str, output: Path, *, elastic: bool = False) -> None:
    """Fetch NAME, NAME@ALIAS or NAME:VERSION into `output`, every digest verified, and say what it is.

    With `elastic` it is the checkpoint that the model was cut from.
    """
    with registry_services(home_directory()):
        settings = Settings.from_environment(need_bucket=False)
        version = tracking.resolve(settings.registry, model)
        pull_version(settings, version, output, WHOLE if elastic else None)
    of = "the elastic checkpoint of " if elastic else ""
    typer.echo(f"{output}: {of}{version.name} version {version.version}, {describe(output)}")


def pull_version(settings: Settings, version: tracking.ModelVersion, output: Path, part: str | None = None) -> None:
    """Fetch a registered version, or another part of what it was published with, into `output`.

    Where it is there already, its digests are verified.
    """
    with bar(f"pulling {version.name}:{version.version}") as report:
        artifacts.fetch(
            artifacts.open_store(settings),
            version.tags[tracking.MANIFEST],
            part or version.tags[tracking.BUDGET],
            output,
            progress=report,
        )
