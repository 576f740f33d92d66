"""`elastic ls`: the registered families, with the sizes, aliases, scores, storage and age of their versions."""

import json
import time
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import typer

from flows.commands.registry import alike, label, open_registry
from flows.commands.terminal import text_table, wide_console
from tasks import tracking
from tasks.reporting.numbers import fixed, human_age, human_bytes, human_count, percent


def list_families(family: str | None, *, every: bool, as_json: bool) -> None:
    """Print the versions that have an alias or are the newest of their model, or `every` version.

    ValueError where nothing is registered, or nothing of this family.
    """
    with open_registry() as settings:
        if family is None:
            found = tracking.versions_of(settings.registry, tracking.FAMILY)
        else:
            found = tracking.versions_of(settings.registry, tracking.FAMILY, family)
    shown = ordered(found if every else of_interest(found))
    if not shown:
        raise ValueError(f"nothing is registered{f' of a family {family!r}' if family else ''}; see `elastic run`")
    if as_json:
        typer.echo(json.dumps([as_data(version) for version in shown], indent=2))
        return
    console = wide_console()
    now = time.time()
    console.print(text_table([row(version, now) for version in shown]))
    for name, versions in groupby(shown, key=lambda version: version.tags[tracking.FAMILY]):
        if not alike(list(versions)):
            console.print(
                f"note: losses of {name} were not all measured alike; `elastic diff A B` says how", soft_wrap=True
            )
    if len(shown) < len(found):
        console.print(f"{len(found) - len(shown)} older versions without an alias are not shown; --all shows them")


def of_interest(versions: Iterable[tracking.ModelVersion]) -> list[tracking.ModelVersion]:
    """The versions that have an alias or are the newest of their model."""
    versions = list(versions)
    newest = {v.name: v.version for v in sorted(versions, key=lambda v: v.version)}
    return [v for v in versions if v.aliases or v.version == newest[v.name]]


def ordered(versions: Iterable[tracking.ModelVersion]) -> list[tracking.ModelVersion]:
    """By family, then by size from the largest, then from the newest."""
    return sorted(versions, key=lambda v: (v.tags[tracking.FAMILY], -v.metrics.get("params", 0), v.name, -v.version))


def row(version: tracking.ModelVersion, now: float) -> dict[str, str]:
    metrics, stored = version.metrics, version.tags.get(tracking.STORED)
    return {
        "model": label(version),
        "aliases": ", ".join(sorted(version.aliases)) or "-",
        "parameters": human_count(metrics["params"]) if "params" in metrics else "-",
        "loss": fixed(metrics.get("cross_entropy"), 4),
        "accuracy": percent(metrics.get("accuracy"), 1),
        "weights": human_bytes(metrics["weight_bytes"]) if "weight_bytes" in metrics else "-",
        "stored": human_bytes(int(stored)) if stored else "-",
        "age": human_age(now - version.created),
    }


def as_data(version: tracking.ModelVersion) -> dict[str, Any]:
    """A version as plain data; `stored_bytes` is what its own objects take in the bucket."""
    stored = version.tags.get(tracking.STORED)
    return {
        "family": version.tags[tracking.FAMILY],
        "budget": version.tags.get(tracking.BUDGET),
        "model": version.name,
        "version": version.version,
        "aliases": sorted(version.aliases),
        "created": version.created,
        "source": version.source,
        "stored_bytes": int(stored) if stored else None,
        "measured": version.tags.get(tracking.MEASURED),
        "metrics": dict(version.metrics),
    }
