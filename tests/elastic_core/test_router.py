"""Laws of the router: fair draws, masks that are exact at certain choices, gradients to every head, held budgets."""

import math
import random
from typing import Literal

import pytest
import torch
from latency import random_table
from torch import Tensor

from elastic_core.budget import Budget, LatencyTarget, MemoryTarget, Serving
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.router import (
    NEGLIGIBLE,
    ElasticModel,
    Router,
    budget_loss,
    drop_negligible,
    expected_choices,
    expected_cost,
    expected_params,
    gumbel_softmax,
    layer_gates,
    soft_subnet,
    straight_through,
)
from elastic_core.subnet import check_subnet, full_subnet, smallest_subnet

AxisName = Literal["ffn", "mamba_heads", "attention_heads"]
PER_LAYER: list[tuple[AxisName, ...]] = [(), ("ffn",), ("ffn", "mamba_heads", "attention_heads")]
MODEL = ModelConfig(
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
)
RANKING = (0, 7, 3, 1, 6, 4, 2, 5)
DIVISOR = {"mamba_heads": 3, "attention_heads": 2}

# A sum of three to eight float64 products.
FLOAT64_SUM = 1e-14
# Central differences of a few hundred products, at steps of 1e-6.
SLOPE = 1e-5
# Adam at a rate of 1e-2 keeps stepping around the target; over many seeds the last step was at most 2.6 % off.
BUDGET_MISS = 0.04
# Pearson's statistic over 4 outcomes exceeds 30.7 once in a million fair draws (chi square, 3 degrees of freedom).
CHI_SQUARE_3_MILLIONTH = 30.7


def elastic_model(per_layer: tuple[AxisName, ...] = ()) -> ElasticModel:
    axes = Axes(
        hidden=(24, 16, 8),
        ffn=(20, 13, 4),
        mamba_heads=(12, 9, 3),
        mamba_head_dim=(4, 3, 1),
        attention_heads=(6, 4, 2),
        depth=(8, 6, 3),
        per_layer=per_layer,
    ).bind(MODEL)
    table = random_table(MODEL, axes, monotonic=True)
    return ElasticModel(config=MODEL, axes=axes, layer_ranking=RANKING, latency_table=table)


SERVING = Serving(context=200, dtype="float32")
KINDS = ("params", "memory", "latency")


def budget_of(kind: str, share: float) -> Budget:
    """A budget of what the smallest subnet costs and a share of what the full model costs above it."""
    any_amount = {
        "params": Budget(name="b", params=1),
        "memory": Budget(name="b", memory=MemoryTarget(bytes=1, serving=SERVING, prefill=16)),
        "latency": Budget(name="b", latency=LatencyTarget(seconds=1.0)),
    }[kind]
    elastic = elastic_model()
    counted = elastic.cost_of(any_amount)
    least = counted.of(smallest_subnet(MODEL, elastic.axes, RANKING))
    target = least + int(share * (counted.of(full_subnet(MODEL)) - least))
    if kind == "memory":
        return Budget(name="b", memory=MemoryTarget(bytes=target, serving=SERVING, prefill=16))
    if kind == "latency":
        return Budget(name="b", latency=LatencyTarget(seconds=target / 1e9))
    return Budget(name="b", params=target)


