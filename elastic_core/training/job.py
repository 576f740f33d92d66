"""One stage as a job of processes of its own: load, resume, train, save, export.

A supervisor writes a `TrainJob` as JSON and runs `torchrun -m elastic_core.training.job FILE`, with one process or
many. Kill it at any moment and run it again: it goes on from its last checkpoint, and the weights it ends with are the
same to the bit.
"""

import dataclasses
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from elastic_core.budget import Budget, Dtype
from elastic_core.cost import subnet_params
from elastic_core.files import checkpoint, directories, shards
from elastic_core.files.locks import IsHeld, held
from elastic_core.files.reorder import read_energy
from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH, keeps_type
from elastic_core.parent import die_with_parent
from elastic_core.recipe import Distillation, Stage
from elastic_core.resolve import resolve_budgets
from elastic_core.router import ElasticModel, Router
from elastic_core.schema import build
from elastic_core.subnet import full_subnet
from elastic_core.training import parallel
from elastic_core.training.faults import LAUNCHER, report_fault
from elastic_core.training.parallel import World
from elastic_core.training.resume import last_whole, resume, save_checkpoint
from elastic_core.training.tokens import Portion, TokenRows
from elastic_core.training.train import StageRun, make_optimizer, train_stage

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
FAULT = 2  # the exit code of a process that reported its exception
FULL = Budget(name="full")
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What to train and where. Paths are directories, but for `tokens`, the flat stream to train on.

    `student` is an elastic checkpoint, or a stock one to pretrain; `work` holds the checkpoints and `metrics.jsonl`;
    `output` appears when the stage is complete, and not before. `lineage` is added to that of the family. `portions`
    are the parts of the stream that are drawn from by weight; without them all of it is, evenly.
    """

    stage: Stage
    distillation: Distillation
    student: str
    teacher: str | None
    tokens: str
    work: str
    output: str
    dtype: Dtype
    seed: int
    lineage: dict[str, str]
    portions: tuple[Portion, ...] = ()


def run_job(job: TrainJob, world: World) -> None:
    """Train the stage from its last checkpoint to its end, together with the other processes, and export the result."""
    if world.from_first(Path(job.output).exists()):
        return
    run, family = prepare(job, world)
    work, steps = Path(job.work), job.stage.steps
    start, rows = resume(work, run)
    saved = time.monotonic()
    with open_metrics(work / METRICS if world.rank == 0 else None, rows) as metrics_file:
        for metrics in train_stage(run, start, [_measured_kl(row) for row in rows]):
            rows.append(json.dumps(asdict(metrics)))
            metrics_file.write(f"{rows[-1]}\n")
            metrics_file.flush()
            done, minutes = metrics.step + 1, (time.monotonic() - saved) / 60
            late = world.from_first(minutes >= job.stage.checkpoint_minutes)
            if done % job.stage.checkpoint_every == 0 or late or done == steps:
                save_checkpoint(work, run, done, rows)
                saved = time.monotonic()
    if start < steps and last_whole(work, run.world, own=True) < steps:
        save_checkpoint(work, run, steps, rows)
        if last_whole(work, run.world, own=True) < steps:
            raise checkpoint.CheckpointError(f"{work}: does not give back what is written to it; look at the disk")
    if world.rank == 0:
        mend_metrics(work / METRICS, rows)
    parallel.with_whole(run.student.state_dict(keep_vars=True), world, partial(export, job, run, family))
    if world.is_first_here:
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
    world.barrier()


def _measured_kl(row: str) -> dict[str, float]:
    """The KL of each budget in a step's row of metrics."""
    return {name: budget["kl"] for name, budget in json.loads(row)["budgets"].items()}


