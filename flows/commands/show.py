"""`elastic show NAME`: from what and by what a registered version was made, how good it is, and how to load it."""

import json
import time
from collections.abc import Iterator, Mapping

import typer

from flows.commands.ls import as_data
from flows.commands.registry import flat, label, open_registry
from flows.commands.terminal import wide_console
from tasks import tracking
from tasks.reporting.numbers import fixed, human_age, human_bytes, percent
from tasks.running.code import CODE
from tasks.settings import ServiceError, Settings

CODE_TAG = f"elastic.{CODE}"

# Tags that have a line of their own, and those that are for programs.
ELSEWHERE = {
    tracking.FAMILY,
    tracking.VERSION,
    tracking.BUDGET,
    tracking.MANIFEST,
    tracking.REGISTRATION,
    tracking.HELDOUT_DIGEST,
    tracking.MEASURED,
    tracking.PARAMS,
    tracking.SUBNET,
    tracking.STORAGE,
    tracking.STORED,
    tracking.PULL,
    tracking.LOADS,
    tracking.CONDITIONS,
    tracking.PREFECT_RUN,
    tracking.PROMOTED,
    tracking.ROLLED_BACK,
    CODE_TAG,
}


def is_elsewhere(tag: str) -> bool:
    """Whether a tag is not shown with what a version was made from."""
    return tag in ELSEWHERE or tag.startswith(tracking.JUDGED)


def show_model(reference: str, *, as_json: bool) -> None:
    """Print what the registry knows of NAME (its champion, else its candidate), NAME@ALIAS or NAME:VERSION."""
    with open_registry() as settings:
        version = tracking.resolve(settings.registry, reference, (tracking.CHAMPION, tracking.CANDIDATE))
        if as_json:
            typer.echo(json.dumps({**as_data(version), "tags": dict(version.tags)}, indent=2))
            return
        lines = list(described(version, settings, time.time()))
    console = wide_console()
    for name, text in lines:
        console.print(f"{name:<12}{text}", soft_wrap=True, highlight=False, markup=False)


def described(version: tracking.ModelVersion, settings: Settings, now: float) -> Iterator[tuple[str, str]]:
    """Lines, each with its name."""
    tags, metrics = version.tags, version.metrics
    aliases = ", ".join(sorted(version.aliases)) or "no alias"
    yield "model", f"{label(version)}, {aliases}, registered {human_age(now - version.created)} ago"
    yield "family", f"{tags[tracking.FAMILY]}, version {tags[tracking.VERSION]}, budget {tags[tracking.BUDGET]}"
    yield "size", ", ".join(_sizes(version))
    for name, value in sorted(tags.items()):
        if name.startswith("elastic.") and not is_elsewhere(name):
            yield "from", f"{name.removeprefix('elastic.')}: {value}"
    if code := tags.get(CODE_TAG):
        yield "by", f"code: {code}"
    if version.run_id:
        yield "by", f"MLflow run: {_run_page(settings, version.run_id)}"
    if page := tags.get(tracking.PREFECT_RUN):
        yield "by", f"Prefect run: {page}"
    yield "scores", _scores(metrics)
    if judged := _judged(metrics):
        yield "pass@1", judged
    if conditions := tags.get(tracking.CONDITIONS):
        yield "measured", ", ".join(f"{name} {text:.12}" for name, text in flat(json.loads(conditions)).items())
    for tag, did in ((tracking.PROMOTED, "promoted"), (tracking.ROLLED_BACK, "rolled back")):
        if change := tracking.change_of(version, tag):
            other = "no champion" if change.other is None else f"version {change.other}"
            way = f"in place of {other}" if tag == tracking.PROMOTED else f"to {other}"
            yield did, f"{change.at} by {change.by}, {way}: {change.reason}"
    yield "objects", version.source
    yield "get", f"elastic pull {label(version)} -o {version.name}"
    yield "load", tags.get(tracking.LOADS) or version.description


def _sizes(version: tracking.ModelVersion) -> Iterator[str]:
    metrics, tags = version.metrics, version.tags
    if "params" in metrics:
        yield f"{metrics['params']:,.0f} parameters"
    if "active_params" in metrics:
        yield f"{metrics['active_params']:,.0f} of them active"
    if "weight_bytes" in metrics:
        yield f"{human_bytes(metrics['weight_bytes'])} of weights"
    if stored := tags.get(tracking.STORED):
        yield f"{human_bytes(int(stored))} stored ({tags.get(tracking.STORAGE, 'whole')})"


def _scores(metrics: Mapping[str, float]) -> str:
    if "cross_entropy" not in metrics:
        return "not measured"
    accuracy = f", accuracy {percent(metrics['accuracy'], 1)}" if "accuracy" in metrics else ""
    if metrics.get("cut_answers"):
        accuracy += f" with {percent(metrics['cut_answers'], 1)} of answers cut off"
    loss, kl = fixed(metrics["cross_entropy"], 4), fixed(metrics.get("kl"), 4)
    return f"cross-entropy {loss} and KL to the teacher {kl} nats a token{accuracy}"


def _judged(metrics: Mapping[str, float]) -> str:
    """pass@1 of each benchmark."""
    names = [name.removesuffix(".accuracy") for name in sorted(metrics) if name.endswith(".accuracy")]
    errors = {name: metrics.get(f"{name}.standard_error") for name in names}
    return ", ".join(
        f"{name} {percent(metrics[f'{name}.accuracy'], 1)}" + (f" ± {percent(error, 1)}" if error is not None else "")
        for name, error in errors.items()
    )


def _run_page(settings: Settings, run_id: str) -> str:
    try:
        return tracking.run_url(settings.tracking_uri, run_id) or run_id
    except ServiceError as error:  # the registry may be shared, and the runs another team's
        return f"{run_id} ({error})"