def random_router(elastic: ElasticModel, num_budgets: int = 3, seed: int = 0) -> Router:
    router = Router(elastic, num_budgets, hidden_size=16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
    return router


def random_probabilities(elastic: ElasticModel, seed: int = 0) -> dict[str, Tensor]:
    logits = random_router(elastic, seed=seed).double()(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    return {axis: values.softmax(-1).detach() for axis, values in logits.items()}


@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_logits_have_a_row_for_each_choice_that_is_made(per_layer: tuple[AxisName, ...]) -> None:
    elastic = elastic_model(per_layer)
    rows = dict.fromkeys(Axes.NAMES, 1)
    rows.update({axis: {"ffn": 3, "mamba_heads": 3, "attention_heads": 2}[axis] for axis in per_layer})
    router = random_router(elastic)
    logits = router(router.one_hot(0))
    assert {axis: tuple(values.shape) for axis, values in logits.items()} == {axis: (rows[axis], 3) for axis in rows}


def test_the_router_answers_each_budget_differently_and_weighs_neighbours() -> None:
    router = random_router(elastic_model())
    first, second = router(router.one_hot(0)), router(router.one_hot(1))
    assert router.one_hot(2).tolist() == [0.0, 0.0, 1.0]
    assert all(not torch.equal(first[axis], second[axis]) for axis in Axes.NAMES)
    between = router(0.5 * router.one_hot(0) + 0.5 * router.one_hot(1))
    assert all(between[axis].shape == first[axis].shape for axis in Axes.NAMES)


def test_a_fresh_router_finds_every_choice_equally_likely() -> None:
    routers = []
    for _ in range(2):
        router = random_router(elastic_model(("ffn",)))
        router.initialise(torch.Generator().manual_seed(3))
        logits = router(router.one_hot(1))
        assert all(not values.any() for values in logits.values())
        routers.append(router.state_dict())
    assert all(torch.equal(routers[0][name], routers[1][name]) for name in routers[0])
    assert any(values.any() for values in routers[0].values()), "the first layers must tell budgets apart"


def test_draws_are_functions_of_the_generator() -> None:
    router = random_router(elastic_model(("ffn",)))
    logits = router(router.one_hot(0))

    def draw(seed: int) -> dict[str, Tensor]:
        return gumbel_softmax(logits, temperature=0.7, scale=2.0, generator=torch.Generator().manual_seed(seed))

    assert all(torch.equal(draw(0)[axis], draw(0)[axis]) for axis in logits)
    assert all(not torch.equal(draw(0)[axis], draw(1)[axis]) for axis in logits)
    for probabilities in draw(0).values():
        assert torch.allclose(probabilities.sum(-1), torch.ones(()))


def test_without_a_generator_the_draw_is_the_plain_softmax() -> None:
    logits = {"hidden": torch.tensor([[1.0, -0.5, 0.25]], dtype=torch.float64)}
    found = gumbel_softmax(logits, temperature=0.5, scale=3.0, generator=None)["hidden"]
    weights = [math.exp(value * 3.0 / 0.5) for value in (1.0, -0.5, 0.25)]
    assert found[0].tolist() == pytest.approx([w / sum(weights) for w in weights], rel=FLOAT64_SUM)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_draws_choose_with_the_softmax_probabilities_at_every_temperature(temperature: float) -> None:
    draws, scale = 20_000, 1.5
    row = torch.tensor([0.0, 0.7, -0.4, 1.1])
    generator = torch.Generator().manual_seed(0)
    drawn = gumbel_softmax({"x": row.expand(draws, 4)}, temperature=temperature, scale=scale, generator=generator)
    observed = drawn["x"].argmax(-1).bincount(minlength=4).double()
    expected = draws * (row.double() * scale).softmax(-1)
    statistic = float(((observed - expected).square() / expected).sum())
    assert statistic < CHI_SQUARE_3_MILLIONTH


def test_a_low_temperature_makes_up_its_mind_and_a_high_one_hedges() -> None:
    logits = {"x": torch.randn(200, 4, generator=torch.Generator().manual_seed(1))}

    def sharpness(temperature: float) -> float:
        generator = torch.Generator().manual_seed(2)
        drawn = gumbel_softmax(logits, temperature=temperature, scale=1.0, generator=generator)
        return float(drawn["x"].max(-1).values.mean())

    assert sharpness(0.01) > 0.95
    assert 0.25 < sharpness(10.0) < 0.35


@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_certain_choices_give_exactly_their_subnet_with_masks_of_ones(per_layer: tuple[AxisName, ...]) -> None:
    elastic = elastic_model(per_layer)
    rng = random.Random(0)
    for _ in range(20):
        picked = {axis: [rng.randrange(3) for _ in range(elastic.rows(axis))] for axis in Axes.NAMES}
        one_hot = {axis: torch.eye(3)[picked[axis]] for axis in Axes.NAMES}
        subnet, masks = soft_subnet(elastic, one_hot)
        size = {axis: [elastic.axes.choices(axis)[i] for i in picked[axis]] for axis in Axes.NAMES}
        check_subnet(subnet, MODEL)
        assert (subnet.hidden, subnet.mamba_head_dim) == (size["hidden"][0], size["mamba_head_dim"][0])
        for axis, layers in {"ffn": 3, "mamba_heads": 3, "attention_heads": 2}.items():
            expected = size[axis] if axis in per_layer else size[axis] * layers
            assert list(getattr(subnet, axis)) == expected
        assert set(subnet.layers) == set(RANKING[: size["depth"][0]])

        gates = [1.0 if layer in subnet.layers else 0.0 for layer in range(8)]
        assert masks.hidden.tolist() == [1.0] * subnet.hidden
        assert [m.tolist() for m in masks.ffn] == [[1.0] * width for width in subnet.ffn]
        assert [m.tolist() for m in masks.mamba_heads] == [[1.0] * (heads // 3) for heads in subnet.mamba_heads]
        assert masks.mamba_head_dim.tolist() == [1.0] * subnet.mamba_head_dim
        assert [m.tolist() for m in masks.attention_heads] == [[1.0] * (heads // 2) for heads in subnet.attention_heads]
        assert masks.layers.tolist() == gates


def slow_mask(probabilities: list[float], sizes: list[int]) -> list[float]:
    """The weight of the choices that keep each unit, as wide as the largest choice with weight."""
    width = max(size for p, size in zip(probabilities, sizes, strict=True) if p > 0)
    return [sum(p for p, size in zip(probabilities, sizes, strict=True) if unit < size) for unit in range(width)]


@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_a_soft_mask_weighs_each_unit_by_the_choices_that_keep_it(per_layer: tuple[AxisName, ...]) -> None:
    elastic = elastic_model(per_layer)
    probabilities = random_probabilities(elastic)
    for axis in ("hidden", "ffn", "mamba_heads", "depth"):
        probabilities[axis][0, 0] = 0.0  # the largest choice has no weight, so that the enclosing subnet is smaller
    subnet, masks = soft_subnet(elastic, probabilities)
    check_subnet(subnet, MODEL)
    assert subnet.hidden == 16
    assert subnet.ffn[0] == 13
    assert subnet.mamba_heads[0] == 9
    assert set(subnet.layers) == set(RANKING[:6])
    found = {
        "hidden": [masks.hidden],
        "ffn": masks.ffn,
        "mamba_heads": masks.mamba_heads,
        "mamba_head_dim": [masks.mamba_head_dim],
        "attention_heads": masks.attention_heads,
    }
    for axis, layer_masks in found.items():
        sizes = [size // DIVISOR.get(axis, 1) for size in elastic.axes.choices(axis)]
        for layer, mask in enumerate(layer_masks):
            row = probabilities[axis][layer if axis in per_layer else 0].tolist()
            assert mask.tolist() == pytest.approx(slow_mask(row, sizes), rel=FLOAT64_SUM), (axis, layer)


def test_a_layer_is_kept_with_the_weight_of_the_depths_that_reach_its_rank() -> None:
    elastic = elastic_model()
    weights = [0.5, 0.2, 0.3]
    gates = layer_gates(elastic, torch.tensor(weights, dtype=torch.float64))
    for layer in range(8):
        kept = sum(w for w, depth in zip(weights, (8, 6, 3), strict=True) if layer in RANKING[:depth])
        assert float(gates[layer]) == pytest.approx(kept, rel=FLOAT64_SUM)


def test_straight_through_is_one_hot_and_has_the_soft_gradient() -> None:
    router = random_router(elastic_model(("ffn",)))
    logits = {axis: values.detach().requires_grad_() for axis, values in router(router.one_hot(0)).items()}
    weights = {axis: torch.randn(values.shape) for axis, values in logits.items()}

    def gradients(hard: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        soft = gumbel_softmax(logits, temperature=0.8, scale=1.0, generator=generator)
        chosen = straight_through(soft) if hard else soft
        if hard:
            for axis, values in chosen.items():
                assert values.tolist() == torch.eye(3)[soft[axis].argmax(-1)].tolist(), "one-hot to the last bit"
        loss = torch.stack([(weights[axis] * chosen[axis]).sum() for axis in logits]).sum()
        return list(torch.autograd.grad(loss, list(logits.values())))

    for hard, soft in zip(gradients(hard=True), gradients(hard=False), strict=True):
        assert torch.equal(hard, soft)
        assert hard.any()


def test_negligible_choices_are_dropped_and_the_rest_sums_to_one() -> None:
    p = torch.tensor([[0.5, 0.4995, NEGLIGIBLE / 2], [1 / 3, 1 / 3, 1 / 3], [0.0, 1.0, 0.0]], dtype=torch.float64)
    kept = drop_negligible({"x": p})["x"]
    assert kept[0].tolist() == pytest.approx([0.5 / 0.9995, 0.4995 / 0.9995, 0.0], rel=FLOAT64_SUM)
    assert kept[0, 2] == 0
    assert kept[1].tolist() == pytest.approx([1 / 3] * 3, rel=FLOAT64_SUM)
    assert kept[2].tolist() == [0.0, 1.0, 0.0]


def test_dropping_negligible_choices_shrinks_the_enclosing_subnet() -> None:
    elastic = elastic_model()
    sharp = {axis: torch.tensor([[NEGLIGIBLE / 10, 0.3, 0.7 - NEGLIGIBLE / 10]]) for axis in Axes.NAMES}
    before, _ = soft_subnet(elastic, sharp)
    after, _ = soft_subnet(elastic, drop_negligible(sharp))
    assert before == full_subnet(MODEL)
    assert (after.hidden, after.ffn, after.mamba_heads) == (16, (13,) * 3, (9,) * 3)
    assert (after.mamba_head_dim, after.attention_heads, after.depth) == (3, (4, 4), 6)


def assert_gradient_reaches_every_row(router: Router, loss: Tensor) -> None:
    router.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for axis, head in router.heads.items():
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{axis}.{name}"
        last = list(head.parameters())[-1].grad
        assert last is not None and last.view(router.elastic.rows(axis), -1).any(-1).all(), axis


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_the_budget_loss_reaches_every_head(per_layer: tuple[AxisName, ...], kind: str) -> None:
    elastic = elastic_model(per_layer)
    router = random_router(elastic)
    probabilities = gumbel_softmax(router(router.one_hot(0)), temperature=1.0, scale=0.1, generator=None)
    loss = budget_loss(elastic, probabilities, budget_of(kind, 0.5))
    assert_gradient_reaches_every_row(router, loss)


@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_a_loss_on_the_masks_reaches_every_head(per_layer: tuple[AxisName, ...]) -> None:
    elastic = elastic_model(per_layer)
    router = random_router(elastic)
    generator = torch.Generator().manual_seed(0)
    sampled = gumbel_softmax(router(router.one_hot(0)), temperature=2.0, scale=0.1, generator=generator)
    _, masks = soft_subnet(elastic, drop_negligible(sampled))
    every = [masks.hidden, *masks.ffn, *masks.mamba_heads, masks.mamba_head_dim, *masks.attention_heads]
    loss = torch.stack([mask.square().sum() for mask in [*every, masks.layers]]).sum()
    assert_gradient_reaches_every_row(router, loss)


def test_the_budget_loss_is_the_relative_distance_of_the_expected_cost() -> None:
    elastic = elastic_model()
    full = {axis: torch.eye(3, dtype=torch.float64)[:1] for axis in Axes.NAMES}
    exact = 2 * 24 * 31 + 24  # embedding, head, final norm
    exact += 3 * (24 * (2 * 48 + 18 + 12) + (48 + 18) * 5 + 3 * 12 + 48 + 48 * 24 + 24)  # Mamba
    exact += 2 * (2 * 24 * 5 * (6 + 2) + 24) + 3 * (2 * 24 * 20 + 24)  # attention, FFN
    for target in (exact // 2, exact, 2 * exact):
        loss = budget_loss(elastic, full, Budget(name="b", params=target))
        assert float(expected_params(elastic, full)) == exact
        assert float(loss) == abs(exact / target - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_budget_loss_is_relative_whatever_the_unit(kind: str) -> None:
    elastic = elastic_model(("ffn",))
    probabilities, budget = random_probabilities(elastic), budget_of(kind, 0.5)
    expected = float(expected_cost(elastic, probabilities, elastic.cost_of(budget)))
    assert budget.target is not None
    assert float(budget_loss(elastic, probabilities, budget)) == pytest.approx(abs(expected / budget.target - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_expected_cost_is_its_slope(kind: str) -> None:
    elastic = elastic_model(("ffn",))
    counted = elastic.cost_of(budget_of(kind, 0.5))
    logits = {axis: p.log().requires_grad_() for axis, p in random_probabilities(elastic).items()}

    def cost_of_logits(*rows: Tensor) -> Tensor:
        probabilities = {axis: row.softmax(-1) for axis, row in zip(logits, rows, strict=True)}
        return expected_cost(elastic, probabilities, counted)

    assert torch.autograd.gradcheck(cost_of_logits, tuple(logits.values()), rtol=SLOPE)


def test_watched_choices_are_the_mean_expected_sizes() -> None:
    elastic = elastic_model(("ffn",))
    probabilities = random_probabilities(elastic)
    watched = expected_choices(elastic, probabilities)
    hidden, depth = probabilities["hidden"][0].tolist(), probabilities["depth"][0].tolist()
    ffn = [p * size for row in probabilities["ffn"].tolist() for p, size in zip(row, (20, 13, 4), strict=True)]
    assert float(watched["hidden"]) == pytest.approx(hidden[0] * 24 + hidden[1] * 16 + hidden[2] * 8, rel=FLOAT64_SUM)
    assert float(watched["ffn"]) == pytest.approx(sum(ffn) / 3, rel=FLOAT64_SUM)
    assert float(watched["depth"]) == pytest.approx(depth[0] * 8 + depth[1] * 6 + depth[2] * 3, rel=FLOAT64_SUM)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", PER_LAYER[:2])
def test_training_on_the_budget_loss_alone_reaches_every_target(per_layer: tuple[AxisName, ...], kind: str) -> None:
    elastic = elastic_model(per_layer)
    targets, steps = [budget_of(kind, share) for share in (0.7, 0.5, 0.3)], 200
    router = random_router(elastic)
    router.initialise(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(steps + 1):
        done = step / steps
        # At temperature 1 and without noise these are the chances of each choice, whatever temperature draws them.
        probabilities = [
            gumbel_softmax(router(router.one_hot(i)), temperature=1.0, scale=1 + 9 * done, generator=None)
            for i in range(len(targets))
        ]
        losses = [budget_loss(elastic, p, target) for p, target in zip(probabilities, targets, strict=True)]
        if step == steps:
            break
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(torch.stack(losses).detach().max()) < BUDGET_MISS
