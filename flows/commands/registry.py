"""What the commands share that look at the model registry: where it is, and the words for a version."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from flows.serving.running import read_running
from flows.serving.services import applied, basic_environment, tracking_environment
from tasks import tracking
from tasks.settings import TRACKING_URI, Settings, home_directory


@contextmanager
def open_registry() -> Iterator[Settings]:
    """The registry of the environment, of the `elastic up` that runs here, or of the state directory; starts nothing.

    ValueError where the state directory has none yet.
    """
    home = home_directory()
    running = read_running(home)
    served = {} if running is None else running.environment
    with applied(basic_environment(home)):
        settings = Settings.from_environment(tracking_environment(home) | served | _set(os.environ), need_bucket=False)
        database = home / "mlflow.db"
        if settings.registry != tracking_environment(home)[TRACKING_URI]:
            tracking.check_database(settings.registry)
        elif not database.exists():
            raise ValueError(
                f"nothing is registered in {home}: `elastic run RECIPE` makes a family, or set {TRACKING_URI} to where "
                "yours is registered"
            )
        yield settings


def _set(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if value}


def label(version: tracking.ModelVersion) -> str:
    return f"{version.name}:{version.version}"


def alike(versions: list[tracking.ModelVersion]) -> bool:
    """Whether the losses of versions may be compared: all were measured under the same conditions."""
    return len({version.tags.get(tracking.MEASURED) for version in versions}) <= 1


def flat(tree: Any, path: str = "") -> dict[str, str]:
    """Nested mappings and lists as `stages.0.steps` to text, by the paths that `elastic run` takes as overrides."""
    if not tree and not path:
        return {}
    if not tree or not isinstance(tree, Mapping | list):
        return {path: tree if isinstance(tree, str) else json.dumps(tree)}
    children: Sequence[tuple[Any, Any]] = list(tree.items() if isinstance(tree, Mapping) else enumerate(tree))
    return {
        name: text
        for key, below in children
        for name, text in flat(below, f"{path}.{key}" if path else f"{key}").items()
    }
