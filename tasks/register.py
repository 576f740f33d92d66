"""Publish the family: its report, its objects in S3, its run and its registered models in MLflow."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elastic_core.budget import WHOLE, Budget
from elastic_core.cost import active_params, subnet_params
from elastic_core.files import checkpoint, shapes
from elastic_core.files.side_files import CARD_FILE
from elastic_core.geometry import MOE, ModelConfig
from elastic_core.recipe import Recipe, Stage
from elastic_core.schema import to_dict
from elastic_core.subnet import full_subnet
from tasks import artifacts, tracking
from tasks.artifacts import nested
from tasks.artifacts.manifest import Manifest, NestedPart, directory_digest
from tasks.artifacts.staging import scratch
from tasks.records import Artifact, EvaluationRecord, OrderComparison, Release, StageRecord
from tasks.reporting import report
from tasks.reporting.benchmarks import benchmark_metrics
from tasks.reporting.history import read_metrics
from tasks.reporting.scores import differ_in_scores_alone, score_line, scored
from tasks.reporting.summary import summary_lines
from tasks.running.code import CODE
from tasks.running.digests import forget
from tasks.running.progress import progress_bar
from tasks.running.steps import fingerprint, step
from tasks.settings import ServiceError, Settings, redact

CARDS = "cards"  # in a manifest's metadata: the SHA-256 of each part's model card before it got its scores
# What is kept with a version of its budget's evaluation, but for those that were not measured.
METRICS = (
    "params",
    "active_params",
    "weight_bytes",
    "cross_entropy",
    "kl",
    "accuracy",
    "cut_answers",
    "tokens_per_second",
)
LISTED = " Its FFN widths are a list, one a layer: vLLM, transformers and llama.cpp do not load it."
ENGINES = "vLLM, transformers and llama.cpp load the downloaded directory."
# A version is the files of a checkpoint and nothing else, the same bytes that `elastic slice` writes.
NOT_LOGGED = (
    " MLflow's own load_model does not load it, because it is not in MLflow's format (it has no MLmodel file): "
    "download_artifacts brings the directory, which AutoModelForCausalLM.from_pretrained then loads."
)


def destination(settings: Settings) -> str:
    """Where a family is published and registered, without secrets: part of the key of the steps that do so."""
    return redact(f"{settings.tracking_uri} {settings.registry} {settings.endpoint_url or 'aws'} {settings.bucket}")


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
    """Publish what is not published yet, manifest last, and register all budgets as candidates, or none.

    The version is of the parts' content, of how they are stored, and of the registry that they are for. The same
    content with other measurements is another registration of the same objects.
    """
    settings = Settings.from_environment()
    store = artifacts.open_store(settings)
    described = checkpoint.read_family(Path(family.path))
    parts = {**slices, WHOLE: family}
    registry = tracking.identity(settings.registry)
    version = fingerprint(parts, recipe.storage, registry)[:12]
    registration = fingerprint(version, evaluation)[:12]
    report_directory = Path(workspace) / f"report-{registration}"  # the same at each attempt
    uri = artifacts.version_uri(settings.bucket, recipe.family, version)
    links = {"objects": uri, "MLflow run": run_id, CODE: str(described.lineage[CODE])}
    page = write_report(report_directory, recipe, Path(family.path), stages, evaluation, orders, links)
    manifest = artifacts.published(store, recipe.family, version)
    if manifest is None:
        metadata = {"lineage": described.lineage, **marked_for(registry, settings)}
        manifest = publish(store, recipe, version, described, parts, evaluation, metadata, Path(workspace))
    check_published(manifest, parts)
    deliver_curves(settings, run_id, recipe.stages, stages, Path(workspace))
    tracking.log_files(settings.tracking_uri, run_id, report_directory, "report")
    if judged := run_metrics(evaluation):
        tracking.log_metrics(settings.tracking_uri, run_id, judged)
    models = tracking.register_family(
        settings.registry,
        family=recipe.family,
        version=version,
        manifest_uri=artifacts.manifest_uri(settings.bucket, recipe.family, version),
        run_id=run_id,
        members=list(members(settings, recipe, manifest, evaluation, described, slices)),
        registration=registration,
    )
    if not artifacts.is_published(store, manifest):  # until now nothing pointed to it
        raise ServiceError(f"{version} of {recipe.family} was removed by elastic gc; try again", transient=True)
    return Release(
        family=recipe.family,
        version=version,
        registration=registration,
        uri=uri,
        models={budget: f"{model.name}:{model.version}" for budget, model in models.items()},
        run_id=run_id,
        report=str(page),
    )


def write_report(
    directory: Path,
    recipe: Recipe,
    family: Path,
    stages: Sequence[StageRecord],
    evaluation: EvaluationRecord,
    orders: OrderComparison,
    links: Mapping[str, str],
) -> Path:
    """Write the report of a family, whose files say what its subnets are and of what they were chosen; its page."""
    described = checkpoint.read_family(family)
    return report.write_report(
        directory,
        recipe=recipe,
        evaluation=evaluation,
        orders=orders,
        stages=[(stage.name, Path(record.metrics)) for stage, record in zip(recipe.stages, stages, strict=True)],
        subnets={budget.name: budget.subnet for budget in described.budgets},
        layer_ranking=described.layer_ranking,
        model=checkpoint.read_config(family),
        shapes=shapes.read_shapes(family),
        links=links,
    )


def run_metrics(evaluation: EvaluationRecord) -> dict[str, float]:
    """Every model's scores on benchmarks, by names such as `9b/math-500.accuracy`."""
    models = dict.fromkeys(score.model for score in evaluation.scores)
    scores = {model: benchmark_metrics(evaluation.measured_scores(model)) for model in models}
    return {f"{model}/{name}": value for model, values in scores.items() for name, value in values.items()}


