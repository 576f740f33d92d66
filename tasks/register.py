"""Publish the family: its report, its objects in S3, its run and its registered models in MLflow."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastic_core import checkpoint
from elastic_core.config import Recipe, Stage
from elastic_core.schema import to_dict
from elastic_core.subnet import full_subnet
from tasks import artifacts, history, nested, plots, report, tracking
from tasks.data import read_record
from tasks.history import read_metrics
from tasks.manifest import Manifest, NestedPart
from tasks.progress import progress_bar
from tasks.records import Artifact, EvaluationRecord, Release, StageRecord
from tasks.settings import ServiceError, Settings, redact
from tasks.staging import scratch
from tasks.steps import fingerprint, step
from tasks.summary import summary_lines

HELDOUT_DIGEST = "elastic.heldout_sha256"
STORAGE, PULL = "elastic.storage", "elastic.pull"
WHOLE = "family"  # the part that is the elastic checkpoint


def destination(settings: Settings) -> str:
    """Where a family is published and registered, without secrets: part of the key of the steps that do so."""
    return redact(f"{settings.tracking_uri} {settings.endpoint_url or 'aws'} {settings.bucket}")


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """A step's metrics by MLflow's names: `loss/m`, `kl/m`, `choices/m/hidden`, `learning_rate`."""
    named = {name: row[name] for name in ("loss", "learning_rate", "temperature", "gradient_norm")}
    for budget, metrics in row["budgets"].items():
        named |= {f"{name}/{budget}": metrics[name] for name in ("loss", "kl", "cross_entropy")}
        if metrics["choices"]:
            named |= {f"{name}/{budget}": metrics[name] for name in ("router_loss", "expected_params")}
            named |= {f"choices/{budget}/{axis}": size for axis, size in metrics["choices"].items()}
    return named


@step(history, plots, report)
def register(
    recipe: Recipe,
    family: Artifact,
    slices: dict[str, Artifact],
    stages: list[StageRecord],
    evaluation: EvaluationRecord,
    corpus: Artifact,
    destination: str,
    run_id: str,
    workspace: str,
) -> Release:
    """Publish every file under a new version, manifest last, and register all budgets as candidates, or none."""
    settings = Settings.from_environment()
    store = artifacts.open_store(settings)
    described = checkpoint.read_family(Path(family.path))
    heldout_digest = read_record(Path(corpus.path)).heldout.sha256
    metadata = {"lineage": described.lineage, "recipe": to_dict(recipe), "heldout_sha256": heldout_digest}
    version = fingerprint(family, slices, metadata)[:12]
    report_directory = Path(workspace) / f"report-{version}"  # the same at each attempt
    report.write_report(
        report_directory,
        recipe=recipe,
        evaluation=evaluation,
        stages=[(stage.name, Path(record.metrics)) for stage, record in zip(recipe.stages, stages, strict=True)],
        subnets={budget.name: budget.subnet for budget in described.budgets},
        layer_ranking=described.layer_ranking,
        model=checkpoint.read_config(Path(family.path)),
        links={"objects": artifacts.version_uri(settings.bucket, recipe.family, version), "MLflow run": run_id},
    )
    directories = {name: Path(slice_.path) for name, slice_ in slices.items()} | {WHOLE: Path(family.path)}
    manifest = publish(store, recipe, version, described, directories, metadata, Path(workspace))
    deliver_curves(settings, run_id, recipe.stages, stages, Path(workspace))
    tracking.log_files(settings.tracking_uri, run_id, report_directory, "report")
    models = tracking.register_family(
        settings.tracking_uri,
        family=recipe.family,
        version=version,
        manifest_uri=artifacts.manifest_uri(settings.bucket, recipe.family, version),
        run_id=run_id,
        members=list(members(settings, recipe, manifest, evaluation, described, heldout_digest)),
    )
    if not artifacts.is_published(store, manifest):  # until now nothing pointed to it
        raise ServiceError(f"{version} of {recipe.family} was removed by elastic gc; try again", transient=True)
    tracking.finish_run(settings.tracking_uri, run_id)
    return Release(
        family=recipe.family,
        version=version,
        uri=artifacts.version_uri(settings.bucket, recipe.family, version),
        models={budget: f"{model.name}:{model.version}" for budget, model in models.items()},
        run_id=run_id,
        report=str(report_directory / "index.html"),
    )


def publish(
    store: artifacts.Store,
    recipe: Recipe,
    version: str,
    family: checkpoint.Family,
    directories: Mapping[str, Path],
    metadata: Mapping[str, Any],
    workspace: Path,
) -> Manifest:
    """Upload the slices and the family, each whole or, where the recipe says so, as shells."""
    parts: tuple[NestedPart, ...] = ()
    with scratch(workspace, "shells") as made:
        if recipe.storage == "nested":
            model = checkpoint.read_config(directories[WHOLE])
            subnets = {budget.name: budget.subnet for budget in reversed(family.budgets)} | {WHOLE: full_subnet(model)}
            directories, parts = nested.store(
                [
                    nested.Member(name=name, directory=directories[name], subnet=subnet)
                    for name, subnet in subnets.items()
                ],
                model,
                made,
            )
        with progress_bar(f"publishing {recipe.family} {version}") as progress:
            return artifacts.publish(
                store,
                family=recipe.family,
                version=version,
                directories=directories,
                metadata=metadata,
                nested=parts,
                progress=progress,
            )


def deliver_curves(
    settings: Settings, run_id: str, stages: tuple[Stage, ...], records: list[StageRecord], workspace: Path
) -> None:
    """Bring every step's metrics to the run; those that arrived while training are left alone."""
    spool = tracking.MetricSpool(workspace / f"curves-{run_id}.jsonl", uri=settings.tracking_uri, run_id=run_id)
    first = 0
    for stage, record in zip(stages, records, strict=True):
        for row in read_metrics(Path(record.metrics)):
            spool.record(first + row.step, curves(asdict(row)))
        first += stage.steps
    spool.flush()


def members(
    settings: Settings,
    recipe: Recipe,
    manifest: Manifest,
    evaluation: EvaluationRecord,
    family: checkpoint.Family,
    heldout_digest: str,
) -> Iterator[tracking.Member]:
    """One registered model a budget, with what was measured of it, and how to get it."""
    lines = summary_lines(evaluation)
    for measured in evaluation.budgets:
        metrics = {
            "params": measured.params,
            "weight_bytes": measured.weight_bytes,
            "cross_entropy": measured.cross_entropy,
            "kl": measured.kl,
            "tokens_per_second": measured.tokens_per_second,
        }
        if measured.accuracy is not None:
            metrics["accuracy"] = measured.accuracy
        model = tracking.model_name(recipe.family, measured.budget)
        command = f"elastic pull {model}:{tracking.NUMBER} -o {model}"
        how = f"`{command}` or any MLflow client"
        if manifest.stored(measured.budget) != manifest.part(measured.budget):
            how = f"`{command}`: its objects are only what it adds to the smaller sizes, which no other client joins"
        yield tracking.Member(
            budget=measured.budget,
            source=f"{artifacts.version_uri(settings.bucket, recipe.family, manifest.version)}/{measured.budget}",
            metrics=metrics,
            tags={
                HELDOUT_DIGEST: heldout_digest,
                STORAGE: recipe.storage,
                PULL: command,
                "elastic.params": str(measured.params),
                "elastic.subnet": json.dumps(to_dict(family.budget(measured.budget).subnet)),
                **{f"elastic.{key}": str(value) for key, value in family.lineage.items()},
            },
            description=f"{recipe.family}, budget {measured.budget}: {lines[measured.budget]}. Get it with {how}.",
        )