def prepare(job: TrainJob, world: World) -> tuple[StageRun, checkpoint.Family | None]:
    """Everything loaded, this process's part of it where there are several."""
    dtype, world = DTYPES[job.dtype], world.divided(job.stage.sharding)

    def wrap(model: ElasticNemotronH) -> None:
        parallel.shard(model, world, dtype)

    def wrap_student(model: ElasticNemotronH) -> None:
        if job.stage.recompute:
            parallel.recompute_layers(model, offload=job.stage.offload)
        wrap(model)

    student, router, family = load_family(Path(job.student), world.device, wrap_student)
    teacher = load_model(Path(job.teacher), world.device, dtype, wrap).eval() if job.teacher else None
    budgets = tuple(b.budget for b in family.budgets) if family else (FULL,)
    run = StageRun(
        student=student,
        teacher=teacher,
        router=router,
        optimizer=make_optimizer(student, router, job.stage),
        stage=job.stage,
        distillation=job.distillation,
        budgets=budgets,
        subnets={b.name: b.subnet for b in family.budgets} if family else {FULL.name: full_subnet(student.config)},
        data=TokenRows(Path(job.tokens), job.stage.sequence_length, job.portions),
        seed=job.seed,
        world=world,
        autocast=dtype if dtype != torch.float32 else None,
    )
    return run, family


Wrap = Callable[[ElasticNemotronH], None]


def load_model(
    directory: Path, device: torch.device, dtype: torch.dtype, wrap: Wrap = lambda model: None
) -> ElasticNemotronH:
    """The model of a stock or elastic checkpoint in `dtype`, with every weight checked.

    The norms of an elastic checkpoint's subnets are scaled as its order says. What keeps its type is not narrowed: an
    A_log that is stored in float32 stays so. `wrap` may shard the model, while it has no storage yet; then only this
    process's rows are read.
    """
    opened = checkpoint.open_checkpoint(directory)
    with torch.device("meta"):
        model = ElasticNemotronH(opened.config).to(dtype).requires_grad_(False)
    model.scale_norms(read_energy(directory, opened.config))
    for name, weight in model.named_parameters():
        if keeps_type(name, weight.ndim) and torch.promote_types(dtype, opened.tensors[name].dtype) != dtype:
            weight.data = weight.data.float()
    wrap(model)
    model.to_empty(device=device)
    for name, weight in model.state_dict(keep_vars=True).items():
        stored = opened.tensors[name]
        parallel.read_rows(weight, [stored])
        if not shards.is_finite(parallel.local_rows(weight)[0]):
            raise checkpoint.CheckpointError(
                f"{stored.path}: {stored.name}: is too large for {weight.dtype}; load it as {stored.dtype}"
            )
    return model


def load_family(
    directory: Path, device: torch.device, wrap: Wrap = lambda model: None
) -> tuple[ElasticNemotronH, Router | None, checkpoint.Family | None]:
    """The model in float32, ready to train, with the router and the description of the family if it has one."""
    model = load_model(directory, device, torch.float32, wrap).requires_grad_(True)
    if not (directory / checkpoint.FAMILY_FILE).exists():
        return model, None, None
    family = checkpoint.read_family(directory)
    return model, load_router(directory, model.config, family).to(device), family


