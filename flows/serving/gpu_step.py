"""One step of another run, done by a worker that has a GPU."""

from typing import Any
from uuid import UUID

from prefect import flow

from flows.serving.failures import explain_failure
from flows.serving.guard import follow_worker
from tasks import distill, evaluate, judge, promote, race, rank, teacher  # noqa: F401 - each adds its steps to ON_GPU
from tasks.running.asked import shown_on
from tasks.running.steps import do_asked


@flow(name="gpu-step", on_failure=[explain_failure])
def gpu_step(step: str, inputs: dict[str, Any], device: str, runs: dict[str, str], show_on: str = "") -> None:
    """Not to be run by hand: a step that the pipeline sends here; its result goes to what both share.

    Args:
        step: The name of the step.
        inputs: What the step is given, by name.
        device: What the cache's key says of the device: this one, or a name for the devices of all workers.
        runs: The code and the libraries of the step where the pipeline runs; those here must be the same.
        show_on: The id of the run on whose page the step's progress appears; empty, its own.
    """
    follow_worker()  # who waits for the step counts its crashes, and ends a loop of them
    shown_on.set(UUID(show_on) if show_on else None)
    do_asked(step, inputs, device, runs)
