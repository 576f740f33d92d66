"""One lap of the race: a family trained in one of the ways that compete, and the KL and the loss that it reaches."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from elastic_core.budget import Dtype
from elastic_core.cost import subnet_params
from elastic_core.files import checkpoint
from elastic_core.files.checkpoint import read_family
from elastic_core.files.reorder import read_order, write_order
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Distillation, Evaluation, Stage
from elastic_core.subnet import Subnet
from elastic_core.training import job
from elastic_core.training.curriculum import generator
from elastic_core.training.job import TrainJob
from tasks.corpus.heldout import heldout_batches
from tasks.corpus.mixing import portions
from tasks.corpus.record import HELDOUT_FILE, TRAIN_FILE
from tasks.evaluate import heldout_loss
from tasks.records import Artifact
from tasks.running.progress import stage_progress
from tasks.running.steps import end_work, step, work_directory
from tasks.running.training import train as run_training

# The weights that a lap begins with: the teacher's, cut, or fresh ones.
Start = Literal["cut", "fresh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """What a training cost in tokens, and the held-out KL to the teacher and loss of each budget that it trained."""

    tokens: int
    kl: dict[str, float]
    loss: dict[str, float]


@step(on_gpu=True)
def run_lap(
    family: Artifact,
    teacher: Artifact,
    corpus: Artifact,
    stages: tuple[Stage, ...],
    subnets: dict[str, Subnet],
    start: Start,
    distillation: Distillation,
    evaluation: Evaluation,
    dtype: Dtype,
    seed: int,
    workspace: str,
    weights: tuple[tuple[float, ...] | None, ...],
) -> Lap:
    """Train the budgets of the stages, at `subnets` where these name them, by the loop that distils; measure them.

    `weights` are those of the sources of data, for each stage. Nothing but the numbers is kept.
    """
    work = work_directory(workspace, "lap")
    student = work / "start"
    if not student.exists():
        write_start(Path(family.path), student, stages, subnets, start, seed)
    for stage, weighed in zip(stages, weights, strict=True):
        output = work / stage.name / "family"
        with stage_progress(stage) as on_step:
            run_training(
                TrainJob(
                    stage=stage,
                    distillation=distillation,
                    student=str(student),
                    teacher=teacher.path,
                    tokens=str(Path(corpus.path) / TRAIN_FILE),
                    work=str(output.parent),
                    output=str(output),
                    dtype=dtype,
                    seed=seed,
                    lineage={},
                    portions=portions(Path(corpus.path), weighed),
                ),
                on_step=on_step,
            )
        student = output
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teaching = job.load_model(Path(teacher.path), device, job.DTYPES[dtype])
    trained = job.load_model(student, device, job.DTYPES[dtype])
    batches = heldout_batches(Path(corpus.path) / HELDOUT_FILE, evaluation, teaching.config.vocab_size)
    budgets = read_family(student).budgets
    measured = {budget.name: heldout_loss(trained, budget.subnet, batches, teaching) for budget in budgets}
    lap = Lap(
        tokens=sum(stage.tokens for stage in stages),
        kl={name: kl for name, (_, kl) in measured.items()},
        loss={name: loss for name, (loss, _) in measured.items()},
    )
    end_work(work)
    return lap


def write_start(
    source: Path, target: Path, stages: Sequence[Stage], subnets: dict[str, Subnet], start: Start, seed: int
) -> None:
    """The elastic checkpoint that a lap begins with: `source` with only the budgets that its stages train.

    They have their shapes of `source`, or those of `subnets`.
    """
    opened, family = checkpoint.open_checkpoint(source), read_family(source)
    config, trained = opened.config, {name for stage in stages for name in stage.budgets}
    raced = [budget for budget in family.budgets if budget.name in trained]
    shapes = [subnets.get(budget.name, budget.subnet) for budget in raced]
    budgets = tuple(
        replace(budget, subnet=subnet, params=subnet_params(config, subnet))
        for budget, subnet in zip(raced, shapes, strict=True)
    )
    fresh = {}
    if start == "fresh":
        model = ElasticNemotronH(config)
        model.initialise(generator(seed, "fresh"))
        fresh = model.state_dict()

    def blocks(name: str) -> Iterable[Tensor]:
        stored = opened.tensors[name]
        return [fresh[name].to(stored.dtype)] if fresh else stored.blocks(*[None] * len(stored.shape))

    def beside(staging: Path) -> None:
        shutil.copyfile(source / checkpoint.ROUTER_FILE, staging / checkpoint.ROUTER_FILE)
        order, begun = read_order(source, config), replace(family, budgets=budgets)
        if fresh:  # the energy is the teacher's
            order, begun = replace(order, energy=None), replace(begun, format_version=1)
        write_order(staging, order)
        checkpoint.write_family(staging, begun)

    checkpoint.write_checkpoint(target, config, opened.tensors, blocks, source=source, beside=beside)
