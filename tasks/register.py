"""Publish the family: its report, its objects in S3, its run and its registered models in MLflow."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastic_core.budget import WHOLE, Budget
from elastic_core.cost import subnet_params
from elastic_core.files import checkpoint
from elastic_core.recipe import Recipe, Stage
from elastic_core.schema import to_dict
from elastic_core.subnet import full_subnet
from tasks import artifacts, tracking
from tasks.artifacts import nested
from tasks.artifacts.manifest import Manifest, NestedPart
from tasks.artifacts.staging import scratch
from tasks.corpus.record import read_record
from tasks.records import Artifact, EvaluationRecord, OrderComparison, Release, StageRecord
from tasks.reporting import report
from tasks.reporting.history import read_metrics
from tasks.reporting.summary import summary_lines
from tasks.running.progress import progress_bar
from tasks.running.steps import fingerprint, step
from tasks.settings import ServiceError, Settings, redact

STORAGE, PULL = "elastic.storage", "elastic.pull"


def destination(settings: Settings) -> str:
    """Where a family is published and registered, without secrets: part of the key of the steps that do so."""
    return redact(f"{settings.tracking_uri} {settings.endpoint_url or 'aws'} {settings.bucket}")


@step()
def register(
    recipe: Recipe,
    family: Artifact,
    slices: dict[str, Artifact],
    stages: list[StageRecord],
    evaluation: EvaluationRecord,
    orders: OrderComparison,
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
        orders=orders,
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
            spool.record(first + row.step, tracking.step_curves(asdict(row)))
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
                tracking.HELDOUT_DIGEST: heldout_digest,
                STORAGE: recipe.storage,
                PULL: command,
                "elastic.params": str(measured.params),
                "elastic.subnet": json.dumps(to_dict(family.budget(measured.budget).subnet)),
                **{f"elastic.{key}": str(value) for key, value in family.lineage.items()},
            },
            description=f"{recipe.family}, budget {measured.budget}: {lines[measured.budget]}. Get it with {how}.",
        )


@step(cached=False)
def register_size(model: str, slice_: Artifact, budget: Budget) -> str:
    """Publish a slice as a version of its own and register it as a candidate; NAME:VERSION."""
    settings = Settings.from_environment()
    origin = tracking.resolve(settings.tracking_uri, model)
    family = origin.tags[tracking.FAMILY]
    version = f"{origin.tags[tracking.VERSION]}-{slice_.digest[:12]}"
    params = subnet_params(config := checkpoint.read_config(Path(slice_.path)), full_subnet(config))
    store = artifacts.open_store(settings)
    manifest = artifacts.publish(
        store,
        family=family,
        version=version,
        directories={budget.name: Path(slice_.path)},
        metadata={"cut_from": origin.tags[tracking.MANIFEST], "budget": str(budget)},
    )
    made = tracking.register_family(
        settings.tracking_uri,
        family=family,
        version=version,
        manifest_uri=artifacts.manifest_uri(settings.bucket, family, version),
        run_id=origin.run_id,
        members=[
            tracking.Member(
                budget=budget.name,
                source=f"{artifacts.version_uri(settings.bucket, family, version)}/{budget.name}",
                metrics={"params": params},
                tags={"elastic.params": str(params), "elastic.cut_from": f"{origin.name}:{origin.version}"},
                description=f"{family} cut to {budget}: {params:,} parameters, from {origin.tags[tracking.VERSION]}.",
            )
        ],
    )
    if not artifacts.is_published(store, manifest):  # until now nothing pointed to it
        raise ServiceError(f"{version} of {family} was removed by elastic gc; try again", transient=True)
    return f"{made[budget.name].name}:{made[budget.name].version}"
