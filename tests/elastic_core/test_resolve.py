"""Laws of resolving: budgets hold, subnets nest, and the router's preference decides what is left."""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from latency import random_table
from nano import NANO_12B

from elastic_core import resolve
from elastic_core.budget import Budget, LatencyTarget, MemoryTarget, Serving
from elastic_core.cost import Cost, subnet_params
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.resolve import USED_SHARE, resolve_budgets, resolve_target
from elastic_core.router import ElasticModel, Router
from elastic_core.subnet import Subnet, check_subnet, full_subnet, is_nested, keep_layers, smallest_subnet

AxisName = Literal["ffn", "mamba_heads", "attention_heads"]
Kind = Literal["params", "memory", "latency"]
PER_LAYER: list[tuple[AxisName, ...]] = [(), ("ffn",)]
MODEL = ModelConfig(
    hybrid_override_pattern="M-M*-*M-",
    hidden_size=24,
    intermediate_size=200,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=5,
    mamba_num_heads=12,
    mamba_head_dim=4,
    ssm_state_size=3,
    n_groups=3,
    vocab_size=31,
    chunk_size=8,
)
FULL = full_subnet(MODEL)
FULL_PARAMS = subnet_params(MODEL, FULL)
MIDDLE = (3 * FULL_PARAMS // 4, 2 * FULL_PARAMS // 5)
RANKING = (0, 7, 3, 1, 6, 4, 2, 5)

NANO_AXES = Axes(
    hidden=(5120, 4480, 3840, 3584),
    ffn=(20480, 17920, 15680, 12288, 10240),
    mamba_heads=(128, 112, 96),
    depth=(62, 58, 56, 54),
    per_layer=("ffn",),
)

# The solver stops when its bound is within 1e-6 of the best log-probability that it has found.
SOLVER_GAP = 1e-6


@functools.cache
def elastic_model(per_layer: tuple[AxisName, ...] = ()) -> ElasticModel:
    axes = Axes(
        hidden=(24, 16, 8),
        ffn=(200, 130, 40),
        mamba_heads=(12, 6, 3),
        mamba_head_dim=(4, 2),
        attention_heads=(6, 2),
        depth=(8, 5),
        per_layer=per_layer,
    ).bind(MODEL)
    return ElasticModel(config=MODEL, axes=axes, layer_ranking=RANKING, latency_table=random_table(MODEL, axes))


# In this memory activations and caches weigh as much as weights, and any kind of layer may be the one that needs most.
SERVING, PREFILL = Serving(context=200, dtype="float32"), 16
KINDS: list[Kind] = ["params", "memory", "latency"]


def budget_of(kind: Kind, target: int, name: str = "b") -> Budget:
    """A budget of so many parameters, bytes or nanoseconds."""
    if kind == "memory":
        return Budget(name=name, memory=MemoryTarget(bytes=target, serving=SERVING, prefill=PREFILL))
    if kind == "latency":
        return Budget(name=name, latency=LatencyTarget(seconds=target / 1e9))
    return Budget(name=name, params=target)


def cost_of(kind: Kind, per_layer: tuple[AxisName, ...] = ()) -> Cost:
    return elastic_model(per_layer).cost_of(budget_of(kind, 1))


@functools.cache
def cost_range(kind: Kind, per_layer: tuple[AxisName, ...]) -> tuple[int, int]:
    """What the cheapest subnet costs, and the full one. By latency, which is noise here, the cheapest is not small."""
    counted = cost_of(kind, per_layer)
    return min(counted.of(subnet) for subnet, _, _ in every_subnet(per_layer)), counted.of(FULL)


def smallest_params(elastic: ElasticModel) -> int:
    return subnet_params(elastic.config, smallest_subnet(elastic.config, elastic.axes, elastic.layer_ranking))


def random_router(elastic: ElasticModel, seed: int, num_budgets: int = 3) -> Router:
    router = Router(elastic, num_budgets, hidden_size=8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
    return router


def budgets_of(*targets: int | None) -> tuple[Budget, ...]:
    return tuple(Budget(name=f"b{i}", params=target) for i, target in enumerate(targets))


Picks = tuple[tuple[int, ...], ...]


@functools.cache
def every_subnet(per_layer: tuple[AxisName, ...]) -> list[tuple[Subnet, Picks, int]]:
    """Every subnet of the axes, the index of the choice of each row of each axis, and its parameters."""
    elastic = elastic_model(per_layer)
    rows = [
        list(itertools.product(range(len(elastic.axes.choices(axis))), repeat=elastic.rows(axis)))
        for axis in Axes.NAMES
    ]
    found = []
    for picks in itertools.product(*rows):
        size = {
            axis: [elastic.axes.choices(axis)[i] for i in pick] for axis, pick in zip(Axes.NAMES, picks, strict=True)
        }
        subnet = Subnet(
            hidden=size["hidden"][0],
            ffn=elastic.per_layer("ffn", size["ffn"]),
            mamba_heads=elastic.per_layer("mamba_heads", size["mamba_heads"]),
            mamba_head_dim=size["mamba_head_dim"][0],
            attention_heads=elastic.per_layer("attention_heads", size["attention_heads"]),
            layers=keep_layers(RANKING, size["depth"][0]),
        )
        found.append((subnet, picks, subnet_params(MODEL, subnet)))
    return found


def log_probability_of(router: Router, budget: torch.Tensor) -> Callable[[Picks], float]:
    with torch.no_grad():
        logs = [router(budget)[axis].double().log_softmax(-1).tolist() for axis in Axes.NAMES]
    return lambda picks: sum(logs[a][row][i] for a, pick in enumerate(picks) for row, i in enumerate(pick))


@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_no_subnet_exceeds_its_budget_and_each_lies_within_the_one_before(per_layer: tuple[AxisName, ...]) -> None:
    """200 random targets of all kinds, in families that mix them."""
    elastic, rng = elastic_model(per_layer), random.Random(0)
    smallest, resolved, refused = smallest_subnet(MODEL, elastic.axes, RANKING), 0, 0
    for seed in range(100):
        kinds = rng.choices(KINDS, k=2)
        budgets = [
            budget_of(k, rng.randint(*cost_range(k, per_layer)), name) for k, name in zip(kinds, "ms", strict=True)
        ]
        try:
            subnets = resolve_budgets(random_router(elastic, seed), (Budget(name="l"), *budgets))
        except ValueError as error:
            assert "is below the smallest subnet" in str(error)
            refused += 1
            continue
        assert subnets[0] == FULL
        for budget, subnet, outer in zip(budgets, subnets[1:], subnets[:-1], strict=True):
            check_subnet(subnet, MODEL)
            assert elastic.cost_of(budget).of(subnet) <= budget.target
            assert is_nested(smallest, subnet)
            assert is_nested(subnet, outer)
            resolved += 1
    assert resolved >= 150 and refused  # by latency, what is left inside the budget before may all be too slow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_the_resolved_subnet_is_the_likeliest_of_those_that_fit(per_layer: tuple[AxisName, ...], kind: Kind) -> None:
    elastic, counted, rng = elastic_model(per_layer), cost_of(kind, per_layer), random.Random(1)
    every = [(subnet, picks, counted.of(subnet)) for subnet, picks, _ in every_subnet(per_layer)]
    for seed in range(20):
        router = random_router(elastic, seed)
        target = rng.randint(*cost_range(kind, per_layer))
        outer, resolved = FULL, resolve_or_none(router, [budget_of(kind, target, "m"), budget_of(kind, target, "s")])
        for index in range(2):
            score = log_probability_of(router, router.one_hot(index))
            scores = {s: score(picks) for s, picks, size in every if size <= target and is_nested(s, outer)}
            if not scores:
                assert resolved is None
                break
            assert resolved is not None
            assert scores[resolved[index]] == pytest.approx(max(scores.values()), abs=SOLVER_GAP)
            outer = resolved[index]


def resolve_or_none(router: Router, budgets: Sequence[Budget]) -> tuple[Subnet, ...] | None:
    try:
        return resolve_budgets(router, budgets)
    except ValueError:
        return None


def likeliest_widths(scores: torch.Tensor, widths: Sequence[int], most: int) -> float:
    """The greatest total of one score a row whose widths add up to at most `most`, by dynamic programming."""
    best = {0: 0.0}
    for row in scores.tolist():
        longer: dict[int, float] = {}
        for (used, total), (width, score) in itertools.product(best.items(), zip(widths, row, strict=True)):
            if used + width <= most:
                longer[used + width] = max(longer.get(used + width, -math.inf), total + score)
        best = longer
    return max(best.values())


def test_many_layers_are_resolved_to_the_likeliest_widths_that_fit() -> None:
    """28 layers of 5 widths each, of a router that has learned little yet: the likeliest lead by very little."""
    axes = Axes(ffn=NANO_AXES.ffn, per_layer=("ffn",)).bind(NANO_12B)
    elastic = ElasticModel(config=NANO_12B, axes=axes, layer_ranking=tuple(range(62)))
    full = subnet_params(NANO_12B, full_subnet(NANO_12B))
    rng = random.Random(5)
    for seed in range(8):
        router = random_router(elastic, seed)
        with torch.no_grad():
            for parameter in list(router.heads["ffn"].parameters())[2:]:
                parameter.mul_(0.003)
        target = rng.randint(smallest_params(elastic), full - 1)
        (subnet,) = resolve_budgets(router, budgets_of(target))
        with torch.no_grad():
            scores = router(router.one_hot(0))["ffn"].double().log_softmax(-1)
        found = sum(float(row[axes.ffn.index(width)]) for row, width in zip(scores, subnet.ffn, strict=True))
        most = 28 * 20480 + (target - full) // (2 * 5120)  # a neuron costs an up row and a down column
        assert sum(subnet.ffn) <= most
        assert found == pytest.approx(likeliest_widths(scores, axes.ffn, most), abs=SOLVER_GAP)


def test_a_favourite_that_fits_is_taken_as_it_is() -> None:
    elastic = elastic_model(("ffn",))
    for seed in range(10):
        router = random_router(elastic, seed)
        score = log_probability_of(router, router.one_hot(0))
        favourite, _, size = max(every_subnet(("ffn",)), key=lambda entry: score(entry[1]))
        if size < FULL_PARAMS:
            assert resolve_budgets(router, budgets_of(size)) == (favourite,)


def router_that_prefers(elastic: ElasticModel, subnet: Subnet) -> Router:
    """A router whose favourite, for every budget, is `subnet`; all other choices are equally unlikely."""
    router = random_router(elastic, 0)
    with torch.no_grad():
        for axis, head in router.heads.items():
            value = getattr(subnet, axis)
            wanted = torch.tensor(value if isinstance(value, tuple) else [value])[: elastic.rows(axis), None]
            *others, last_bias = head.parameters()
            for parameter in others:
                parameter.zero_()
            last_bias.copy_(-3.0 * (wanted != torch.tensor(elastic.axes.choices(axis))).flatten())
    return router


def check_the_last_unit(elastic: ElasticModel, subnet: Subnet, kind: Kind) -> None:
    """Exactly enough gives the favourite, one parameter, byte or nanosecond less another."""
    counted, router = elastic.cost_of(budget_of(kind, 1)), router_that_prefers(elastic, subnet)
    size = counted.of(subnet)
    assert resolve_budgets(router, (budget_of(kind, size),)) == (subnet,)
    one_short = resolve_or_none(router, (budget_of(kind, size - 1),))
    assert one_short is None or counted.of(one_short[0]) < size


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_a_budget_is_held_to_the_last_unit(per_layer: tuple[AxisName, ...], kind: Kind) -> None:
    elastic, counted = elastic_model(per_layer), cost_of(kind, per_layer)
    least, most = cost_range(kind, per_layer)
    within = [subnet for subnet, _, _ in every_subnet(per_layer) if least < counted.of(subnet) < most]
    for subnet in random.Random(3).sample(within, 30):
        check_the_last_unit(elastic, subnet, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_of_billions_is_held_to_the_last_unit(kind: Kind) -> None:
    """The solver's tolerance alone would let thousands of parameters of a 12B model slip over its limit."""
    axes = NANO_AXES.bind(NANO_12B)
    table = random_table(NANO_12B, axes, monotonic=True)
    elastic = ElasticModel(NANO_12B, axes, tuple(range(62)), table)
    rng = random.Random(4)
    for _ in range(4):
        subnet = Subnet(
            hidden=rng.choice(NANO_AXES.hidden),
            ffn=tuple(rng.choice(NANO_AXES.ffn) for _ in range(28)),
            mamba_heads=(rng.choice(NANO_AXES.mamba_heads),) * 28,
            mamba_head_dim=80,
            attention_heads=(40,) * 6,
            layers=tuple(range(rng.choice(NANO_AXES.depth))),
        )
        check_the_last_unit(elastic, subnet, kind)


def test_the_full_budget_is_the_identity_whatever_the_router_prefers() -> None:
    for seed in range(5):
        router = random_router(elastic_model(("ffn",)), seed)
        assert resolve_budgets(router, budgets_of(None)) == (FULL,)
        assert resolve_budgets(router, budgets_of(FULL_PARAMS)) == (FULL,)
        assert resolve_budgets(router, budgets_of(FULL_PARAMS + 1))[0] == FULL
        for kind in KINDS:
            full = cost_of(kind, ("ffn",)).of(FULL)
            assert resolve_budgets(router, (budget_of(kind, full),)) == (FULL,)
            assert resolve_target(router, (FULL,), budget_of(kind, full)) == FULL
            assert resolve_target(router, (FULL,), budget_of(kind, 2 * full)) == FULL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_a_target_between_budgets_lies_between_their_subnets_and_uses_what_it_may(
    per_layer: tuple[AxisName, ...], kind: Kind
) -> None:
    elastic, counted, rng = elastic_model(per_layer), cost_of(kind, per_layer), random.Random(2)
    for seed in range(8):
        router = random_router(elastic, seed)
        trained = sorted((rng.randint(smallest_params(elastic), FULL_PARAMS) for _ in range(2)), reverse=True)
        resolved = resolve_budgets(router, budgets_of(None, *trained))
        sizes = [counted.of(s) for s in resolved]
        for _ in range(4):
            target = rng.randint(counted.of(resolved[-1]), counted.of(FULL))
            subnet = resolve_target(router, resolved, budget_of(kind, target))
            size = counted.of(subnet)
            assert size <= target
            below = next(i for i, n in enumerate(sizes) if n <= target)
            inner, outer = resolved[below], resolved[max(0, below - 1)]
            assert is_nested(subnet, outer) and is_nested(inner, subnet)
            between = (s for s, _, _ in every_subnet(per_layer) if is_nested(s, outer) and is_nested(inner, s))
            reachable = max(n for n in map(counted.of, between) if n <= target)
            assert size >= int(USED_SHARE * min(target, reachable))
            if reachable >= USED_SHARE * target:
                assert size >= int(USED_SHARE * target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_below_every_budget_is_resolved_inside_the_smallest_of_them(kind: Kind) -> None:
    elastic, counted = elastic_model(("ffn",)), cost_of(kind, ("ffn",))
    smallest = smallest_subnet(MODEL, elastic.axes, RANKING)
    router = random_router(elastic, 6)
    resolved = resolve_budgets(router, budgets_of(None, MIDDLE[0]))
    target = (counted.of(smallest) + counted.of(resolved[1])) // 2
    subnet = resolve_target(router, resolved, budget_of(kind, target))
    assert counted.of(subnet) <= target
    assert is_nested(subnet, resolved[1])


def test_a_target_of_the_exact_size_of_a_resolved_subnet_gives_that_subnet() -> None:
    router = random_router(elastic_model(("ffn",)), 3)
    resolved = resolve_budgets(router, budgets_of(None, *MIDDLE))
    for kind in ("params", "memory"):  # by latency a smaller subnet may take longer here
        for subnet in resolved:
            exact = budget_of(kind, cost_of(kind, ("ffn",)).of(subnet))
            assert resolve_target(router, resolved, exact) == subnet


def test_the_smallest_subnet_can_be_resolved_and_nothing_below_it() -> None:
    elastic = elastic_model()
    smallest, least = smallest_subnet(MODEL, elastic.axes, RANKING), smallest_params(elastic)
    router = random_router(elastic, 4)
    resolved = resolve_budgets(router, budgets_of(None, least))
    assert resolved == (FULL, smallest)
    assert resolve_target(router, resolved, budget_of("params", least)) == smallest
    assert resolve_target(router, (FULL,), budget_of("params", least)) == smallest
    message = (
        f"^budget NAME: {least - 1:,} parameters is below the smallest subnet of these axes, {least:,} parameters; "
        "raise the budget or add smaller choices to the axes$"
    )
    with pytest.raises(ValueError, match=message.replace("NAME", "b1")):
        resolve_budgets(router, budgets_of(None, least - 1))
    with pytest.raises(ValueError, match=message.replace("NAME", "slice")):
        resolve_target(router, resolved, budget_of("params", least - 1, "slice"))


def test_the_same_router_resolves_to_the_same_subnets() -> None:
    elastic = elastic_model(("ffn",))
    for router in (random_router(elastic, 5), Router(elastic, 3, hidden_size=8)):
        router.initialise(torch.Generator().manual_seed(0))  # every choice is equally likely: only order can decide
        budgets = budgets_of(None, *MIDDLE)
        first = resolve_budgets(router, budgets)
        torch.rand(7)
        assert resolve_budgets(router, budgets) == first
        for kind in KINDS:
            target = budget_of(kind, sum(cost_of(kind, ("ffn",)).of(subnet) for subnet in first[:2]) // 2)
            assert resolve_target(router, first, target) == resolve_target(router, first, target)


@pytest.mark.parametrize("pattern", ["M-M-", "-", "**"])
def test_models_without_some_kind_of_layer_resolve(pattern: str) -> None:
    model = ModelConfig(
        hybrid_override_pattern=pattern,
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
    axes = Axes(hidden=(24, 12), depth=(len(pattern), 1) if len(pattern) > 1 else ()).bind(model)
    elastic = ElasticModel(config=model, axes=axes, layer_ranking=tuple(range(len(pattern))))
    target = (smallest_params(elastic) + subnet_params(model, full_subnet(model))) // 2
    for subnet in resolve_budgets(random_router(elastic, 0), budgets_of(None, target))[1:]:
        check_subnet(subnet, model)
        assert subnet_params(model, subnet) <= target


@pytest.mark.parametrize("seed", range(40))
def test_trying_all_combinations_and_solving_for_the_best_agree(seed):
    draw = random.Random(seed)
    rows = [
        [resolve._Option(v, draw.uniform(-5, 0), draw.randrange(10**6), draw.randrange(10**5)) for v in range(choices)]
        for choices in (4, 3, 2, 3)
    ]
    most = draw.randrange(5 * 10**5, 3 * 10**6)
    least = draw.choice([0, most // 2])
    tried, solved = (find(rows, 50_000, least, most) for find in (resolve._enumerated, resolve._solved))
    assert (tried is None) == (solved is None)
    if tried is not None and solved is not None:
        score, other = (sum(option.log_probability for option in picked) for picked in (tried, solved))
        assert other == pytest.approx(score, abs=SOLVER_GAP)
