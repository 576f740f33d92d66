"""What a failed run leaves on its page: which step failed, why, and what to do next."""

from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import FlowRun, State
from prefect.flows import Flow

from tasks.running.training import TrainerDied
from tasks.settings import ServiceError, is_transient, redact


def explain_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """A hook of a flow that failed: an artifact on the run."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, BaseException):
        return
    create_markdown_artifact(
        key="failure",
        description=f"Why {flow_run.name} failed",
        markdown="\n\n".join(
            [
                f"**Step** `{failed_step(error)}`",
                f"**Why** {redact(str(error) or type(error).__name__)}",
                f"**Next** {advice(error)}",
            ]
        ),
    )


def failed_step(error: BaseException) -> str:
    """The step that `tasks.running.steps.run` noted on the exception."""
    notes = [note.removeprefix("step: ") for note in getattr(error, "__notes__", ()) if note.startswith("step: ")]
    return notes[0] if notes else "before the first step"


def advice(error: BaseException) -> str:
    """What to do next, by the kind of fault."""
    if isinstance(error, TrainerDied):
        return "Look at the training log named above. A new run continues from the last checkpoint."
    if is_transient(error):
        return "Check the service or the disk named above. A new run continues at this step."
    if isinstance(error, ValueError | ServiceError):
        return "Correct what is named above and start a new run. Finished steps come from the cache."
    return "This is a defect: report it with the traceback in this run's log. A new run continues at this step."
