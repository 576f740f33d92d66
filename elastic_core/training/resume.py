"""The state of a stage in training: written by all its processes together, read again by any number of them.

`checkpoints/step-000000042/` holds a safetensors file of each process with its rows of every tensor, in the order of
the ranks; what every process holds whole (the router, AdamW's step counts) is in the first alone. One process writes
the same form: a single file. FSDP2 divides along the first dimension only, so a reader takes the rows it needs of each
piece. torch.distributed.checkpoint is not used: it pickles what is not a tensor, under a safetensors name too (C8).
"""

import logging
import shutil
from pathlib import Path

import torch
from torch import Tensor

from elastic_core.files.shards import (
    CheckpointError,
    StoredTensor,
    read_header,
    read_json,
    regular_file,
    write_json,
    write_tensors,
)
from elastic_core.training.parallel import own_part, read_rows, staged_together
from elastic_core.training.train import StageRun

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
STATE_FILE = "state.json"
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")

# The pieces of every tensor, by its name: its rows in order.
Pieces = dict[str, list[StoredTensor]]


def save_checkpoint(work: Path, run: StageRun, done: int) -> None:
    """Write everything that the next step depends on, after `done` steps; the latest two are kept."""
    rank, processes = run.world.rank, run.world.size
    with staged_together(_directory(work, done), run.world) as staging:
        write_tensors(staging / _file_name(rank, processes), own_part(_tensors(run), run.world))
        if rank == 0:
            write_json(staging / STATE_FILE, {"stage": run.stage.name, "done": done, "processes": processes})
    if rank == 0:
        for old in _steps_done(work)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(_directory(work, old))


def resume(work: Path, run: StageRun) -> int:
    """Load the last checkpoint into `run`; the number of steps done, 0 without one."""
    done = run.world.from_first(max(_steps_done(work), default=0))
    if done == 0:
        return 0
    pieces = stored_pieces(work, done)
    for name, parameter in _parameters(run).items():
        _read(parameter, name, pieces, work)
        for key in ADAMW_STATE:
            if (stored := f"{name}.{key}") in pieces:
                step = torch.empty((), dtype=torch.float32, device=run.world.device)
                state = step if key == "step" else torch.empty_like(parameter)
                _read(state, stored, pieces, work)
                run.optimizer.state[parameter][key] = state
    logger.info("stage %s goes on after step %d of %d", run.stage.name, done, run.stage.steps)
    return done


def stored_pieces(work: Path, done: int) -> Pieces:
    """What the checkpoint after `done` steps holds, reading headers only."""
    directory = _directory(work, done)
    processes = read_json(regular_file(directory, STATE_FILE)).get("processes")
    if type(processes) is not int or processes < 1:
        raise CheckpointError(f"{directory / STATE_FILE}: processes is {processes!r}; expected a number of files")
    pieces: Pieces = {}
    for rank in range(processes):
        for name, stored in read_header(regular_file(directory, _file_name(rank, processes))).items():
            pieces.setdefault(name, []).append(stored)
    return pieces


def _read(tensor: Tensor, name: str, pieces: Pieces, work: Path) -> None:
    found = pieces.get(name, [])
    shape = (sum(piece.shape[0] for piece in found), *tensor.shape[1:]) if tensor.ndim else ()
    if not found or shape != tensor.shape or any(piece.shape[1:] != tensor.shape[1:] for piece in found):
        raise CheckpointError(
            f"{work / 'checkpoints'}: {name} has shapes {[list(piece.shape) for piece in found]}; expected rows of "
            f"{list(tensor.shape)} in all; remove this directory to begin the stage again"
        )
    read_rows(tensor, found)


def _parameters(run: StageRun) -> dict[str, Tensor]:
    parameters = {f"student.{name}": weight for name, weight in run.student.state_dict(keep_vars=True).items()}
    if run.router is not None:
        parameters |= {f"router.{name}": weight for name, weight in run.router.state_dict(keep_vars=True).items()}
    return parameters


def _tensors(run: StageRun) -> dict[str, Tensor]:
    """Every parameter, and after it what AdamW keeps of it, if it was ever used."""
    tensors = {}
    for name, parameter in _parameters(run).items():
        tensors[name] = parameter
        tensors |= {f"{name}.{key}": value for key, value in run.optimizer.state.get(parameter, {}).items()}
    return tensors


def _directory(work: Path, done: int) -> Path:
    return work / "checkpoints" / f"step-{done:09d}"


def _steps_done(work: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (work / "checkpoints").glob("step-*"))


def _file_name(rank: int, processes: int) -> str:
    return f"rank-{rank:05d}-of-{processes:05d}.safetensors"
