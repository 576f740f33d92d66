"""shapes.json beside an elastic.json: the subnets that were measured for each budget, and what their cuts lose.

It says of what the chosen subnets were chosen. A family whose shapes are the router's word alone has none.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from elastic_core.files.checkpoint import FAMILY_FILE, ROUTER_FILE, SHAPES_FILE, Family, write_family
from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import CheckpointError, read_json, regular_file, write_json, write_tensors
from elastic_core.router import Router
from elastic_core.schema import build, to_dict
from elastic_core.search import Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredShapes:
    """The candidates of each budget by name, the best first, and the tokens that each was measured on."""

    tokens: int
    budgets: dict[str, tuple[Candidate, ...]]

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")


def write_shaped(source: Path, directory: Path, family: Family, router: Router, shapes: MeasuredShapes) -> None:
    """Write the elastic checkpoint `source` as `family` with `router`, and say of what its subnets were chosen.

    The weights are those of `source`: their files are linked, or copied where that cannot be. All others are copies,
    for they may be written again.
    """
    with staged_directory(directory) as staging:
        for path in source.iterdir():
            if path.name.startswith("model") and path.suffix == ".safetensors":
                _link(regular_file(source, path.name), staging / path.name)
            elif path.name not in (FAMILY_FILE, ROUTER_FILE, SHAPES_FILE):
                shutil.copyfile(regular_file(source, path.name), staging / path.name)
        write_tensors(staging / ROUTER_FILE, router.state_dict())
        write_json(staging / SHAPES_FILE, to_dict(shapes))
        write_family(staging, family)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_shapes(directory: Path) -> MeasuredShapes | None:
    """The shapes.json of an elastic checkpoint; None where it has none."""
    if not (directory / SHAPES_FILE).exists():
        return None
    path = regular_file(directory, SHAPES_FILE)
    try:
        return build(MeasuredShapes, read_json(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
