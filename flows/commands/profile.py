"""What `elastic profile` measures, and how it shows it."""

from pathlib import Path

import torch

from elastic_core.budget import Dtype, Serving
from elastic_core.cost import LatencyCost, LatencyTable, TimedLayer
from elastic_core.files.checkpoint import read_config, read_family
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.layers.kinds import KINDS, kind_names
from elastic_core.planning.profile import measure, write_table
from elastic_core.subnet import full_subnet, smallest_subnet
from flows.commands.recipes import load_recipe
from flows.commands.teacher import teacher_geometry
from flows.commands.terminal import text_table, wide_console
from tasks.running.bars import bar


def profile_source(source: Path, output: Path, *, context: int, batch: int, dtype: Dtype) -> None:
    """Time the parts of a decoding step on this device, at every choice of a recipe's or checkpoint's axes."""
    model, axes = profiled(source)
    serving = Serving(context=context, batch=batch, dtype=dtype)
    if not output.parent.is_dir():
        raise ValueError(f"{output.parent}: there is no such directory; make it, or write the table somewhere else")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with bar("profiling") as report:
        table = measure(model, axes, serving, device, progress=report)
    write_table(output, table)
    print_table(table, axes)


def profiled(source: Path) -> tuple[ModelConfig, Axes]:
    """The geometry and the (bound) axes of a recipe or an elastic checkpoint."""
    if source.is_dir():
        model = read_config(source)
        return model, read_family(source).axes.bind(model)
    recipe = load_recipe(source)
    model = teacher_geometry(recipe)
    return model, recipe.axes.bind(model)


def print_table(table: LatencyTable, axes: Axes) -> None:
    """Print what each part takes at its largest and at its smallest, and a whole step."""
    rows = []
    for kind, name in kind_names(table.model).items():
        timed = [layer for layer in table.layers if layer.kind == kind]  # every axis falls from its largest choice
        ends = (f"{_size(table.model, t)}: {_time(t.nanoseconds)}" for t in (timed[0], timed[-1]))
        rows.append(_row(name, *ends))
    outside = (axes.hidden[0], axes.hidden[-1])
    rows.append(_row("embedding, head", *(f"{hidden}: {_time(table.fixed[hidden])}" for hidden in outside)))
    counted = LatencyCost(model=table.model, fixed_times=table.fixed, times=table.times)
    smallest = smallest_subnet(table.model, axes, range(table.model.num_layers))
    steps = (counted.of(subnet) for subnet in (full_subnet(table.model), smallest))
    rows.append(_row("decoding step", *map(_time, steps)))
    wide_console().print(text_table(rows, f"{table.device}, {table.serving}"))


def _row(part: str, largest: str, smallest: str) -> dict[str, str]:
    return {"part": part, "largest": largest, "smallest": smallest}


def _size(model: ModelConfig, layer: TimedLayer) -> str:
    return f"{layer.hidden}, {KINDS[layer.kind].text(layer.sizes(model))}"


def _time(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.3f} ms"
