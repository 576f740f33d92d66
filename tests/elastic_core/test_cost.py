"""Laws of cost: what a subnet is said to cost is what its slice takes, and the expected cost is an expectation."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from latency import random_table
from live_bytes import LiveBytes
from nano import NANO_9B, NANO_12B
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic_core.budget import Budget, Dtype, LatencyTarget, Serving
from elastic_core.cost import Cost, LatencyCost, MemoryCost, ParamsCost, budget_cost, shapes, subnet_params
from elastic_core.files.checkpoint import open_checkpoint, write_weights
from elastic_core.files.slicing import slice_checkpoint, slice_weights
from elastic_core.geometry import ATTENTION, FFN, MAMBA, Axes, ModelConfig
from elastic_core.model import Cache, ElasticNemotronH
from elastic_core.router import ElasticModel, expected_cost
from elastic_core.subnet import Subnet, full_subnet, keep_layers, sliced_config

SMALL = ModelConfig(
    hybrid_override_pattern="M-M*-*M-",
    hidden_size=24,
    intermediate_size=300,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=5,
    mamba_num_heads=12,
    mamba_head_dim=4,
    ssm_state_size=3,
    n_groups=3,
    vocab_size=31,
    conv_kernel=3,
    chunk_size=8,
)
RANKING = (0, 7, 3, 1, 6, 4, 2, 5)
NANO_LAYERS = dataclasses.replace(NANO_12B, hybrid_override_pattern="M-*")

# Sums of a few hundred float64 products, each to half a unit in the last place.
FLOAT64_SUM = 1e-12
# 62 layers added up in float32, each sum to half a unit in the last place (2^-24), doubled for the layers' own terms.
FLOAT32_SUM = 124 * 2**-24


def stock_model(model: ModelConfig) -> NemotronHForCausalLM:
    """The stock model of one FFN width, without memory."""
    assert isinstance(model.intermediate_size, int)
    settings = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig)}
    del settings["time_step_limit"]  # whose open end is None here and infinity there
    with torch.device("meta"):
        return NemotronHForCausalLM(NemotronHConfig(**settings))


def stock_params(model: ModelConfig) -> int:
    """Elements of the stock model; with FFN widths that differ, each layer is counted in a model of its width."""
    by_width = {width: stock_model(dataclasses.replace(model, intermediate_size=width)) for width in model.ffn_sizes}
    if not by_width:
        return sum(p.numel() for p in stock_model(model).parameters())
    one = next(iter(by_width.values()))
    inside_layers = {name for name, _ in one.named_parameters() if ".layers." in name}
    total = sum(p.numel() for name, p in one.named_parameters() if name not in inside_layers)
    for layer, kind in enumerate(model.hybrid_override_pattern):
        holder = by_width[model.ffn_sizes[model.ordinal(layer)]] if kind == FFN else one
        total += sum(p.numel() for p in holder.model.layers[layer].parameters())
    return total


def random_subnet(rng: random.Random, model: ModelConfig) -> Subnet:
    """Any subnet that can be sliced: FFN widths by layer, one number of heads."""
    return Subnet(
        hidden=rng.randint(1, model.hidden_size),
        ffn=tuple(rng.randint(1, width) for width in model.ffn_sizes),
        mamba_heads=(model.n_groups * rng.randint(1, 4),) * len(model.layers_of(MAMBA)),
        mamba_head_dim=rng.randint(1, model.mamba_head_dim),
        attention_heads=(model.num_key_value_heads * rng.randint(1, 3),) * len(model.layers_of(ATTENTION)),
        layers=tuple(sorted(rng.sample(range(model.num_layers), rng.randint(1, model.num_layers)))),
    )


@pytest.mark.parametrize(("model", "count"), [(NANO_12B, 12_310_001_152), (NANO_9B, 8_888_227_328)], ids=["12b", "9b"])
def test_the_published_models_have_their_published_counts(model: ModelConfig, count: int) -> None:
    assert subnet_params(model, full_subnet(model)) == count
    assert stock_params(model) == count


@pytest.mark.parametrize(
    ("hidden", "ffn", "mamba_heads", "billions"),
    [(3584, 10240, 112, 6.18), (3840, 10240, 96, 6.20), (3584, 12288, 96, 6.20)],
)
def test_the_known_shapes_near_6b_have_their_stated_size(
    hidden: int, ffn: int, mamba_heads: int, billions: float
) -> None:
    subnet = dataclasses.replace(full_subnet(NANO_12B), hidden=hidden, ffn=(ffn,) * 28, mamba_heads=(mamba_heads,) * 28)
    assert round(subnet_params(NANO_12B, subnet) / 1e9, 2) == billions


def test_a_subnet_of_12b_with_the_shape_of_9b_costs_9b() -> None:
    layers, rest = [], NANO_9B.hybrid_override_pattern
    for layer, kind in enumerate(NANO_12B.hybrid_override_pattern):
        if rest.startswith(kind):
            layers.append(layer)
            rest = rest[1:]
    assert not rest, "the 9B pattern must be a part of the 12B one"
    subnet = dataclasses.replace(full_subnet(NANO_12B), hidden=4480, ffn=(15680,) * 28, layers=tuple(layers))
    assert sliced_config(NANO_12B, subnet) == NANO_9B
    assert subnet_params(NANO_12B, subnet) == 8_888_227_328


@pytest.mark.parametrize("use_conv_bias", [True, False])
@pytest.mark.parametrize("pattern", ["M-M*-*M-", "M-M-", "**M", "-"])
def test_cost_is_the_element_count_of_the_sliced_model(pattern: str, use_conv_bias: bool) -> None:
    model = dataclasses.replace(SMALL, hybrid_override_pattern=pattern, use_conv_bias=use_conv_bias)
    rng = random.Random(0)
    for subnet in [full_subnet(model), *(random_subnet(rng, model) for _ in range(6))]:
        assert subnet_params(model, subnet) == stock_params(sliced_config(model, subnet)), subnet


def test_layers_of_different_heads_cost_what_each_costs_alone() -> None:
    """No stock model has such layers, so each kept layer is counted in a model of its own."""
    subnet = dataclasses.replace(full_subnet(SMALL), hidden=20, mamba_heads=(12, 3, 9), attention_heads=(2, 6))
    total = 2 * 31 * 20 + 20
    for layer in subnet.layers:
        alone = sliced_config(SMALL, dataclasses.replace(subnet, layers=(layer,)))
        total += sum(p.numel() for p in stock_model(alone).model.layers.parameters())
    assert subnet_params(SMALL, subnet) == total


def all_choices(elastic: ElasticModel) -> Iterator[tuple[Subnet, dict[str, tuple[int, ...]]]]:
    """Every subnet of the axes, with the index of the choice in every row of every axis."""
    axes = elastic.axes
    rows = [list(itertools.product(range(len(axes.choices(axis))), repeat=elastic.rows(axis))) for axis in Axes.NAMES]
    for combination in itertools.product(*rows):
        picked = dict(zip(Axes.NAMES, combination, strict=True))
        value = {axis: [axes.choices(axis)[i] for i in picked[axis]] for axis in Axes.NAMES}
        yield (
            Subnet(
                hidden=value["hidden"][0],
                ffn=elastic.per_layer("ffn", value["ffn"]),
                mamba_heads=elastic.per_layer("mamba_heads", value["mamba_heads"]),
                mamba_head_dim=value["mamba_head_dim"][0],
                attention_heads=elastic.per_layer("attention_heads", value["attention_heads"]),
                layers=keep_layers(elastic.layer_ranking, value["depth"][0]),
            ),
            picked,
        )


AXES = Axes(
    hidden=(24, 16, 8),
    ffn=(300, 8),
    mamba_heads=(12, 3),
    mamba_head_dim=(4, 3),
    attention_heads=(6, 2),
    depth=(8, 5, 2),
)


def costs(model: ModelConfig, axes: Axes) -> dict[str, Cost]:
    """One of each kind. In this memory any kind of layer may be the one that needs most."""
    table = random_table(model, axes)
    return {
        "params": ParamsCost(model=model),
        "memory": MemoryCost(model=model, serving=Serving(context=400, batch=2, dtype="float32"), prefill=16),
        "latency": LatencyCost(model=model, fixed_times=table.fixed, times=table.times),
    }


KINDS = ("params", "memory", "latency")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", [(), ("ffn", "attention_heads"), ("mamba_heads",)], ids=str)
def test_the_expected_cost_is_the_mean_over_every_choice(per_layer: tuple[str, ...], kind: str) -> None:
    axes = dataclasses.replace(AXES, per_layer=per_layer).bind(SMALL)
    elastic = ElasticModel(config=SMALL, axes=axes, layer_ranking=RANKING)
    counted = costs(SMALL, axes)[kind]
    generator = torch.Generator().manual_seed(0)
    probabilities = {
        axis: torch.randn(
            elastic.rows(axis), len(axes.choices(axis)), generator=generator, dtype=torch.float64
        ).softmax(-1)
        for axis in Axes.NAMES
    }
    mean, weight = 0.0, 0.0
    for subnet, picked in all_choices(elastic):
        probability = math.prod(
            float(probabilities[axis][row, i]) for axis in Axes.NAMES for row, i in enumerate(picked[axis])
        )
        mean += probability * counted.of(subnet)
        weight += probability
    assert weight == pytest.approx(1.0, rel=FLOAT64_SUM)
    assert float(expected_cost(elastic, probabilities, counted)) == pytest.approx(mean, rel=FLOAT64_SUM)


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_cost_of_certain_choices_is_the_cost_of_the_subnet(kind: str) -> None:
    elastic = ElasticModel(config=SMALL, axes=AXES.bind(SMALL), layer_ranking=RANKING)
    counted = costs(SMALL, elastic.axes)[kind]
    for subnet, picked in all_choices(elastic):
        certain = {
            axis: torch.eye(len(AXES.choices(axis)), dtype=torch.float64)[list(picked[axis])] for axis in Axes.NAMES
        }
        assert float(expected_cost(elastic, certain, counted)) == counted.of(subnet)


def test_the_expected_cost_of_a_12b_model_is_good_to_float32() -> None:
    elastic = ElasticModel(config=NANO_12B, axes=Axes().bind(NANO_12B), layer_ranking=tuple(range(62)))
    certain = {axis: torch.ones(1, 1) for axis in Axes.NAMES}
    expected = expected_cost(elastic, certain, ParamsCost(model=NANO_12B))
    assert float(expected) == pytest.approx(12_310_001_152, rel=FLOAT32_SUM)


# Memory

SERVED = dataclasses.replace(
    SMALL, hidden_size=64, intermediate_size=256, head_dim=16, mamba_head_dim=16, ssm_state_size=16, chunk_size=16
)
# model.py on a CPU needs at least this share of the bound on its activations: where the fused kernels would need more
# than the plain scan, or one token is read at a time, the bound is for them.
USED_OF_BOUND = 0.6


def served(subnet: Subnet, dtype: Dtype) -> ElasticNemotronH:
    """The slice of a random model, as an engine has it in memory."""
    model = ElasticNemotronH(SERVED)
    weights = slice_weights(model.state_dict(), subnet, SERVED, ffn_layout="list")
    slice_ = ElasticNemotronH(sliced_config(SERVED, subnet)).to(getattr(torch, dtype)).requires_grad_(False)
    slice_.load_state_dict(weights)
    return slice_


def read(model: ElasticNemotronH, serving: Serving, prefill: int) -> tuple[int, int]:
    """The bytes of the caches at full context, and the most that were alive on the way there, weights apart."""
    tokens_BT = torch.zeros(serving.batch, serving.context, dtype=torch.long)
    subnet, cache, live = full_subnet(model.config), Cache(), LiveBytes([*model.parameters(), tokens_BT])
    with torch.inference_mode(), live:
        for piece_BT in (*tokens_BT[:, :-1].split(prefill, dim=1), tokens_BT[:, -1:]):
            hidden_BTD = model(piece_BT, subnet, cache=cache)
        model.logits(hidden_BTD[:, -1])
    states = (cache.conv, cache.ssm, cache.keys, cache.values)
    return sum(tensor.nbytes for state in states for tensor in state.values()), live.peak


SERVINGS = {
    "a prompt at once": (Serving(context=64), 1000),
    "pieces of the prompt": (Serving(context=257, batch=2), 64),
    "a long context": (Serving(context=1025), 128),
    "token by token": (Serving(context=21, batch=3), 1),
    "more than a segment": (Serving(context=2600, batch=1), 2048),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SERVINGS)
def test_memory_is_what_serving_a_slice_takes(name: str, dtype: Dtype) -> None:
    serving, prefill = dataclasses.replace(SERVINGS[name][0], dtype=dtype), SERVINGS[name][1]
    counted, rng = MemoryCost(model=SERVED, serving=serving, prefill=prefill), random.Random(0)
    for subnet in [full_subnet(SERVED), *(random_subnet(rng, SERVED) for _ in range(4))]:
        model = served(subnet, dtype)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        caches, most = read(model, serving, prefill)
        assert sum(map(counted.cache, shapes(SERVED, subnet))) == caches, subnet
        activations = counted.of(subnet) - weights - caches
        assert USED_OF_BOUND * activations <= most - caches <= activations, subnet


@pytest.mark.parametrize("kind", [MAMBA, ATTENTION, FFN])
def test_the_largest_layer_alone_decides_the_peak(kind: str) -> None:
    """A layer more of any kind adds its weights and caches, and no activations."""
    counted = MemoryCost(model=SERVED, serving=Serving(context=100), prefill=50)
    layers = SERVED.layers_of(kind)
    one, two = (dataclasses.replace(full_subnet(SERVED), layers=layers[:count]) for count in (1, 2))
    (shape,) = set(shapes(SERVED, one))
    assert counted.of(two) - counted.of(one) == counted.layer(shape)


def test_a_slices_file_holds_the_weights_that_memory_counts(tmp_path: Path) -> None:
    model = ElasticNemotronH(SERVED).to(torch.bfloat16)
    write_weights(tmp_path / "full", SERVED, model.state_dict())
    subnet = random_subnet(random.Random(3), SERVED)
    slice_checkpoint(tmp_path / "full", subnet, tmp_path / "slice", ffn_layout="list")
    counted = MemoryCost(model=SERVED, serving=Serving(context=8), prefill=8)
    stored = sum(tensor.nbytes for tensor in open_checkpoint(tmp_path / "slice").tensors.values())
    weights = [counted.layer(shape) - counted.cache(shape) for shape in shapes(SERVED, subnet)]
    assert counted.fixed(subnet.hidden) + sum(weights) == stored


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_bounds_what_cuda_allocates_for_tensors() -> None:
    model = ElasticNemotronH(NANO_LAYERS).to("cuda", torch.bfloat16).requires_grad_(False)
    serving, subnet, cache = Serving(context=4096), full_subnet(NANO_LAYERS), Cache()
    counted = MemoryCost(model=NANO_LAYERS, serving=serving, prefill=4096)
    tokens_BT = torch.zeros(1, serving.context, dtype=torch.long, device="cuda")
    with torch.inference_mode():
        model(tokens_BT[:, :64], subnet)  # workspaces and compiled kernels stay
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.logits(model(tokens_BT, subnet, cache=cache)[:, -1])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert torch.cuda.max_memory_allocated() - before <= counted.of(subnet) - weights


# Latency


def test_latency_is_the_sum_of_what_each_part_takes() -> None:
    table = random_table(SMALL, AXES.bind(SMALL))
    counted = budget_cost(SMALL, Budget(name="b", latency=LatencyTarget(seconds=1.0)), table)
    subnet = Subnet(
        hidden=16,
        ffn=(300, 8, 300),
        mamba_heads=(3, 12, 12),
        mamba_head_dim=3,
        attention_heads=(2, 6),
        layers=(0, 1, 5, 7),  # the first Mamba and FFN layer, the second attention, the third FFN
    )
    kept = [("M", 3, 3), ("-", 300, 0), ("*", 6, 0), ("-", 300, 0)]
    times = {(t.kind, t.hidden, t.width, t.mamba_head_dim): t.nanoseconds for t in table.layers}
    assert counted.of(subnet) == table.fixed[16] + sum(times[kind, 16, width, dim] for kind, width, dim in kept)


def test_a_latency_is_only_counted_by_a_table_of_the_same_serving() -> None:
    table = random_table(SMALL, AXES.bind(SMALL), Serving(context=64, batch=2))
    same = Budget(name="b", latency=LatencyTarget(seconds=1.0, serving=Serving(context=64, batch=2)))
    other = Budget(name="b", latency=LatencyTarget(seconds=1.0, serving=Serving(context=65, batch=2)))
    assert isinstance(budget_cost(SMALL, same, table), LatencyCost)
    with pytest.raises(ValueError, match=r"^budget b: it is for ctx=65,.* but the latency table was .* ctx=64"):
        budget_cost(SMALL, other, table)
    with pytest.raises(ValueError, match=r"^budget b: a latency needs a latency table; measure one"):
        budget_cost(SMALL, same, None)


def test_a_table_of_another_model_or_of_other_axes_is_refused() -> None:
    table = random_table(SMALL, AXES.bind(SMALL))
    table.check(SMALL, AXES.bind(SMALL))
    table.check(SMALL, Axes(depth=(8, 1)).bind(SMALL))
    with pytest.raises(ValueError, match=r"^latency table: it was measured with vocab_size=31, but the model has 32"):
        table.check(dataclasses.replace(SMALL, vocab_size=32), AXES.bind(SMALL))
    with pytest.raises(ValueError, match=r"^latency table: 2 choices of the axes are missing, such as .*width=4"):
        table.check(SMALL, Axes(attention_heads=(6, 4), hidden=(24, 16)).bind(SMALL))
    with pytest.raises(ValueError, match=r"^latency table: 4 choices of the axes are missing, such as 10;"):
        table.check(SMALL, Axes(hidden=(24, 10)).bind(SMALL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"fixed": {**t.fixed, 24: 0}}, "nanoseconds=0 must be greater than 0"),
        (lambda t: {"layers": (dataclasses.replace(t.layers[0], nanoseconds=-3),)}, "nanoseconds=-3 must be greater"),
        (lambda t: {"layers": t.layers + t.layers[:1]}, "a shape is listed more than once"),
        (lambda t: {"layers": (dataclasses.replace(t.layers[0], kind="X"),)}, "layer kind 'X' is unknown"),
    ],
)
def test_a_table_that_no_measurement_gives_is_refused(change: Callable[..., dict[str, Any]], message: str) -> None:
    table = random_table(SMALL, AXES.bind(SMALL))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(table, **change(table))
