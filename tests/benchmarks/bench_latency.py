"""What a latency table says of a slice's decoding step, beside that step: the sum of the parts against the whole.

pytest -m benchmark -s tests/benchmarks/bench_latency.py

The table is measured first; then slices of the same choices decode: the largest, a mixed one, and the smallest.
"""

import dataclasses

import pytest
import torch
from bench import interleaved, record
from nano import NANO_97M

from elastic_core.budget import Serving
from elastic_core.cost import LatencyCost
from elastic_core.geometry import Axes
from elastic_core.model import Cache, ElasticNemotronH
from elastic_core.planning.profile import measure
from elastic_core.subnet import Subnet, full_subnet, sliced_config, smallest_subnet

AXES = Axes(hidden=(1024, 768), ffn=(4096, 2048), mamba_heads=(32, 20), attention_heads=(16, 12), depth=(9, 7))
RANKING = tuple(range(9))
CONTEXT, STEPS = 512, 8


class Decoding:
    """Steps of a slice that has read the context."""

    def __init__(self, subnet: Subnet, device: torch.device) -> None:
        self.model = ElasticNemotronH(sliced_config(NANO_97M, subnet)).to(device).requires_grad_(False)
        self.subnet, self.cache = full_subnet(self.model.config), Cache()
        tokens_BT = torch.zeros(1, CONTEXT, dtype=torch.long, device=device)
        self.next_BT = tokens_BT[:, :1]
        with torch.inference_mode():
            self.model(tokens_BT[:, : CONTEXT - 1], self.subnet, cache=self.cache)

    @torch.inference_mode()
    def __call__(self) -> None:
        cache = self.cache.copied()
        for _ in range(STEPS):
            self.model.logits(self.model(self.next_BT, self.subnet, cache=cache))


@pytest.mark.benchmark
def test_a_table_tells_how_long_a_step_takes() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    axes, full = AXES.bind(NANO_97M), full_subnet(NANO_97M)
    table = measure(NANO_97M, axes, Serving(context=CONTEXT, dtype="float32"), device)
    counted = LatencyCost(model=NANO_97M, fixed_times=table.fixed, times=table.times)
    subnets = {
        "largest": full,
        "mixed": dataclasses.replace(full, hidden=768, mamba_heads=(20,) * 4),
        "smallest": smallest_subnet(NANO_97M, axes, RANKING),
    }
    seconds = interleaved({name: Decoding(subnet, device) for name, subnet in subnets.items()})
    for name, subnet in subnets.items():
        record(
            benchmark="latency table",
            shape=f"{name}: hidden {subnet.hidden}, {subnet.depth} layers, context {CONTEXT}",
            unit="ms",
            ours=counted.of(subnet) / 1e6,
            theirs=1e3 * seconds[name] / STEPS,
            alternative="decoding step of the slice",
            target="1",
        )