def marked_for(registry: str, settings: Settings) -> dict[str, Any]:
    """What a manifest says of the registry that points to it: `elastic gc` removes only what its own has published."""
    return {artifacts.REGISTRY: {"id": registry, "uri": redact(settings.registry)}}


def check_published(manifest: Manifest, parts: Mapping[str, Artifact]) -> None:
    """A ServiceError unless a version holds these parts; they were published before where nothing was to be sent.

    A card that got its scores when it was published is compared as it was before, by the manifest's word.
    """
    cards = manifest.metadata.get(CARDS)
    for name, part in parts.items():
        card = cards.get(name) if isinstance(cards, Mapping) else None
        files = manifest.part(name)
        there = directory_digest((f.path, card if card and f.path == CARD_FILE else f.sha256) for f in files)
        if there != part.digest:
            raise ServiceError(
                f"{manifest.family} {manifest.version} is published with another {name!r} than {part.path} holds: one "
                "of them was changed; remove that directory and run again"
            )


def scored_cards(
    store: artifacts.Store, family: str, version: str, parts: Mapping[str, Artifact], evaluation: EvaluationRecord
) -> dict[str, bytes]:
    """The model card of each part with its scores, as it is in the store or begins to be there now.

    An upload that was interrupted may have left a card with other scores, of the same files: that one is kept.
    """
    cards = {}
    for name, part in parts.items():
        card = (Path(part.path) / CARD_FILE).read_bytes()
        if hashlib.sha256(card).hexdigest() != part.files[CARD_FILE]:
            raise artifacts.NotAsRecorded(f"{part.path}/{CARD_FILE} is not as it was recorded: run again")
        ours = scored(card.decode(), name, evaluation)
        kept = artifacts.put_first(store, family, version, f"{name}/{CARD_FILE}", ours.encode())
        if not differ_in_scores_alone(kept.decode(errors="replace"), ours):
            raise ServiceError(
                f"{artifacts.version_uri(store.bucket, family, version)}/{name}/{CARD_FILE} is of other files; remove "
                "what was begun there with elastic gc --delete"
            )
        cards[name] = kept
    return cards


def publish(
    store: artifacts.Store,
    recipe: Recipe,
    version: str,
    family: checkpoint.Family,
    made: Mapping[str, Artifact],
    evaluation: EvaluationRecord,
    metadata: Mapping[str, Any],
    workspace: Path,
) -> Manifest:
    """Upload the slices and the family, each whole or, where the recipe says so, as shells; every byte is compared."""
    directories: Mapping[str, Path] = {name: Path(part.path) for name, part in made.items()}
    parts: tuple[NestedPart, ...] = ()
    with scratch(workspace, "publishing") as room, hashed_again(made):
        instead: dict[str, Path] = {}
        cards = scored_cards(store, recipe.family, version, made, evaluation)
        for name, card in cards.items():
            instead[f"{name}/{CARD_FILE}"] = written = room / f"card-{name}.md"
            written.write_bytes(card)
        if recipe.storage == "nested":
            model = checkpoint.read_config(directories[WHOLE])
            subnets = {budget.name: budget.subnet for budget in reversed(family.budgets)} | {WHOLE: full_subnet(model)}
            directories, parts = nested.store(
                [
                    nested.Member(
                        name=name,
                        directory=directories[name],
                        subnet=subnet,
                        instead={CARD_FILE: instead[f"{name}/{CARD_FILE}"]},
                    )
                    for name, subnet in subnets.items()
                ],
                model,
                room,
            )
        with progress_bar(f"publishing {recipe.family} {version}") as progress:
            return artifacts.publish(
                store,
                family=recipe.family,
                version=version,
                directories=directories,
                instead=instead,
                metadata={**metadata, CARDS: {name: part.files[CARD_FILE] for name, part in made.items()}},
                recorded={
                    name: {**part.files, CARD_FILE: hashlib.sha256(cards[name]).hexdigest()}
                    for name, part in made.items()
                },
                nested=parts,
                progress=progress,
            )


