"""A family small enough to train in a test: an untrained checkpoint, tokens, and the job that trains it on them.

As a program, under torchrun: takes jobs and runs them one after another in the processes that it is started as, or,
with `--copy`, loads the last checkpoint of the first job and writes it as the last of the second.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from micro import LIMIT_SECONDS
from safetensors.torch import save_file

from elastic_core.budget import Budget
from elastic_core.files import checkpoint, shards
from elastic_core.files.reorder import identity_order, write_order
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.parent import die_with_parent
from elastic_core.recipe import Distillation, Optimizer, Stage
from elastic_core.router import ElasticModel, Router
from elastic_core.schema import build, to_dict
from elastic_core.training import job, parallel, resume
from elastic_core.training.curriculum import generator
from elastic_core.training.job import TrainJob

CONFIG = ModelConfig(
    hybrid_override_pattern="M-*-",
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    mamba_num_heads=4,
    mamba_head_dim=4,
    ssm_state_size=4,
    n_groups=2,
    vocab_size=32,
    chunk_size=8,
)
AXES = Axes(
    hidden=(16, 8), ffn=(32, 16), mamba_heads=(4, 2), mamba_head_dim=(4, 2), attention_heads=(4, 2), depth=(4, 3)
)
BUDGETS = (Budget(name="l"), Budget(name="m", params=4200), Budget(name="s", params=3000))
STAGE = Stage(
    name="stage1",
    sequence_length=12,
    batch_size=6,
    micro_batch_size=2,
    steps=8,
    budgets={"l": 1, "m": 1, "s": 1},
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=2),
    checkpoint_every=2,
)
ALONE = parallel.World(device=torch.device("cpu"))


def write_tokens(path: Path, **others: torch.Tensor) -> Path:
    save_file({"tokens": token_stream(), **others}, path)
    return path


def token_stream() -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (500,), generator=generator("tokens"), dtype=torch.int32)


def documents_and_mask() -> dict[str, torch.Tensor]:
    """Documents of 1 to 19 tokens in the stream, and a third of its tokens not learned, whole rows among them."""
    lengths = torch.randint(1, 20, (200,), generator=generator("documents"))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    learned = (torch.rand(500, generator=generator("mask")) > 1 / 3).to(torch.uint8)
    learned[: 5 * STAGE.sequence_length] = 0
    return {"document_starts": starts[starts < 500], "learned": learned}


def write_family(
    directory: Path,
    config: ModelConfig = CONFIG,
    axes: Axes = AXES,
    budgets: tuple[Budget, ...] = BUDGETS,
    layer_ranking: tuple[int, ...] = (0, 2, 1, 3),
) -> Path:
    """An elastic checkpoint with an untrained router."""
    elastic = ElasticModel(config, axes.bind(config), layer_ranking)
    router = Router(elastic, len(budgets), 8)
    router.initialise(generator("router"))
    model = ElasticNemotronH(config)
    model.initialise(generator("model"))
    described = checkpoint.Family(axes=axes, budgets=(), layer_ranking=layer_ranking, lineage={})
    energy_D = torch.linspace(2.0, 0.1, config.hidden_size)

    def beside(staging: Path) -> None:
        write_order(staging, dataclasses.replace(identity_order(config), energy=energy_D))
        shards.write_tensors(staging / checkpoint.ROUTER_FILE, router.state_dict())
        checkpoint.write_family(staging, job.resolved_family(described, router, budgets))

    checkpoint.write_weights(directory, config, model.state_dict(), torch.float32, beside=beside)
    return directory


def train_job(family: Path, tokens: Path, work: Path, **changes: Any) -> TrainJob:
    settings: dict[str, Any] = {
        "stage": STAGE,
        "distillation": Distillation(),
        "student": str(family),
        "teacher": str(family),
        "tokens": str(tokens),
        "work": str(work),
        "output": str(work / "family"),
        "dtype": "float32",
        "seed": 0,
        "lineage": {"code": "1.0"},
    }
    work.mkdir(exist_ok=True)
    return TrainJob(**{**settings, **changes})


def metrics_of(work: Path) -> dict[int, dict[str, Any]]:
    """The metrics of every step; of a step done again after a kill, the last."""
    lines = (work / job.METRICS).read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, filter(None, lines))}


def launch(processes: int, *jobs: TrainJob, copy: bool = False, hosts: int = 1) -> None:
    """Run this file with these jobs under torchrun, with so many processes on each host.

    The hosts are all this one; each has a work directory of its own, and the first has that of the job.
    """
    files = []
    for host in range(hosts):
        here = [on_host(host, each) if host else each for each in jobs]
        files.append([Path(each.work) / "job.json" for each in here])
        for each, file in zip(here, files[-1], strict=True):
            file.write_text(json.dumps(to_dict(each)))
    meet = [f"--nnodes={hosts}", "--master-addr=localhost", f"--master-port={free_port()}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *meet, f"--nproc-per-node={processes}"]
    started = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={host}", __file__, *(["--copy"] if copy else []), *map(str, files[host])],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(hosts)
    ]
    for process in started:
        _, said = process.communicate(timeout=LIMIT_SECONDS)
        assert process.returncode == 0, said


def on_host(host: int, job: TrainJob) -> TrainJob:
    """The job on another host, which shares no directory with the first."""
    work = Path(job.work) / "hosts" / str(host)
    work.mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(job, work=str(work), output=str(work / "family"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def copy_checkpoint(source: TrainJob, target: TrainJob, world: parallel.World) -> None:
    run, _ = job.prepare(source, world)
    done, rows = resume.resume(Path(source.work), run)
    resume.save_checkpoint(Path(target.work), run, done, rows)


def main(arguments: list[str]) -> None:
    die_with_parent()
    copy = arguments[0] == "--copy"
    jobs = [build(TrainJob, json.loads(Path(path).read_text())) for path in arguments[copy:]]
    with parallel.join() as world:
        if copy:
            copy_checkpoint(*jobs, world)
        else:
            for each in jobs:
                job.run_job(each, world)


def train_here(settings: job.TrainJob, on_step: object = None) -> None:
    """What tasks.running.training.train does, in this process."""
    Path(settings.work).mkdir(parents=True, exist_ok=True)
    job.run_job(settings, ALONE)


if __name__ == "__main__":
    main(sys.argv[1:])
