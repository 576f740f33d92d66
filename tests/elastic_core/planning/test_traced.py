"""The plan of nano-12b is what its training step does, at its real shapes, on 8 and on 64 GPUs: memory and traffic.

The step is traced without the hardware (traced.py). What is compared is the most that is there at once, states
included, and the bytes that a micro-step gathers and reduces.
"""

import dataclasses

import pytest
from nano import NANO_12B
from traced import Trace, traced_step, world_of

from elastic_core.geometry import ATTENTION, FFN, MAMBA, ModelConfig
from elastic_core.planning.memory import MicroStep, training_memory
from elastic_core.planning.traffic import averaging_traffic, micro_step_traffic
from elastic_core.recipe import Distillation, Optimizer, Sharding, Stage
from elastic_core.subnet import Subnet, full_subnet

# What is planned from above may be above by so much, and what is left out, such as one value a token, below by it.
MEMORY, TRAFFIC = 0.05, 0.10

SHORT = dataclasses.replace(NANO_12B, hybrid_override_pattern="M-M-M-M*-M-")
STAGE1, STAGE2 = 8192, 49152


def size(config: ModelConfig, hidden: int, ffn: int, mamba_heads: int, queries: int, depth: int) -> Subnet:
    """A subnet of one width for all layers of a kind, with the first layers kept."""
    return dataclasses.replace(
        full_subnet(config),
        hidden=hidden,
        ffn=(ffn,) * len(config.layers_of(FFN)),
        mamba_heads=(mamba_heads,) * len(config.layers_of(MAMBA)),
        attention_heads=(queries,) * len(config.layers_of(ATTENTION)),
        layers=tuple(range(depth)),
    )


def assert_planned_as_traced(
    config: ModelConfig,
    subnet: Subnet,
    ranks: int,
    tokens: int,
    masked: bool,
    keeps: str,
    sharding: Sharding = "full",
) -> None:
    stage = Stage(
        name="traced",
        sequence_length=tokens,
        batch_size=2 * ranks,
        steps=1,
        budgets={"size": 1.0},
        optimizer=Optimizer(learning_rate=1e-4),
        recompute=keeps != "all",
        offload=keeps == "nothing",
        sharding=sharding,
    )
    with world_of(ranks, sharding) as world:
        traced: Trace = traced_step(config, stage, Distillation(), subnet, masked=masked, world=world)
    step = MicroStep(
        subnet=subnet,
        masked=masked,
        sequences=1,
        sequence_length=tokens,
        recompute=stage.recompute,
        offload=stage.offload,
        distillation=Distillation(),
        dtype="bfloat16",
    )
    shards = 8 if sharding == "hybrid" else ranks
    traffic = micro_step_traffic(config, step, shards)
    planned = training_memory(config, step, gpus=shards).total
    print(f"traced {traced.peak / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB ({planned / traced.peak - 1:+.1%})")  # noqa: T201
    assert planned == pytest.approx(traced.peak, rel=MEMORY)
    assert traffic.gathered == pytest.approx(traced.gathered, rel=TRAFFIC)
    assert traffic.reduced == pytest.approx(traced.reduced, rel=TRAFFIC)
    hosts = ranks // shards
    averaging = averaging_traffic(config, subnet.layers, shards, hosts)
    assert averaging == pytest.approx(2 * traced.averaged * (hosts - 1) / hosts, rel=TRAFFIC)


@pytest.mark.parametrize(("ranks", "sharding"), [(8, "full"), (64, "hybrid")])
def test_a_short_models_step_is_planned_right(ranks: int, sharding: Sharding) -> None:
    subnet = size(SHORT, 4096, 10240, 96, 32, 9)
    assert_planned_as_traced(SHORT, subnet, ranks, STAGE1, masked=False, keeps="all", sharding=sharding)


LARGE = full_subnet(NANO_12B)
MIDDLE = size(NANO_12B, 5120, 12288, 96, 40, 62)
SMALL = size(NANO_12B, 4096, 10240, 96, 32, 58)


@pytest.mark.services
@pytest.mark.parametrize(
    ("subnet", "ranks", "tokens", "masked", "keeps"),
    [
        pytest.param(LARGE, 8, STAGE1, False, "inputs", id="stage 1, 12b frozen, 8 ranks"),
        pytest.param(LARGE, 8, STAGE1, True, "inputs", id="stage 1, 12b soft, 8 ranks", marks=pytest.mark.slow),
        pytest.param(MIDDLE, 8, STAGE1, False, "inputs", id="stage 1, 9b frozen, 8 ranks", marks=pytest.mark.slow),
        pytest.param(SMALL, 64, STAGE1, False, "all", id="stage 1, 6b frozen, 64 ranks, all saved"),
        pytest.param(
            LARGE, 64, STAGE1, True, "all", id="stage 1, 12b soft, 64 ranks, all saved", marks=pytest.mark.slow
        ),
        pytest.param(LARGE, 8, STAGE2, True, "inputs", id="stage 2, 12b soft, 8 ranks", marks=pytest.mark.slow),
        pytest.param(
            LARGE, 8, STAGE2, True, "nothing", id="stage 2, 12b soft, 8 ranks, offloaded", marks=pytest.mark.slow
        ),
        pytest.param(LARGE, 64, STAGE2, False, "inputs", id="stage 2, 12b frozen, 64 ranks"),
        pytest.param(SMALL, 64, STAGE2, True, "inputs", id="stage 2, 6b soft, 64 ranks", marks=pytest.mark.slow),
    ],
)
def test_nanos_step_is_planned_right(subnet: Subnet, ranks: int, tokens: int, masked: bool, keeps: str) -> None:
    assert_planned_as_traced(NANO_12B, subnet, ranks, tokens, masked, keeps)
