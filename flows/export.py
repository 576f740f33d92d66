"""Cut a family that is registered to another size, and register that."""

from functools import partial
from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from elastic_core.budget import WHOLE, Budget
from elastic_core.geometry import FfnLayout
from flows.commands.recipes import checked
from flows.serving.failures import explain_failure
from flows.serving.guard import guard_run
from flows.serving.naming import called
from flows.serving.page import model_link
from tasks import tracking
from tasks.register import register_size
from tasks.running.patience import patiently
from tasks.running.steps import run
from tasks.running.usage import noting
from tasks.settings import Settings
from tasks.slice import fetch_part, slice_size


@flow(
    name="export",
    flow_run_name=called(lambda given: f"{given['model']} cut to {given['budget'].name}"),
    on_failure=[explain_failure],
)
def export(model: str, budget: Annotated[Budget, checked(Budget)], ffn_layout: FfnLayout = "padded") -> str:
    """Cut another size out of a registered family, with no training, and register it as a candidate.

    Args:
        model: A registered member of the family, NAME, NAME@ALIAS or NAME:VERSION; it says which version to cut from.
        budget: The name of the new size, and its target: parameters, active parameters, memory or latency.
        ffn_layout: Widths of FFN layers and of experts that differ by layer are padded with zeros to one width, or
            a list: of FFN layers no engine loads one, of experts SGLang and llama.cpp do.
    """
    guard_run()
    settings = Settings.from_environment()
    workspace = str(settings.home / "workspace")
    origin = patiently(f"looking for {model}", partial(tracking.resolve, settings.registry, model))
    source = f"{origin.name}:{origin.version}"
    manifest = origin.tags[tracking.MANIFEST]
    with noting(settings.home):
        family = run(fetch_part, manifest=manifest, part=WHOLE, workspace=workspace)
        cut = run(slice_size, family=family, budget=budget, ffn_layout=ffn_layout, workspace=workspace)
        registered = run(register_size, model=source, slice_=cut, budget=budget)
    create_markdown_artifact(
        key="export",
        description=registered,
        markdown=f"{model_link(settings, registered)}, cut from {model_link(settings, source)}",
    )
    return registered