def load_router(directory: Path, config: ModelConfig, family: checkpoint.Family) -> Router:
    """The router of an elastic checkpoint; its sizes follow from its weights."""
    path = directory / checkpoint.ROUTER_FILE
    weights = shards.read_tensors(path)
    first = weights.get("heads.hidden.0.weight")
    if first is None or first.ndim != 2:
        raise checkpoint.CheckpointError(f"{path}: is not a router; copy the one that was written with this checkpoint")
    elastic = ElasticModel(config, family.axes.bind(config), family.layer_ranking, family.latency_table)
    router = Router(elastic, first.shape[1], first.shape[0])
    if config.num_experts_per_tok and len(elastic.axes.top_k) == 1:  # an axis that earlier routers did not have
        unread = {name: torch.zeros_like(w) for name, w in router.state_dict().items() if ".top_k." in name}
        weights = unread | weights
    expected = {name: tuple(weight.shape) for name, weight in router.state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        name = sorted(dict(found.items() ^ expected.items()))[0]
        raise checkpoint.CheckpointError(
            f"{path}: {name} has shape {found.get(name, 'none')}; the axes in {checkpoint.FAMILY_FILE} need "
            f"{expected.get(name, 'no such tensor')}"
        )
    router.load_state_dict(weights)
    return router


@contextmanager
def open_metrics(path: Path | None, rows: Sequence[str]) -> Iterator[Any]:
    """The file of metrics, to append to, with the rows of the steps done in it; without a path, nothing is kept."""
    if path is not None:
        mend_metrics(path, rows)
    with (path or Path(os.devnull)).open("a") as file:
        yield file


def mend_metrics(path: Path, rows: Sequence[str]) -> None:
    """Write the file of metrics anew where a line of it is torn, or is missing, or is not the one that was written.

    A step that was done again after a kill has several lines, of which the last counts.
    """
    found: dict[int, str] = {}
    try:
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines():
            found[json.loads(line)["step"]] = line
        is_whole = text.endswith("\n") or not text
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if is_whole and all(found.get(step) == row for step, row in enumerate(rows)):
        return
    logger.warning("%s was torn or lacked steps; the rows of the %d steps done are written again", path, len(rows))
    part = path.with_name(f".{path.name}.part")
    part.write_text("".join(f"{row}\n" for row in rows))
    directories.sync(part)
    part.replace(path)


def export(
    job: TrainJob, run: StageRun, family: checkpoint.Family | None, whole: Callable[[str], torch.Tensor]
) -> None:
    """Write the trained checkpoint to `job.output`; where its router trained, with the budgets resolved by it.

    `whole` gives all rows of a weight, one at a time, which may be on other hosts' disks alone. Matrices are written in
    the job's type, all else and the routers of experts in the type that it came in.
    """
    source, config = Path(job.student), run.student.config
    plan = {
        name: shards.TensorInfo(
            dtype=stored.dtype if keeps_type(name, len(stored.shape)) else DTYPES[job.dtype], shape=stored.shape
        )
        for name, stored in checkpoint.open_checkpoint(source).tensors.items()
    }

    def blocks(name: str) -> Iterator[torch.Tensor]:
        weight, dtype = whole(name), plan[name].dtype
        for block in weight.split(max(1, shards.CHUNK_BYTES * len(weight) // weight.nbytes)):
            rows = block.to("cpu", dtype)
            if not shards.is_finite(rows):
                raise ValueError(f"{name} holds NaN or infinity as {dtype}; it is not written to {job.output}")
            yield rows

    def beside(directory: Path) -> None:
        if family is not None and run.router is not None:
            for name in (checkpoint.ORDER_FILE, checkpoint.SHAPES_FILE):
                if (source / name).exists():
                    shutil.copyfile(source / name, directory / name)
            shards.write_tensors(directory / checkpoint.ROUTER_FILE, run.router.state_dict())
            trained = dataclasses.replace(family, lineage={**family.lineage, **job.lineage})
            is_frozen = job.stage.router.mode == "frozen"
            described = trained if is_frozen else resolved_family(trained, run.router, run.budgets)
            checkpoint.write_family(directory, described)

    checkpoint.write_checkpoint(Path(job.output), config, plan, blocks, source=source, beside=beside)


def resolved_family(family: checkpoint.Family, router: Router, budgets: tuple[Budget, ...]) -> checkpoint.Family:
    """`family` with the subnets that `router` resolves its budgets to."""
    config = router.elastic.config
    resolved = tuple(
        checkpoint.ResolvedBudget(budget=budget, subnet=subnet, params=subnet_params(config, subnet))
        for budget, subnet in zip(budgets, resolve_budgets(router, budgets), strict=True)
    )
    return dataclasses.replace(family, budgets=resolved)


@contextmanager
def exclusive(work: Path, patience: float = 60.0) -> Iterator[None]:
    """Hold the work directory; a predecessor that is just dying gets `patience` seconds to let go."""
    try:
        with held(work / "lock", patience=patience):
            yield
    except IsHeld:
        raise RuntimeError(f"{work}: another process is training this stage; stop it first") from None


def main(arguments: list[str]) -> int:
    """Run the job in the file that is the one argument; an exception is reported in its work directory, exit code 2."""
    die_with_parent(int(os.environ[LAUNCHER]) if LAUNCHER in os.environ else None)
    job = build(TrainJob, json.loads(Path(arguments[0]).read_text()))
    rank = int(os.environ.get("RANK", 0))
    try:
        with exclusive(Path(job.work)) if rank == 0 else nullcontext(), parallel.join() as world:
            run_job(job, world)
    except Exception as error:
        logger.exception("process %d ends", rank)
        with suppress(OSError):  # a disk that takes no report either: the exit code says that much
            report_fault(Path(job.work), rank, error)
        return FAULT
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    sys.exit(main(sys.argv[1:]))
