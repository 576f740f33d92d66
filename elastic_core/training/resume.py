"""The state of a stage in training: written by all its processes together, read again by any number of them.

`checkpoints/step-000000042/` holds a safetensors file of each process that divides the weights (of the first host's,
where every host has a copy) with its rows of every tensor, in the order of the ranks; what every process holds whole
(the router, AdamW's step counts) is in the first alone. One process writes the same form: a single file. FSDP2 divides
along the first dimension only, so a reader takes the rows it needs of each piece. torch.distributed.checkpoint is not
used: it pickles what is not a tensor, under a safetensors name too (C8).

Hosts share no disk: each writes the files of its own processes and, of all files, `state.json`. Who starts the stage
again on several hosts first brings the files of all to each.

`metrics.jsonl` beside them has the metrics of every step done, and `state.json` the size and the SHA-256 of all these
files. A checkpoint whose files are not what `state.json` says is never loaded: the one before it is.
"""

import hashlib
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
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
from elastic_core.schema import build, to_dict
from elastic_core.training.parallel import World, own_part, read_rows, staged_together
from elastic_core.training.train import StageRun

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
STATE_FILE, ROWS_FILE = "state.json", "metrics.jsonl"
ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")

# The pieces of every tensor, by its name: its rows in order.
Pieces = dict[str, list[StoredTensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A file of a checkpoint as it was written."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What `state.json` holds; `files` are all others, by name."""

    stage: str
    done: int
    processes: int
    files: dict[str, _Written]


def save_checkpoint(work: Path, run: StageRun, done: int, rows: Sequence[str]) -> None:
    """Write everything that the next step depends on, after `done` steps; the latest two whole ones are kept.

    `rows` are the metrics of these steps, a line of JSON each.
    """
    world = run.world
    text = "".join(f"{row}\n" for row in rows).encode()  # seconds differ by process, and the first's count
    with staged_together(checkpoint_directory(work, done), world) as staging:
        size, digest = 0, bytes(hashlib.sha256().digest_size)
        if world.rank < world.shards:
            own = staging / _file_name(world.rank, world.shards)
            digest = bytes.fromhex(write_tensors(own, own_part(_tensors(run), world)))
            size = own.stat().st_size
        fact = [size, *digest, len(text), *hashlib.sha256(text).digest()]
        facts = [shared.tolist() for shared in world.gathered(torch.tensor(fact, dtype=torch.int64))]
        half = len(fact) // 2
        files = {_file_name(rank, world.shards): _written(facts[rank][:half]) for rank in range(world.shards)}
        files[ROWS_FILE] = _written(facts[0][half:])
        if world.rank == 0:
            (staging / ROWS_FILE).write_bytes(text)
        if world.is_first_here:
            state = _State(stage=run.stage.name, done=done, processes=world.shards, files=files)
            write_json(staging / STATE_FILE, to_dict(state))
    if world.is_first_here:
        _remove_older(work, world)


def _written(fact: Sequence[int]) -> _Written:
    size, *digest = fact
    return _Written(size=size, sha256=bytes(digest).hex())


def _own_files(world: World) -> list[str]:
    """The files that this host's processes write."""
    ranks = [rank for rank in world.here if rank < world.shards]
    return [_file_name(rank, world.shards) for rank in ranks] + [ROWS_FILE] * (0 in world.here)


def _remove_older(work: Path, world: World) -> None:
    """Remove what is older than the latest two checkpoints whose files of this host are whole, by their sizes."""
    present = _steps_done(work)
    whole = [done for done in present if not _damage(work, done, _own_files(world), sizes_only=True)]
    for old in present:
        if len(whole) >= KEPT_CHECKPOINTS and old < whole[-KEPT_CHECKPOINTS]:
            shutil.rmtree(checkpoint_directory(work, old))


def resume(work: Path, run: StageRun) -> tuple[int, list[str]]:
    """Load the last whole checkpoint into `run`: the number of steps done, 0 without one, and the rows of metrics."""
    done = last_whole(work, run.world)
    if done == 0:
        return 0, []
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
    return done, (checkpoint_directory(work, done) / ROWS_FILE).read_text().splitlines()


def last_whole(work: Path, world: World, *, own: bool = False) -> int:
    """The steps done at the latest checkpoint that every host has as it was written; 0 without one.

    With `own` each host looks at the files alone that it writes itself; then `world` is divided as when they were
    written. The processes of a host hash together. A damaged checkpoint is removed, with a warning that names the file,
    and so is one of later steps.
    """
    while done := world.from_first(max(_steps_done(work), default=0)):
        share = slice(world.rank - world.here[0], None, world.on_a_host)
        damage = _damage(work, done, _own_files(world) if own else None, share)
        if world.all_agree(not damage):
            break
        if damage:
            logger.warning("%s; it is passed over for the checkpoint before it", damage)
        world.barrier()  # all have looked
        _remove_from(work, done, world)
    _remove_from(work, done + 1, world)
    return done


def _remove_from(work: Path, first: int, world: World) -> None:
    """Remove this host's checkpoints of so many steps done and more."""
    if world.is_first_here:
        for done in _steps_done(work):
            if done >= first:
                shutil.rmtree(checkpoint_directory(work, done))
    world.barrier()


def _damage(
    work: Path, done: int, names: Sequence[str] | None, share: slice = slice(None), *, sizes_only: bool = False
) -> str:
    """What is wrong with a share of a checkpoint's files, all or those `names`, in one line; "" where nothing is.

    Only what was read tells of damage: where reading itself fails, the error is raised.
    """
    directory = checkpoint_directory(work, done)
    try:
        state = _read_state(directory)
        for name in list(state.files if names is None else names)[share]:
            path = regular_file(directory, name)
            if (written := state.files.get(name)) is None:
                return f"{path} is none of the files that {directory / STATE_FILE} names"
            if (size := path.stat().st_size) != written.size:
                return f"{path} is torn: it has {size} bytes of {written.size}"
            if not sizes_only and (digest := _sha256(path)) != written.sha256:
                return f"{path} is damaged: its SHA-256 is {digest[:12]}, and was {written.sha256[:12]} when written"
    except ValueError as error:
        return str(error)
    return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_state(directory: Path) -> _State:
    path = regular_file(directory, STATE_FILE)
    try:
        state = build(_State, read_json(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {str(error).removeprefix(f'{path}: ')}") from None
    names = {_file_name(rank, state.processes) for rank in range(state.processes)} | {ROWS_FILE}
    if state.files.keys() != names or checkpoint_directory(directory.parents[1], state.done) != directory:
        raise CheckpointError(f"{path} is damaged: it is of other files, or of another step")
    return state


def written_checkpoints(work: Path) -> list[tuple[int, Path]]:
    """The steps done at each checkpoint that was written to its end, and its directory; the oldest first."""
    return [(done, checkpoint_directory(work, done)) for done in _steps_done(work)]


def recorded_files(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint as it was written, by name; CheckpointError where it is damaged."""
    files = {name: written.sha256 for name, written in _read_state(directory).files.items()}
    return files | {STATE_FILE: _sha256(directory / STATE_FILE)}


def stored_pieces(work: Path, done: int) -> Pieces:
    """What the checkpoint after `done` steps holds, reading headers only."""
    directory = checkpoint_directory(work, done)
    processes = _read_state(directory).processes
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


def checkpoint_directory(work: Path, done: int) -> Path:
    """Where the checkpoint after `done` steps lies, or would."""
    return work / "checkpoints" / f"step-{done:09d}"


def _steps_done(work: Path) -> list[int]:
    names = (re.fullmatch(r"step-(\d{9})", path.name) for path in (work / "checkpoints").glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def _file_name(rank: int, processes: int) -> str:
    return f"rank-{rank:05d}-of-{processes:05d}.safetensors"
