"""One stage as a job of its own process: load, resume, train, save, export.

A supervisor writes a `TrainJob` as JSON and runs `torchrun -m elastic_core.job FILE`. Kill it at any moment and run it
again: it goes on from its last checkpoint, and the weights it ends with are the same to the bit.
"""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from elastic_core import checkpoint, shards
from elastic_core.config import Budget, Distillation, Dtype, ModelConfig, Stage, build
from elastic_core.cost import subnet_params
from elastic_core.model import ElasticNemotronH
from elastic_core.resolve import resolve_budgets
from elastic_core.router import ElasticModel, Router
from elastic_core.train import (
    StageRun,
    TokenRows,
    make_optimizer,
    resolved_subnets,
    train_stage,
)

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
ERROR = "error.txt"
KEPT_CHECKPOINTS = 2
FULL = Budget(name="full")
DTYPES: dict[Dtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob:
    """What to train and where. Paths are directories, but for `tokens`, the flat stream to train on.

    `student` is an elastic checkpoint, or a stock one to pretrain; `work` holds the checkpoints and `metrics.jsonl`;
    `output` appears when the stage is complete, and not before.
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


def run_job(job: TrainJob) -> None:
    """Train the stage from its last checkpoint to its end, and export the result."""
    if Path(job.output).exists():
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[job.dtype]
    student, router, family = load_family(Path(job.student), device)
    teacher = load_model(Path(job.teacher), device, dtype).eval() if job.teacher else None
    budgets = tuple(Budget(name=b.name, params=b.target_params) for b in family.budgets) if family else (FULL,)
    run = StageRun(
        student=student,
        teacher=teacher,
        router=router,
        optimizer=make_optimizer(student, router, job.stage),
        stage=job.stage,
        distillation=job.distillation,
        budgets=budgets,
        subnets=resolved_subnets(student.config, router, budgets),
        data=TokenRows(Path(job.tokens), job.stage.sequence_length),
        seed=job.seed,
        autocast=dtype if dtype != torch.float32 else None,
    )
    work = Path(job.work)
    start = resume(work, run)
    with open_metrics(work / METRICS) as metrics_file:
        for metrics in train_stage(run, start):
            metrics_file.write(json.dumps(asdict(metrics)) + "\n")
            metrics_file.flush()
            done = metrics.step + 1
            if done % job.stage.checkpoint_every == 0 or done == job.stage.steps:
                save_checkpoint(work, run, done)
    export(job, run, family)
    shutil.rmtree(work / "checkpoints", ignore_errors=True)


def load_model(directory: Path, device: torch.device, dtype: torch.dtype) -> ElasticNemotronH:
    """The model of a stock or elastic checkpoint, with every weight checked."""
    config = checkpoint.read_config(directory)
    with torch.device("meta"):
        model = ElasticNemotronH(config)
    weights = checkpoint.load_weights(directory, dtype)
    model.load_state_dict({name: weight.to(device) for name, weight in weights.items()}, assign=True)
    return model.requires_grad_(False)


def load_family(
    directory: Path, device: torch.device
) -> tuple[ElasticNemotronH, Router | None, checkpoint.Family | None]:
    """The model in float32, ready to train, with the router and the description of the family if it has one."""
    model = load_model(directory, device, torch.float32).requires_grad_(True)
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
    router = Router(
        ElasticModel(config, family.axes.bind(config), family.layer_ranking), first.shape[1], first.shape[0]
    )
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
def open_metrics(path: Path) -> Iterator[Any]:
    """The file of metrics, to append to; a line that a kill tore in two is ended first."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        if torn:
            file.write("\n")
        yield file


def save_checkpoint(work: Path, run: StageRun, done: int) -> None:
    """Everything the next step depends on, after `done` steps; the latest two are kept."""
    directory = work / "checkpoints" / f"step-{done:09d}"
    if directory.exists():
        shutil.rmtree(directory)
    with shards.staged_directory(directory) as staging:
        shards.write_tensors(staging / "model.safetensors", run.student.state_dict())
        if run.router is not None:
            shards.write_tensors(staging / "router.safetensors", run.router.state_dict())
        shards.write_tensors(staging / "optimizer.safetensors", _optimizer_tensors(run.optimizer))
        shards.write_json(staging / "state.json", {"done": done, "stage": run.stage.name})
    for old in _checkpoints(work)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def resume(work: Path, run: StageRun) -> int:
    """Load the last checkpoint into `run`; the number of steps done, 0 without one."""
    found = _checkpoints(work)
    if not found:
        return 0
    directory = found[-1]
    run.student.load_state_dict(shards.read_tensors(directory / "model.safetensors"))
    if run.router is not None:
        run.router.load_state_dict(shards.read_tensors(directory / "router.safetensors"))
    _load_optimizer(run.optimizer, shards.read_tensors(directory / "optimizer.safetensors"))
    done = int(directory.name.removeprefix("step-"))
    logger.info("stage %s goes on after step %d of %d", run.stage.name, done, run.stage.steps)
    return done


def _checkpoints(work: Path) -> list[Path]:
    return sorted((work / "checkpoints").glob("step-*"))


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def export(job: TrainJob, run: StageRun, family: checkpoint.Family | None) -> None:
    """Write the trained checkpoint to `job.output`, with the budgets resolved by the router as it now stands."""
    source = Path(job.student)

    def beside(directory: Path) -> None:
        if family is not None and run.router is not None:
            shutil.copyfile(source / checkpoint.ORDER_FILE, directory / checkpoint.ORDER_FILE)
            shards.write_tensors(directory / checkpoint.ROUTER_FILE, run.router.state_dict())
            checkpoint.write_family(directory, resolved_family(family, run.router, run.budgets))

    checkpoint.write_weights(
        Path(job.output),
        run.student.config,
        run.student.state_dict(),
        DTYPES[job.dtype],
        source=source,
        beside=beside,
    )


def resolved_family(family: checkpoint.Family, router: Router, budgets: tuple[Budget, ...]) -> checkpoint.Family:
    """`family` with the subnets that `router` resolves its budgets to."""
    config = router.elastic.config
    resolved = tuple(
        checkpoint.ResolvedBudget(
            name=budget.name, target_params=budget.params, subnet=subnet, params=subnet_params(config, subnet)
        )
        for budget, subnet in zip(budgets, resolve_budgets(router, budgets), strict=True)
    )
    return dataclasses.replace(family, budgets=resolved)


@contextmanager
def exclusive(work: Path, patience: float = 60.0) -> Iterator[None]:
    """Hold the work directory; a predecessor that is just dying gets `patience` seconds to let go."""
    work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (work / "lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{work}: another process is training this stage; stop it first") from None
                time.sleep(0.2)
        yield


def die_with_parent() -> None:
    """End this process when its parent is gone, so that a killed run leaves no trainer behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Run the job in the file named by the one argument; a fault of the job itself goes to `error.txt`, exit code 2."""
    die_with_parent()
    job = build(TrainJob, json.loads(Path(arguments[0]).read_text()))
    work = Path(job.work)
    with exclusive(work):
        (work / ERROR).unlink(missing_ok=True)
        try:
            run_job(job)
        except (ValueError, FloatingPointError) as error:
            (work / ERROR).write_text(str(error))
            return 2
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    sys.exit(main(sys.argv[1:]))
