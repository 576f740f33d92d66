"""One stage of distillation, in a supervised process that resumes where it was."""

from pathlib import Path

from elastic_core import checkpoint, curriculum, job, losses, model, router, ssm, subnet, train
from elastic_core.config import Distillation, Stage
from elastic_core.job import METRICS, TrainJob
from tasks.data import TRAIN_FILE
from tasks.progress import stage_progress
from tasks.records import Artifact, StageRecord
from tasks.steps import artifact, fingerprint, step
from tasks.training import train as run_training


@step(checkpoint, curriculum, job, losses, model, router, ssm, subnet, train)
def distill(
    family: Artifact,
    teacher: Artifact,
    corpus: Artifact,
    stage: Stage,
    distillation: Distillation,
    dtype: str,
    seed: int,
    workspace: str,
) -> StageRecord:
    """Distil the teacher into every budget of the family for one stage."""
    key = fingerprint(family, teacher, corpus, stage, distillation, dtype, seed)
    work = Path(workspace) / f"{stage.name}-{key[:16]}"
    output = work / "family"
    frozen_teacher = distillation.teacher == "frozen" and distillation.kl_weight > 0
    with stage_progress(stage) as on_step:
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
            ),
            on_step=on_step,
        )
    return StageRecord(family=artifact(output), metrics=str(work / METRICS))
