"""Latency tables: how long each part of a decoding step takes on this device, at every choice of the axes.

The parts are those of model.py, as large as in a slice. Each is timed alone: a step runs them one after the other, and
each reads weights that the last one did not. Of parts so small that a cache of the device holds them the sum is low.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic_core.budget import Serving
from elastic_core.cost import LatencyTable, ParamsCost, TimedLayer, choices
from elastic_core.files.shards import CheckpointError, Progress, read_json, write_json
from elastic_core.geometry import FFN, FULL_SIZES, Axes, ModelConfig
from elastic_core.layers.kernels import select_backend
from elastic_core.layers.kind import LayerShape
from elastic_core.layers.kinds import KINDS
from elastic_core.model import Cache, ElasticNemotronH, Layer
from elastic_core.recipe import Recipe
from elastic_core.schema import build, to_dict
from elastic_core.subnet import full_subnet

REPEATS = 7
SAMPLE_NANOSECONDS = 2_000_000  # of calls in a row, so that waiting for the device at their end is next to nothing
ALIGNMENT = 64  # values; a weight begins as aligned as if it had been allocated alone
TENSORS = 16  # a part has fewer

Step = Callable[[], object]


def read_table(path: Path) -> LatencyTable:
    """The latency table in a file, checked; CheckpointError, one line, names the file and the field."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; measure a latency table with `elastic profile`")
    try:
        return build(LatencyTable, read_json(path))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: is not a latency table: {error}") from None


def recipe_table(recipe: Recipe) -> LatencyTable | None:
    """The latency table that a recipe names, if it names one."""
    return read_table(Path(recipe.latency_table)) if recipe.latency_table is not None else None


def write_table(path: Path, table: LatencyTable) -> None:
    """Write a latency table as JSON."""
    write_json(path, to_dict(table))


@torch.inference_mode()
def measure(
    model: ModelConfig,
    axes: Axes,
    serving: Serving,
    device: torch.device,
    *,
    repeats: int = REPEATS,
    progress: Progress | None = None,
) -> LatencyTable:
    """Time the parts of a decoding step at every choice of the (bound) `axes`, as `serving` says, on `device`.

    A time is the median of `repeats` samples, taken in turns, so that what disturbs the device for a while disturbs
    all parts alike.
    """
    shapes = [shape for kind in KINDS for shape in choices(model, axes, kind)]
    bench = _Bench(model, serving, device, shapes, axes.hidden)
    steps = [*map(bench.fixed, axes.hidden), *map(bench.layer, shapes)]
    times = _medians(steps, device, repeats, progress)
    fixed, layers = times[: len(axes.hidden)], times[len(axes.hidden) :]
    return LatencyTable(
        device=_name(device),
        serving=serving,
        model=model,
        fixed=dict(zip(axes.hidden, fixed, strict=True)),
        layers=tuple(TimedLayer(**asdict(s), nanoseconds=t) for s, t in zip(shapes, layers, strict=True)),
    )


class _Bench:
    """Makes the parts, all with the same weights in memory, for a large model's choices would not fit at once."""

    def __init__(
        self,
        model: ModelConfig,
        serving: Serving,
        device: torch.device,
        shapes: Iterable[LayerShape],
        hidden: Iterable[int],
    ) -> None:
        self._model, self._serving, self._device = model, serving, device
        self._backend = select_backend("auto", device)
        counted = ParamsCost(model=model)
        largest = max([*map(counted.layer, shapes), *map(counted.fixed, hidden)])
        self._weights = self._normal(largest + TENSORS * ALIGNMENT).mul_(model.initializer_range)
        seen = serving.batch, model.num_key_value_heads, serving.context - 1, model.head_dim
        self._keys, self._values = self._normal(*seen), self._normal(*seen)

    def fixed(self, hidden: int) -> Step:
        """Embedding, final norm and output head."""
        config = replace(self._model, hybrid_override_pattern=FFN, hidden_size=hidden, intermediate_size=1)
        with torch.device("meta"):
            part = ElasticNemotronH(config)
        self._give_weights(part)
        subnet = replace(full_subnet(config), layers=())
        tokens_BT = torch.zeros(self._serving.batch, 1, dtype=torch.long, device=self._device)
        return lambda: part.logits(part(tokens_BT, subnet))

    def layer(self, shape: LayerShape) -> Step:
        """A layer at the context's last token."""
        sizes: dict[str, Any] = {"hidden_size": shape.hidden, "intermediate_size": 1}
        sizes |= {FULL_SIZES[axis]: size for axis, size in shape.sizes(self._model).items()}
        config = replace(self._model, hybrid_override_pattern=shape.kind, **sizes)
        with torch.device("meta"):
            part = Layer(config, 0)
        self._give_weights(part)
        subnet, x_BTD, before = full_subnet(config), self._normal(self._serving.batch, 1, shape.hidden), Cache()
        part(x_BTD, subnet, None, before, self._backend)
        if before.keys:
            before.keys[0], before.values[0] = self._keys, self._values

        def step() -> Tensor:
            cache = before.copied()
            y_BTD: Tensor = part(x_BTD, subnet, None, cache, self._backend)
            return y_BTD

        return step

    def _normal(self, *shape: int) -> Tensor:
        """Random values: on zeros a device would need less power, and so be faster."""
        return torch.randn(shape, dtype=getattr(torch, self._serving.dtype), device=self._device)

    def _give_weights(self, part: nn.Module) -> None:
        weights, start = {}, 0
        for name, parameter in part.named_parameters():
            if not name.startswith("layers."):  # of a part that is outside the layers
                weights[name] = self._weights[start : start + parameter.numel()].view(parameter.shape)
                start += math.ceil(parameter.numel() / ALIGNMENT) * ALIGNMENT
        part.load_state_dict(weights, strict=False, assign=True)


def _medians(steps: Sequence[Step], device: torch.device, repeats: int, progress: Progress | None) -> list[int]:
    calls = []
    for step in steps:
        _nanoseconds(step, 1, device)  # the first call loads, compiles and tunes
        calls.append(math.ceil(SAMPLE_NANOSECONDS / min(_nanoseconds(step, 1, device) for _ in range(3))))
    samples: list[list[float]] = [[] for _ in steps]
    for done in range(repeats * len(steps)):
        index = done % len(steps)
        samples[index].append(_nanoseconds(steps[index], calls[index], device))
        if progress is not None:
            progress(done + 1, repeats * len(steps))
    return [math.ceil(statistics.median(taken)) for taken in samples]


def _nanoseconds(step: Step, calls: int, device: torch.device) -> float:
    """How long a call takes, of so many in a row."""
    _wait(device)
    start = time.perf_counter_ns()
    for _ in range(calls):
        step()
    _wait(device)
    return (time.perf_counter_ns() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
