"""One stage of distillation, in a supervised process that resumes where it was."""

from pathlib import Path
from typing import Any

from elastic_core.budget import Dtype
from elastic_core.recipe import Distillation, Stage
from elastic_core.training.job import METRICS, TrainJob
from tasks import tracking
from tasks.corpus.mixing import portions
from tasks.corpus.record import TRAIN_FILE
from tasks.records import Artifact, StageRecord
from tasks.running.code import CODE, project_version
from tasks.running.digests import artifact, file_digest
from tasks.running.progress import stage_progress
from tasks.running.steps import step, work_directory
from tasks.running.training import train as run_training
from tasks.settings import Settings


@step("distil {stage.name}", on_gpu=True)
def distill(
    family: Artifact,
    teacher: Artifact,
    corpus: Artifact,
    stage: Stage,
    distillation: Distillation,
    dtype: Dtype,
    seed: int,
    first_step: int,
    run_id: str,
    workspace: str,
    weights: tuple[float, ...] | None = None,
    least_nodes: int = 1,
) -> StageRecord:
    """Distil the teacher into every budget of the family for one stage, on data from each source by its weight.

    On a cluster it trains on as many nodes as there are, and waits for `least_nodes`, the fewest that it fits on.

    Curves go to the MLflow run as they come, numbered from `first_step`; MLflow's absence stops nothing.
    """
    work = work_directory(workspace, stage.name)
    output = work / "family"
    frozen_teacher = distillation.teacher == "frozen" and distillation.kl_weight > 0
    uri = Settings.from_environment().tracking_uri
    work.mkdir(parents=True, exist_ok=True)
    spool = tracking.MetricSpool(work / "curves.jsonl", uri=uri, run_id=run_id)

    def on_step(row: dict[str, Any]) -> None:
        spool.record(first_step + row["step"], tracking.step_curves(row))
        move_bar(row)

    with stage_progress(stage) as move_bar, spool.delivering():
        run_training(
            TrainJob(
                stage=stage,
                distillation=distillation,
                student=family.path,
                teacher=teacher.path if frozen_teacher else None,
                tokens=str(Path(corpus.path) / TRAIN_FILE),
                work=str(work),
                output=str(output),
                dtype=dtype,
                seed=seed,
                lineage={CODE: project_version()},
                portions=portions(Path(corpus.path), weights),
            ),
            on_step=on_step,
        )
    metrics = work / METRICS
    return StageRecord(family=artifact(output), metrics=str(metrics), metrics_sha256=file_digest(metrics))