@contextmanager
def hashed_again(made: Mapping[str, Artifact]) -> Iterator[None]:
    """Where a file turns out not to be as it was recorded, let the next look at these hash all of it."""
    try:
        yield
    except artifacts.NotAsRecorded:
        for part in made.values():
            forget(Path(part.path))
        raise


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
    slices: Mapping[str, Artifact],
) -> Iterator[tracking.Member]:
    """One registered model a budget, with what was measured of it, and how to get it."""
    lines = summary_lines(evaluation)
    for measured in evaluation.budgets:
        metrics = {name: value for name in METRICS if (value := getattr(measured, name)) is not None}
        scores = evaluation.measured_scores(measured.budget)
        metrics |= benchmark_metrics(scores)
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
                tracking.HELDOUT_DIGEST: evaluation.conditions.heldout_sha256,
                tracking.MEASURED: evaluation.conditions.digest,
                tracking.CONDITIONS: evaluation.conditions.text,
                tracking.STORAGE: recipe.storage,
                tracking.STORED: str(sum(file.size for file in manifest.stored(measured.budget))),
                tracking.PULL: command,
                tracking.LOADS: (what_loads(slices[measured.budget]) or ENGINES).strip() + NOT_LOGGED,
                tracking.PARAMS: str(measured.params),
                **{f"{tracking.JUDGED}{name}": score.protocol for name, score in scores.items()},
                **{f"{tracking.ANSWERED}{name}": score.engine for name, score in scores.items()},
                tracking.SUBNET: json.dumps(to_dict(family.budget(measured.budget).subnet)),
                **{f"elastic.{key}": str(value) for key, value in family.lineage.items()},
            },
            description=f"{recipe.family}, budget {measured.budget}: {lines[measured.budget]}. "
            f"{score_line(evaluation, measured)} Get it with {how}." + what_loads(slices[measured.budget]) + NOT_LOGGED,
        )


def what_loads(slice_: Artifact) -> str:
    """A sentence where the common engines do not load a slice, else nothing."""
    config = checkpoint.read_config(Path(slice_.path))
    return LISTED if isinstance(config.intermediate_size, tuple) else ""


@step(cached=False)
def register_size(model: str, slice_: Artifact, budget: Budget) -> str:
    """Publish a slice as a version of its own and register it as a candidate; NAME:VERSION."""
    settings = Settings.from_environment()
    origin = tracking.resolve(settings.registry, model)
    family = origin.tags[tracking.FAMILY]
    registry = tracking.identity(settings.registry)
    parts = {budget.name: slice_}
    version = f"{origin.tags[tracking.VERSION]}-{fingerprint(parts, registry)[:12]}"
    sizes = _sizes(checkpoint.read_config(Path(slice_.path)))
    params = sizes["params"]
    store = artifacts.open_store(settings)
    manifest = artifacts.published(store, family, version) or artifacts.publish(
        store,
        family=family,
        version=version,
        directories={budget.name: Path(slice_.path)},
        recorded={budget.name: slice_.files},
        metadata={"cut_from": origin.tags[tracking.MANIFEST], **marked_for(registry, settings)},
    )
    check_published(manifest, parts)
    made = tracking.register_family(
        settings.registry,
        family=family,
        version=version,
        manifest_uri=artifacts.manifest_uri(settings.bucket, family, version),
        run_id=origin.run_id,
        members=[
            tracking.Member(
                budget=budget.name,
                source=f"{artifacts.version_uri(settings.bucket, family, version)}/{budget.name}",
                metrics=sizes,
                tags={
                    tracking.PARAMS: str(params),
                    tracking.STORED: str(sum(file.size for file in manifest.files)),
                    tracking.LOADS: (what_loads(slice_) or ENGINES).strip() + NOT_LOGGED,
                    "elastic.cut_from": f"{origin.name}:{origin.version}",
                },
                description=f"{family} cut to {budget}: {params:,} parameters, from {origin.tags[tracking.VERSION]}."
                + what_loads(slice_)
                + NOT_LOGGED,
            )
        ],
    )
    if not artifacts.is_published(store, manifest):  # until now nothing pointed to it
        raise ServiceError(f"{version} of {family} was removed by elastic gc; try again", transient=True)
    return f"{made[budget.name].name}:{made[budget.name].version}"


def _sizes(config: ModelConfig) -> dict[str, int]:
    """The parameters of a checkpoint and, where it has experts, those that a token passes through."""
    full = full_subnet(config)
    return {"params": subnet_params(config, full)} | (
        {"active_params": active_params(config, full)} if config.layers_of(MOE) else {}
    )
