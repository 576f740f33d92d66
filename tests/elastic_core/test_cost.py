"""Laws of cost: a subnet's parameters are the elements of its slice, and the expected cost is an expectation."""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest
import torch
from nano import NANO_9B, NANO_12B
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic_core.config import ATTENTION, FFN, MAMBA, Axes, ModelConfig
from elastic_core.cost import Size, Widths, params, subnet_params, widths
from elastic_core.router import ElasticModel, expected_widths
from elastic_core.subnet import Subnet, full_subnet, keep_layers, sliced_config

SMALL = ModelConfig(
    hybrid_override_pattern="M-M*-*M-",
    hidden_size=24,
    intermediate_size=20,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=5,
    mamba_num_heads=12,
    mamba_head_dim=4,
    ssm_state_size=3,
    n_groups=3,
    vocab_size=31,
    conv_kernel=3,
)
RANKING = (0, 7, 3, 1, 6, 4, 2, 5)

# Sums of a few hundred float64 products, each to half a unit in the last place.
FLOAT64_SUM = 1e-12
# 62 layers added up in float32, each sum to half a unit in the last place (2^-24), doubled for the layers' own terms.
FLOAT32_SUM = 124 * 2**-24


def stock_model(model: ModelConfig) -> NemotronHForCausalLM:
    """The stock model of one FFN width, without memory."""
    assert isinstance(model.intermediate_size, int)
    settings = {f.name: getattr(model, f.name) for f in dataclasses.fields(ModelConfig)}
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


def changed_widths(base: Widths) -> Iterator[tuple[str, list[Widths]]]:
    """Each single width of `base` in turn, at three evenly spaced sizes."""
    for name in ("hidden", "mamba_head_dim"):
        yield name, [dataclasses.replace(base, **{name: size}) for size in (2, 11, 20)]
    for name in ("ffn", "mamba_heads", "attention_heads", "layers"):
        values = list(getattr(base, name))
        for i in range(len(values)):
            sizes = [[*values[:i], size, *values[i + 1 :]] for size in (Fraction(0), Fraction(1, 3), Fraction(2, 3))]
            yield f"{name}[{i}]", [dataclasses.replace(base, **{name: size}) for size in sizes]


def test_cost_is_linear_in_each_width() -> None:
    for name, (low, middle, high) in changed_widths(widths(SMALL, full_subnet(SMALL))):
        a, b, c = params(SMALL, low), params(SMALL, middle), params(SMALL, high)
        assert b - a == c - b > 0, name


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


@pytest.mark.parametrize("per_layer", [(), ("ffn", "attention_heads"), ("mamba_heads",)])
def test_the_expected_cost_is_the_mean_over_every_choice(per_layer: tuple[str, ...]) -> None:
    axes = Axes(
        hidden=(24, 16, 8),
        ffn=(20, 8),
        mamba_heads=(12, 3),
        mamba_head_dim=(4, 3),
        attention_heads=(6, 2),
        depth=(8, 5, 2),
        per_layer=per_layer,  # type: ignore[arg-type]
    ).bind(SMALL)
    elastic = ElasticModel(config=SMALL, axes=axes, layer_ranking=RANKING)
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
        mean += probability * subnet_params(SMALL, subnet)
        weight += probability
    assert weight == pytest.approx(1.0, rel=FLOAT64_SUM)
    expected = params(SMALL, expected_widths(elastic, probabilities))
    assert float(expected) == pytest.approx(mean, rel=FLOAT64_SUM)


def as_tensors(w: Widths, dtype: torch.dtype) -> Widths:
    def tensors(sizes: Sequence[Size]) -> list[torch.Tensor]:
        return [torch.tensor(float(size), dtype=dtype) for size in sizes]

    return Widths(
        hidden=tensors([w.hidden])[0],
        ffn=tensors(w.ffn),
        mamba_heads=tensors(w.mamba_heads),
        mamba_head_dim=tensors([w.mamba_head_dim])[0],
        attention_heads=tensors(w.attention_heads),
        layers=tensors(w.layers),
    )


def test_the_soft_cost_of_certain_choices_is_the_cost_of_the_subnet() -> None:
    rng = random.Random(1)
    for _ in range(20):
        w = widths(SMALL, random_subnet(rng, SMALL))
        assert float(params(SMALL, as_tensors(w, torch.float64))) == params(SMALL, w)
    nano = widths(NANO_12B, full_subnet(NANO_12B))
    assert float(params(NANO_12B, as_tensors(nano, torch.float32))) == pytest.approx(12_310_001_152, rel=FLOAT32_SUM)
