"""One step of another run, done by a worker that has a GPU."""

import typing
from typing import Any
from uuid import UUID

from prefect import flow

from elastic_core.schema import build
from flows.serving.failures import explain_failure
from flows.serving.guard import follow_worker
from tasks import distill, evaluate, judge, promote, race, rank, teacher  # noqa: F401 - each adds its steps to ON_GPU
from tasks.running.code import differences
from tasks.running.gpu import WORKERS_OF, device_of_run, shown_on, this_device
from tasks.running.steps import MAKINGS, ON_GPU, run
from tasks.running.usage import noting
from tasks.settings import home_directory


@flow(name="gpu-step", on_failure=[explain_failure])
def gpu_step(step: str, inputs: dict[str, Any], device: str, runs: dict[str, str], show_on: UUID | None = None) -> None:
    """Not to be run by hand: a step that the pipeline sends here; its result goes to what both share.

    Args:
        step: The name of the step.
        inputs: What the step is given, by name.
        device: What the cache's key says of the device: this one, or a name for the devices of all workers.
        runs: The code and the libraries of the step where the pipeline runs; those here must be the same.
        show_on: The run on whose page the step's progress appears.
    """
    follow_worker()  # who waits for the step counts its crashes, and ends a loop of them
    if step not in ON_GPU:
        raise ValueError(f"step {step!r} is not one of {', '.join(ON_GPU)}; the worker and the run differ in version")
    task = ON_GPU[step]
    hints = typing.get_type_hints(task.fn)
    given = {name: build(hints[name], value, f"{step}.{name}") for name, value in inputs.items()}
    if "workspace" in given:  # of the host that asks
        given["workspace"] = str(home_directory() / "workspace")
    if not device.startswith(WORKERS_OF) and device != this_device():
        raise ValueError(f"{step}: the run asks for {device}, this worker has {this_device()}; start `elastic up` anew")
    device_of_run.set(device)
    if changed := differences(runs, MAKINGS[step](given).runs):
        raise ValueError(f"{step}: the worker is not as the run that asks: {changed}; install the same in both")
    shown_on.set(show_on)
    with noting(home_directory()):
        run(task, **given)
