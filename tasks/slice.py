"""Cut a budget, or any other size, out of the family: a stock checkpoint that engines load."""

from pathlib import Path

from elastic_core import resolve
from elastic_core.budget import Budget
from elastic_core.files import checkpoint, slicing
from elastic_core.geometry import FfnLayout
from elastic_core.training import job
from tasks import artifacts
from tasks.records import Artifact
from tasks.running.digests import artifact
from tasks.running.progress import progress_bar
from tasks.running.steps import fingerprint, new_directory, step
from tasks.settings import Settings


@step("slice {budget}")
def slice_budget(family: Artifact, budget: str, ffn_layout: FfnLayout, workspace: str) -> Artifact:
    """The slice of one budget."""
    source, directory = Path(family.path), new_directory(workspace, f"slice-{budget}")
    subnet = checkpoint.read_family(source).budget(budget).subnet
    with progress_bar(f"slicing {budget}") as report:
        slicing.slice_checkpoint(source, subnet, directory, ffn_layout=ffn_layout, progress=report)
    return artifact(directory)


@step("fetch {part}")
def fetch_part(manifest: str, part: str, workspace: str) -> Artifact:
    """Bring a part of a published version here: a slice, or the elastic checkpoint."""
    settings = Settings.from_environment()
    directory = Path(workspace) / f"fetched-{part}-{fingerprint(manifest)[:12]}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    artifacts.fetch(artifacts.open_store(settings), manifest, part, directory)
    return artifact(directory)


@step("slice {budget.name}")
def slice_size(family: Artifact, budget: Budget, ffn_layout: FfnLayout, workspace: str) -> Artifact:
    """Cut the largest subnet within `budget` that the router prefers, of the trained sizes or between them."""
    source, directory = Path(family.path), new_directory(workspace, f"slice-{budget.name}")
    described = checkpoint.read_family(source)
    routed = job.load_router(source, checkpoint.read_config(source), described)
    subnet = resolve.resolve_target(routed, [trained.subnet for trained in described.budgets], budget)
    with progress_bar(f"slicing {budget.name}") as report:
        slicing.slice_checkpoint(source, subnet, directory, ffn_layout=ffn_layout, progress=report)
    return artifact(directory)
