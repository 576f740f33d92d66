"""`elastic slice`: cut a budget, or any size between, out of an elastic checkpoint."""

import math
from dataclasses import replace
from pathlib import Path

import typer

from elastic_core.budget import Budget
from elastic_core.files.checkpoint import read_config, read_family
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.geometry import FfnLayout
from elastic_core.planning.profile import read_table
from elastic_core.resolve import resolve_target
from elastic_core.schema import build
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training.job import load_router
from flows.commands.models import describe
from tasks.running.bars import bar


def slice_family(
    checkpoint: Path,
    output: Path,
    *,
    budget: str | None,
    sizes: dict[str, float | str | None],
    profile: Path | None,
    ffn_layout: FfnLayout,
) -> None:
    """Write the slice of a budget, or of the one size that `sizes` gives by its option, and say what it is."""
    given = {option: size for option, size in sizes.items() if size is not None}
    if len(given) + (budget is not None) != 1:
        raise ValueError(f"give one of --budget, {', '.join(sizes)}")
    if profile is not None and "--latency" not in given:
        raise ValueError("--profile is the table that --latency is read from; give both, or neither")
    if budget is not None:
        subnet, takes = read_family(checkpoint).budget(budget).subnet, ""
    else:
        subnet, takes = any_size(checkpoint, *given.popitem(), profile)
    with bar("slicing") as report:
        slice_checkpoint(checkpoint, subnet, output, ffn_layout=ffn_layout, progress=report)
    typer.echo(f"{output}: {describe(output)}{takes}")


def any_size(checkpoint: Path, option: str, size: float | str, profile: Path | None) -> tuple[Subnet, str]:
    """The subnet for the size that an option gives, and what it takes, if that is no number of parameters."""
    if isinstance(size, float):
        if not math.isfinite(size):
            raise ValueError(f"{option} {size} is not a size; give a number of parameters, such as 7.5e9")
        size = int(size)
    kind = option.removeprefix("--").replace("-", "_")
    budget = build(Budget, {"name": kind, kind: size})
    family = read_family(checkpoint)
    if profile is not None:
        family = replace(family, latency_table=read_table(profile))
    router = load_router(checkpoint, read_config(checkpoint), family)
    counted = router.elastic.cost_of(budget)
    if isinstance(size, int) and size > (most := counted.of(full_subnet(router.elastic.config))):
        raise ValueError(f"{option} {size:,} is above the model's {counted.text(most)}; lower it")
    subnet = resolve_target(router, [b.subnet for b in family.budgets], budget)
    return subnet, f", {counted.text(counted.of(subnet))} of {budget}" if budget.params is None else ""
