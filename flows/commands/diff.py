"""`elastic diff A B`: in what two registered versions differ: recipe, data and code, shape, scores."""

import json
from collections.abc import Mapping
from typing import Any

import typer

from flows.commands.registry import alike, flat, label, open_registry
from flows.commands.show import CODE_TAG, is_elsewhere
from flows.commands.terminal import text_table, wide_console
from tasks import tracking
from tasks.reporting.numbers import fixed, human_bytes, per_second, percent
from tasks.settings import ServiceError, Settings


def diff_models(first: str, second: str, *, as_json: bool) -> None:
    """Print what differs between two versions; NAME alone is its champion, else its candidate."""
    with open_registry() as settings:
        aliases = (tracking.CHAMPION, tracking.CANDIDATE)
        versions = [tracking.resolve(settings.registry, reference, aliases) for reference in (first, second)]
        found: dict[str, dict[str, tuple[str, str]]] = {}
        notes = []
        try:
            found["recipe"] = differing(*(_recipe(settings, version) for version in versions))
        except ServiceError as error:
            notes.append(str(error))
    found |= {part: differing(*(_told(version, part) for version in versions)) for part in ("made from", "shape")}
    found["scores"] = differing(*({k: f"{v:.12g}" for k, v in version.metrics.items()} for version in versions))
    found["measured"] = differing(*(flat(json.loads(v.tags.get(tracking.CONDITIONS, "{}"))) for v in versions))
    if not alike(versions):
        notes.append("their losses were not measured alike, so they cannot be compared: see what was measured")
    labels = tuple(map(label, versions))
    if as_json:
        typer.echo(json.dumps({"versions": labels, "differences": found, "notes": notes}, indent=2))
        return
    console = wide_console()
    for part, rows in found.items():
        if rows:
            if part == "scores":
                rows = {name: score_texts(name, *scores) for name, scores in rows.items()}
            lines = [{part: name, labels[0]: a, labels[1]: b} for name, (a, b) in rows.items()]
            console.print(text_table(lines))
        else:
            console.print(f"{part}: no difference")
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)


def score_texts(name: str, first: str, second: str) -> tuple[str, str]:
    """A metric of two versions as other tables have it, or whole where that would show no difference."""
    shown = score_text(name, first), score_text(name, second)
    return shown if shown[0] != shown[1] else (first, second)


def score_text(name: str, text: str) -> str:
    """A metric as other tables have it, by its name; `-` stays."""
    if text == "-":
        return text
    value, kind = float(text), name.rpartition(".")[2]
    if kind in ("accuracy", "cut_answers", "standard_error", "unanswered"):
        return percent(value, 1)
    if kind == "weight_bytes":
        return human_bytes(value)
    if kind in ("params", "active_params", "tokens"):
        return fixed(value, 0)
    if kind == "tokens_per_second":
        return per_second(value)
    return fixed(value, 4)


def differing(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The entries of two mappings that are not the same; one that is missing is `-`."""
    names = [*first, *(name for name in second if name not in first)]
    pairs = {name: (first.get(name, "-"), second.get(name, "-")) for name in names}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def _recipe(settings: Settings, version: tracking.ModelVersion) -> dict[str, str]:
    """The recipe of a version, flat; a ServiceError where it is not known."""
    if not version.run_id:
        raise ServiceError(f"the recipe of {label(version)} is not known: it has no run")
    try:
        params = tracking.params_of(settings.tracking_uri, version.run_id)
    except ServiceError as error:
        raise ServiceError(f"the recipe of {label(version)} is not known: {error}") from error
    return {name: text for key, value in params.items() for name, text in flat(_parsed(value), key).items()}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # plain text, or what was cut to MLflow's limit
        return text


def _told(version: tracking.ModelVersion, part: str) -> dict[str, str]:
    if part == "shape":
        return flat(json.loads(version.tags.get(tracking.SUBNET, "{}")))
    tags = {name: value for name, value in version.tags.items() if name.startswith("elastic.")}
    kept = {name for name in tags if not is_elsewhere(name)}
    return {name.removeprefix("elastic."): tags[name] for name in sorted(kept | ({CODE_TAG} & tags.keys()))}
