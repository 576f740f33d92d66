"""A stage that does not fit, and what would make it fit, in words."""

from collections.abc import Sequence

from elastic_core.planning.machine import Accelerator
from elastic_core.planning.stages import Change, MeshPlan, StagePlan
from tasks.reporting.numbers import counted, human_bytes


def unfit(accelerator: Accelerator, planned: StagePlan, mesh: MeshPlan) -> str:
    """Why a stage does not fit on so many GPUs, and what would help."""
    where = f"{planned.stage.name} on {counted(mesh.gpus, 'GPU')}"
    if mesh.micro_steps is None:
        problem = f"{planned.stage.batch_size:,} sequences do not divide into micro-batches for all"
    else:
        problem = f"{human_bytes(mesh.memory.total)} are needed and {human_bytes(accelerator.usable)} are there"
    ways = [_change(planned, mesh, change) for change in mesh.changes]
    return f"{where}: {problem}. " + (f"It fits with {joined(ways, 'or')}." if ways else "Nothing here would help.")


def _change(planned: StagePlan, mesh: MeshPlan, change: Change) -> str:
    stage, parts = planned.stage, []
    if change.recompute != stage.recompute:
        parts.append("recompute: true")
    if change.offload != stage.offload:
        parts.append("offload: true")
    if change.sharding != stage.sharding:
        parts.append(f"sharding: {change.sharding}")
    if change.micro_batch_size != stage.micro_batch_size:
        parts.append(f"micro_batch_size: {change.micro_batch_size}")
    if change.sequence_length != stage.sequence_length:
        parts.append(f"sequence_length: {change.sequence_length}")
    if change.gpus != mesh.gpus:
        parts.append(counted(change.gpus, "GPU"))
    return f"{joined(parts)} ({human_bytes(change.memory)})"


def joined(parts: Sequence[str], last: str = "and") -> str:
    """A list in words: a, b and c."""
    return f" {last} ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
