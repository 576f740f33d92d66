"""Latency tables that nobody had to measure."""

import random

from elastic_core.budget import Serving
from elastic_core.cost import LatencyTable, TimedLayer, choices
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.layers.kinds import KINDS


def random_table(
    model: ModelConfig, axes: Axes, serving: Serving | None = None, *, seed: int = 0, monotonic: bool = False
) -> LatencyTable:
    """A table of the (bound) axes in no order, as noise may have it; or one in which more work takes longer."""
    rng = random.Random(seed)
    shapes = [shape for kind in KINDS for shape in choices(model, axes, kind)]
    if monotonic:
        fixed = {hidden: 1000 * hidden + 7 for hidden in axes.hidden}
        times = [500 + s.hidden * (3 + s.width * (1 + s.mamba_head_dim)) for s in shapes]
    else:
        fixed = {hidden: rng.randint(10_000, 30_000) for hidden in axes.hidden}
        times = [rng.randint(1_000, 9_000) for _ in shapes]
    return LatencyTable(
        device="a device of the tests",
        serving=serving or Serving(context=64),
        model=model,
        fixed=fixed,
        layers=tuple(
            TimedLayer(kind=s.kind, hidden=s.hidden, width=s.width, mamba_head_dim=s.mamba_head_dim, nanoseconds=time)
            for s, time in zip(shapes, times, strict=True)
        ),
    )
