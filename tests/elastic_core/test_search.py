"""Laws of the search for shapes: nested, within their budgets, and as good as trying everything."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from nano import NANO_12B

from elastic_core.budget import Budget, MemoryTarget, Serving
from elastic_core.cost import subnet_params
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.resolve import resolve_budgets
from elastic_core.router import ElasticModel, Router
from elastic_core.search import Candidate, CutLoss, Space, loss_table, prior, search
from elastic_core.subnet import Subnet, full_subnet, is_nested
from elastic_core.training.tokens import IGNORED, TokenBatch

MODEL = ModelConfig(
    hybrid_override_pattern="M-M*-M-*",
    hidden_size=32,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    vocab_size=64,
    chunk_size=8,
)
AXES = Axes(
    hidden=(32, 28, 24, 20),
    ffn=(96, 80, 64, 48),
    mamba_heads=(8, 6, 4),
    mamba_head_dim=(8, 6),
    attention_heads=(4, 2),
    depth=(8, 7, 6),
)
RANKING = (0, 4, 3, 1, 6, 5, 2, 7)
FULL_PARAMS = subnet_params(MODEL, full_subnet(MODEL))
BUDGETS = (Budget(name="l"), Budget(name="m", params=3 * FULL_PARAMS // 4), Budget(name="s", params=FULL_PARAMS // 2))
# What the search may miss of the best nested shapes, in geometric mean loss.
MISSED = 1.05
# The same float64 products, whose terms are added up in another order.
FLOAT64_SUM = 1e-12
# A float32 weight that a pseudo-inverse gave, over logits of a few units.
LEAST_SQUARES = 1e-5


def elastic_model() -> ElasticModel:
    return ElasticModel(MODEL, AXES.bind(MODEL), RANKING)


def all_subnets(elastic: ElasticModel) -> list[Subnet]:
    space = Space(elastic)
    return [space.subnet(point) for point in itertools.product(*(range(len(space.choices(a))) for a, _ in space.rows))]


def random_loss(elastic: ElasticModel, seed: int) -> Callable[[Subnet], float]:
    """A loss that grows with every cut, where cuts of two axes together lose more, or less, than both alone."""
    draw, space = random.Random(seed), Space(elastic)
    weight = [draw.lognormvariate(0, 1) for _ in space.rows]
    pairs = {pair: draw.uniform(-0.6, 2.0) for pair in itertools.combinations(range(len(space.rows)), 2)}
    power = [draw.uniform(1.0, 2.0) for _ in space.rows]

    def loss(subnet: Subnet) -> float:
        cut = [
            weight[i] * (1 - space.choices(axis)[p] / space.choices(axis)[0]) ** power[i]
            for i, ((axis, _), p) in enumerate(zip(space.rows, space.point(subnet), strict=True))
        ]
        return sum(cut) + sum(w * min(cut[a], cut[b]) for (a, b), w in pairs.items())

    return loss


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_nested_shapes_that_trying_all_of_them_finds(seed):
    elastic, loss = elastic_model(), random_loss(elastic_model(), seed)
    cost = elastic.cost_of(BUDGETS[1])
    within = {b.name: [s for s in all_subnets(elastic) if cost.of(s) <= (b.target or 0)] for b in BUDGETS[1:]}
    best = min(math.log(loss(m)) + math.log(loss(s)) for m in within["m"] for s in within["s"] if is_nested(s, m))
    scores = prior(elastic, loss)
    found = search(elastic, BUDGETS, loss, [[scores]] * 3)
    full, m, s = found.chosen
    assert full.subnet == full_subnet(MODEL)
    assert is_nested(s.subnet, m.subnet)
    assert cost.of(m.subnet) <= BUDGETS[1].params and cost.of(s.subnet) <= BUDGETS[2].params
    assert math.exp((math.log(m.loss) + math.log(s.loss) - best) / 2) <= MISSED
    assert len(found.measured[1]) + len(found.measured[2]) < len(within["m"]) + len(within["s"])


def test_a_point_is_its_subnet_and_a_subnet_its_point():
    space = Space(elastic_model())
    for subnet in all_subnets(space.elastic):
        assert space.subnet(space.point(subnet)) == subnet


def test_neighbours_fit_and_none_of_them_could_grow_into_another():
    elastic = elastic_model()
    space, cost = Space(elastic), elastic.cost_of(BUDGETS[1])

    def fits(subnet: Subnet) -> bool:
        return cost.of(subnet) <= 3 * FULL_PARAMS // 4

    start = next(s for s in all_subnets(elastic) if fits(s))
    around = space.neighbours(start, fits)
    assert around and start not in around and all(map(fits, around))


def test_the_prior_has_the_loss_of_every_single_cut():
    elastic, loss = elastic_model(), random_loss(elastic_model(), 3)
    scores = prior(elastic, loss)
    assert {axis: table.shape[1] for axis, table in scores.items()} == {a: len(AXES.choices(a)) for a in Axes.NAMES}
    assert all(float(table[0, 0]) == 0.0 for table in scores.values())
    narrow = Space(elastic).subnet([1, 0, 0, 0, 0, 0])
    assert float(scores["hidden"][0, 1]) == -loss(narrow)


@pytest.mark.services
@pytest.mark.slow
def test_62_layers_with_an_ffn_width_each_are_searched_within_the_planned_measurements_and_beat_the_router():
    axes = Axes(
        hidden=(5120, 4480, 3840), ffn=(20480, 15680, 12288, 10240), mamba_heads=(128, 112, 96), depth=(62, 58, 54),
        per_layer=("ffn",),
    )  # fmt: skip
    elastic = ElasticModel(NANO_12B, axes.bind(NANO_12B), tuple(range(62)))
    budgets = (Budget(name="12b"), Budget(name="9b", params=8_900_000_000), Budget(name="6b", params=6_600_000_000))
    router = Router(elastic, 3, 16)
    router.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(parameter.numel()))
    loss, measured = random_loss(elastic, 1), []

    def counted(subnet: Subnet) -> float:
        measured.append(subnet)
        return loss(subnet)

    alone = resolve_budgets(router, budgets)
    favourites = [{axis: p.log_softmax(-1) for axis, p in router(router.one_hot(i)).items()} for i in range(3)]
    scores = prior(elastic, loss)
    with torch.no_grad():
        found = search(elastic, budgets, counted, [[scores, f] for f in favourites], measurements=150)
    assert len(measured) == len(set(measured)) <= 150
    assert is_nested(found.chosen[2].subnet, found.chosen[1].subnet)
    objective = math.log(found.chosen[1].loss) + math.log(found.chosen[2].loss)
    assert objective <= math.log(loss(alone[1])) + math.log(loss(alone[2]))


def test_a_cut_loses_the_kl_of_the_teacher_to_it_over_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    teacher = ElasticNemotronH(MODEL, backend="torch").double().requires_grad_(False)
    teacher.initialise(generator)
    inputs_BT, targets_BT = (torch.randint(64, (2, 9), generator=generator) for _ in range(2))
    targets_BT[0, :4] = IGNORED
    counts = targets_BT != IGNORED
    batch = TokenBatch(inputs_BT=inputs_BT, targets_BT=targets_BT, packing=None, learned=int(counts.sum()))
    loss, full = CutLoss(teacher, [batch, batch]), full_subnet(MODEL)
    cut = Space(elastic_model()).subnet([2, 1, 1, 1, 1, 1])
    p, q = (teacher.logits(teacher(inputs_BT, subnet)).log_softmax(-1) for subnet in (full, cut))
    plain = ((p.exp() * (p - q)).sum(-1) * counts).sum() / counts.sum()
    assert loss.tokens == 2 * 14
    assert loss(cut) == pytest.approx(float(plain), rel=FLOAT64_SUM)
    assert loss(full) == pytest.approx(0.0, abs=FLOAT64_SUM)


def test_rows_of_which_nothing_is_learned_measure_no_cut():
    tokens_BT = torch.zeros(1, 5, dtype=torch.long)
    batch = TokenBatch(inputs_BT=tokens_BT, targets_BT=tokens_BT + IGNORED, packing=None, learned=0)
    with pytest.raises(ValueError, match=r"shapes\.samples: no token of the sequences is learned"):
        CutLoss(ElasticNemotronH(MODEL, backend="torch"), [batch])


def test_a_router_that_imitates_has_the_chosen_subnet_for_its_favourite_and_resolves_to_it():
    elastic, loss = elastic_model(), random_loss(elastic_model(), 5)
    found = search(elastic, BUDGETS, loss, [[prior(elastic, loss)]] * 3)
    router = Router(elastic, 3, 16)
    router.initialise(torch.Generator().manual_seed(1))
    tables = [loss_table(elastic, chosen, seen) for chosen, seen in zip(found.chosen, found.measured, strict=True)]
    router.imitate(tables)
    for index, (chosen, table) in enumerate(zip(found.chosen, tables, strict=True)):
        logits = router(router.one_hot(index))
        for axis, wanted in table.items():
            torch.testing.assert_close(logits[axis].double(), wanted.double(), atol=LEAST_SQUARES, rtol=0)
        favourite = [int(logits[axis][row].argmax()) for axis, row in Space(elastic).rows]
        assert Space(elastic).subnet(favourite) == chosen.subnet
    assert resolve_budgets(router, BUDGETS) == tuple(chosen.subnet for chosen in found.chosen)


def test_a_table_ranks_choices_by_the_best_subnet_that_was_measured_with_them():
    space = Space(elastic_model())
    here, near, far = (
        Candidate(subnet=space.subnet(point), cost=0, loss=loss)
        for point, loss in (([1, 1, 1, 1, 1, 1], 0.1), ([2, 1, 1, 1, 1, 1], 0.11), ([3, 0, 1, 1, 1, 1], 0.2))
    )
    table = loss_table(space.elastic, here, [here, near, far])
    unmeasured, chosen, near_to, far_from = table["hidden"][0].tolist()
    assert chosen == 0
    assert near_to == pytest.approx(-math.log(1.1))
    assert far_from == pytest.approx(-math.log(2))
    assert unmeasured < far_from
    assert float(table["ffn"][0, 0]) == pytest.approx(-math.log(2))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_budgets_of_several_kinds_get_nested_subnets_within_them_or_a_reason(seed, share):
    elastic, loss = elastic_model(), random_loss(elastic_model(), seed)
    full = full_subnet(MODEL)
    serving = MemoryTarget(bytes=1, serving=Serving(context=64, dtype="bfloat16"))
    most = int(share * elastic.cost_of(Budget(name="m", memory=serving)).of(full))
    budgets = (
        Budget(name="l"),
        Budget(name="m", memory=replace(serving, bytes=most)),
        Budget(name="s", params=int(0.6 * FULL_PARAMS)),
    )
    try:
        found = search(elastic, budgets, loss, [[prior(elastic, loss)]] * 3)
    except ValueError as error:
        assert "nested" in str(error) or "smallest" in str(error)
        return
    for inner, outer in itertools.pairwise(reversed(found.chosen)):
        assert is_nested(inner.subnet, outer.subnet)
    for budget, chosen in zip(budgets[1:], found.chosen[1:], strict=True):
        assert elastic.cost_of(budget).of(chosen.subnet) <= budget.target


def test_every_chosen_subnet_was_measured_however_few_measurements_there_are():
    elastic, loss = elastic_model(), random_loss(elastic_model(), 2)
    found = search(elastic, BUDGETS, loss, [[prior(elastic, loss)]] * 3, measurements=1)
    assert all(math.isfinite(candidate.loss) for seen in found.measured for candidate in seen)
    assert all(chosen in seen for chosen, seen in zip(found.chosen, found.measured, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_no_neighbour_within_the_budget_loses_less_than_what_a_hovering_router_is_resolved_to(seed):
    elastic, loss = elastic_model(), random_loss(elastic_model(), seed)
    cost, generator = elastic.cost_of(BUDGETS[2]), torch.Generator().manual_seed(seed)
    scores = prior(elastic, loss)
    for _ in range(20):
        hovering = {axis: table + torch.rand(table.shape, generator=generator) for axis, table in scores.items()}
        share = float(torch.empty(()).uniform_(0.45, 0.8, generator=generator))
        most = int(FULL_PARAMS * share)
        (chosen,) = search(elastic, (Budget(name="s", params=most),), loss, [[hovering]]).chosen
        fits = [subnet for subnet in all_neighbours(elastic, chosen.subnet) if cost.of(subnet) <= most]
        assert chosen.loss <= MISSED * min(map(loss, fits), default=math.inf)


def all_neighbours(elastic: ElasticModel, subnet: Subnet) -> list[Subnet]:
    """Every subnet that differs by at most one step on two axes."""
    space, here = Space(elastic), Space(elastic).point(subnet)
    moved = [[0, *steps] for steps in ([-1, 1],) * len(here)]
    found = []
    for step in itertools.product(*moved):
        point = [position + move for position, move in zip(here, step, strict=True)]
        sizes = [len(space.choices(axis)) for axis, _ in space.rows]
        if sum(map(abs, step)) <= 2 and all(0 <= p < size for p, size in zip(point, sizes, strict=True)):
            found.append(space.subnet(point))
    return found
