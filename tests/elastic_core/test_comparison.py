"""Laws of the comparison of orders: its cuts are those of a reordered model, and it tells a good order from a bad."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.comparison import Cut, compare_orders, cut_axis, sizes_to_compare
from elastic_core.files.reorder import identity_order, random_order, reorder_weights
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import Subnet, full_subnet

AXES = Axes(
    hidden=(48, 40, 32, 24),
    ffn=(40, 30, 20),
    mamba_heads=(12, 8, 4),
    mamba_head_dim=(6, 4),
    attention_heads=(6, 4, 2),
    depth=(8, 7, 6),
)
CUTS = {
    "hidden": (32, 24),
    "ffn": (30, 20),
    "mamba_heads": (8, 4),
    "mamba_head_dim": (4,),
    "attention_heads": (4, 2),
    "depth": (7, 6),
}
FIELDS = ("hidden", "ffn", "mamba_heads", "mamba_head_dim", "attention_heads", "layers")  # of an order, by axis
RANKING = (0, 2, 3, 1, 6, 5, 7, 4)

# The same float64 products, whose terms are added up in another order.
FLOAT64_SUM = 1e-12


@pytest.fixture
def model(tiny_config: ModelConfig) -> ElasticNemotronH:
    made = ElasticNemotronH(tiny_config, backend="torch").double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64) + (weight.ndim == 1))
    return made.requires_grad_(False)


def copy_of(model: ElasticNemotronH, weights: Mapping[str, Tensor]) -> ElasticNemotronH:
    copy = ElasticNemotronH(model.config, backend="torch").double().requires_grad_(False)
    copy.load_state_dict(weights)
    return copy


def loss_of(model: ElasticNemotronH) -> Callable[[Subnet], float]:
    tokens_BT = torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))

    def loss(subnet: Subnet) -> float:
        logits_BTV = model.logits(model(tokens_BT[:, :-1], subnet))
        return float(F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten()))

    return loss


def compare(model: ElasticNemotronH, **changes: object) -> tuple[Cut, ...]:
    arguments = {"random_orders": 3, "generator": torch.Generator().manual_seed(5)} | changes
    return compare_orders(model, AXES.bind(model.config), RANKING, loss_of(model), **arguments)


def test_each_elastic_axis_is_cut_at_its_middle_and_its_smallest_choice(model: ElasticNemotronH) -> None:
    cuts = compare(model)
    assert [(cut.axis, cut.size) for cut in cuts] == [(axis, size) for axis in CUTS for size in CUTS[axis]]
    full = {"hidden": 48, "ffn": 40, "mamba_heads": 12, "mamba_head_dim": 6, "attention_heads": 6, "depth": 8}
    assert all(cut.full == full[cut.axis] and len(cut.at_random) == 3 for cut in cuts)


def test_an_axis_without_choices_or_without_layers_is_not_cut(tiny_config: ModelConfig) -> None:
    assert sizes_to_compare(Axes(ffn=(40, 20)).bind(tiny_config), tiny_config) == {"ffn": (20,)}
    no_attention = dataclasses.replace(tiny_config, hybrid_override_pattern="M-M-")
    axes = Axes(attention_heads=(6, 2), hidden=(48, 24)).bind(no_attention)
    assert sizes_to_compare(axes, no_attention) == {"hidden": (24,)}


def test_the_cut_by_importance_is_the_subnet_of_the_model_as_it_came(model: ElasticNemotronH) -> None:
    loss, full = loss_of(model), full_subnet(model.config)
    expected = [loss(cut_axis(full, axis, size, RANKING)) for axis, sizes in CUTS.items() for size in sizes]
    assert [cut.by_importance for cut in compare(model)] == pytest.approx(expected, abs=FLOAT64_SUM)


def test_a_random_cut_is_the_prefix_of_a_model_with_that_axis_reordered(model: ElasticNemotronH) -> None:
    """One shuffle of one axis at a time, so that the oracle is a copy in the very order that was drawn."""
    config, full = model.config, full_subnet(model.config)
    for axis, field in zip(CUTS, FIELDS, strict=True):
        alone = Axes(**{axis: AXES.choices(axis)}).bind(config)
        drawn = random_order(config, torch.Generator().manual_seed(5))
        order = dataclasses.replace(identity_order(config), **{field: getattr(drawn, field)})
        copy = copy_of(model, reorder_weights(model.state_dict(), order, config))
        ranking = drawn.layers if axis == "depth" else RANKING
        expected = [loss_of(copy)(cut_axis(full, axis, size, ranking)) for size in CUTS[axis]]
        fresh = copy_of(model, model.state_dict())
        generator = torch.Generator().manual_seed(5)
        found = compare_orders(fresh, alone, RANKING, loss_of(fresh), random_orders=2, generator=generator)
        assert [cut.at_random[0] for cut in found] == pytest.approx(expected, abs=FLOAT64_SUM)


def test_the_model_computes_the_same_function_afterwards(model: ElasticNemotronH) -> None:
    before = loss_of(model)(full_subnet(model.config))
    compare(model)
    assert loss_of(model)(full_subnet(model.config)) == pytest.approx(before, abs=FLOAT64_SUM)


def test_the_same_generator_gives_the_same_comparison_and_progress_counts_every_pass(model: ElasticNemotronH) -> None:
    seen: list[tuple[int, int]] = []
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    first = compare(model, progress=lambda done, total: seen.append((done, total)))
    model.load_state_dict(state)
    assert compare(model) == first
    passes = len(first) * (1 + 3)
    assert seen == [(done, passes) for done in range(1, passes + 1)]


def logits_moved(model: ElasticNemotronH) -> Callable[[Subnet], float]:
    """How far a subnet's logits are from the whole model's."""
    tokens_BT = torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    whole_BTV = model.logits(model(tokens_BT, full_subnet(model.config)))
    return lambda subnet: float((model.logits(model(tokens_BT, subnet)) - whole_BTV).square().mean())


@pytest.mark.parametrize(("dead", "beats"), [(slice(20, 40), True), (slice(0, 20), False)], ids=["last", "first"])
def test_an_order_beats_random_ones_with_the_dead_neurons_last_and_not_with_them_first(
    model: ElasticNemotronH, dead: slice, beats: bool
) -> None:
    for layer in model.config.layers_of("-"):
        model.layers[layer].mixer.up_proj.weight[dead] = 0.0
    axes, generator = Axes(ffn=(40, 20)).bind(model.config), torch.Generator().manual_seed(0)
    (cut,) = compare_orders(model, axes, RANKING, logits_moved(model), random_orders=5, generator=generator)
    assert (abs(cut.by_importance) < FLOAT64_SUM) == cut.beats_random == beats
    assert min(cut.at_random) > 1e-3


@pytest.mark.parametrize(
    ("by_importance", "beats"),
    # The mean of the random orders is 2, its standard error 1 / sqrt(3) = 0.577.
    [(0.5, True), (1.42, True), (1.43, False), (2.0, False), (3.0, False), (math.nan, False), (math.inf, False)],
)
def test_importance_must_beat_the_mean_of_random_orders_by_more_than_its_standard_error(
    by_importance: float, beats: bool
) -> None:
    cut = Cut(axis="ffn", full=40, size=20, by_importance=by_importance, at_random=(1.0, 2.0, 3.0))
    assert cut.beats_random == beats
