"""Cut a budget out of the family: a stock checkpoint that engines load."""

from pathlib import Path

from elastic_core import checkpoint, slicing
from tasks.progress import progress_bar
from tasks.records import Artifact
from tasks.steps import artifact, new_directory, step


@step(checkpoint, slicing)
def slice_budget(family: Artifact, budget: str, pad_ffn: bool, workspace: str) -> Artifact:
    """The slice of one budget."""
    source, directory = Path(family.path), new_directory(workspace, f"slice-{budget}")
    subnet = checkpoint.read_family(source).budget(budget).subnet
    with progress_bar(f"slicing {budget}") as report:
        slicing.slice_checkpoint(source, subnet, directory, pad_ffn=pad_ffn, progress=report)
    return artifact(directory)
