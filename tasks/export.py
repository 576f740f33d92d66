"""Another size of a family that is registered already: fetched, cut, published, registered."""

from pathlib import Path

from elastic_core import checkpoint, job, resolve, router, slicing
from elastic_core.budget import Budget
from elastic_core.cost import subnet_params
from elastic_core.subnet import full_subnet
from tasks import artifacts, tracking
from tasks.progress import progress_bar
from tasks.records import Artifact
from tasks.settings import ServiceError, Settings
from tasks.steps import artifact, fingerprint, new_directory, step

ELASTIC_PART = "family"  # the part of a version that holds the elastic checkpoint


@step()
def fetch_part(manifest: str, part: str, workspace: str) -> Artifact:
    """Bring a part of a published version here: a slice, or the elastic checkpoint."""
    settings = Settings.from_environment()
    directory = Path(workspace) / f"fetched-{part}-{fingerprint(manifest)[:12]}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    artifacts.fetch(artifacts.open_store(settings), manifest, part, directory)
    return artifact(directory)


@step(checkpoint, job, resolve, router, slicing)
def slice_size(family: Artifact, budget: Budget, pad_ffn: bool, workspace: str) -> Artifact:
    """Cut the largest subnet within `budget` that the router prefers, of the trained sizes or between them."""
    source, directory = Path(family.path), new_directory(workspace, f"slice-{budget.name}")
    described = checkpoint.read_family(source)
    routed = job.load_router(source, checkpoint.read_config(source), described)
    subnet = resolve.resolve_target(routed, [trained.subnet for trained in described.budgets], budget)
    with progress_bar(f"slicing {budget.name}") as report:
        slicing.slice_checkpoint(source, subnet, directory, pad_ffn=pad_ffn, progress=report)
    return artifact(directory)


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
