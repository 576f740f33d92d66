"""A family with experts is ranked, routed, trained and sliced like any other."""

import copy
import dataclasses
import itertools
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from experts import AXES, BUDGETS, CONFIG, RANKING
from safetensors.torch import save_file
from torch import Tensor
from trainee import ALONE

from elastic_core import cost
from elastic_core.budget import Budget, MemoryTarget, Serving
from elastic_core.comparison import compare_orders
from elastic_core.files import checkpoint, shards
from elastic_core.files.reorder import identity_order, reorder_checkpoint, reorder_in_place, write_order
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.geometry import Axes
from elastic_core.importance import importance_order, width_scores
from elastic_core.layers.kernels import TORCH
from elastic_core.layers.kinds import KINDS
from elastic_core.layout import WHOLE
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Distillation, Optimizer, Stage
from elastic_core.resolve import resolve_budgets, resolve_target
from elastic_core.router import ElasticModel, Router, expected_cost, expected_params, soft_subnet
from elastic_core.schema import build, to_dict
from elastic_core.subnet import Subnet, full_subnet, is_nested
from elastic_core.training import job
from elastic_core.training.curriculum import generator
from elastic_core.training.tokens import TokenBatch

FLOAT64 = 1e-12  # rounding of sums in another order


@pytest.fixture(scope="module")
def model() -> ElasticNemotronH:
    made = ElasticNemotronH(CONFIG, "torch")
    made.initialise(generator("model"))
    return made.double()


def batches() -> list[TokenBatch]:
    tokens = torch.randint(CONFIG.vocab_size, (3, 14), generator=generator("tokens"))
    return [TokenBatch(inputs_BT=tokens, targets_BT=tokens, packing=None, learned=tokens.numel())]


def logits(directory: Path, subnet: Subnet | None = None) -> Tensor:
    made = job.load_model(directory, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return made.logits(made(batches()[0].inputs_BT, subnet or full_subnet(made.config)))


ELASTIC = {
    "one width of experts": AXES,
    "one for each layer": dataclasses.replace(AXES, per_layer=("expert_ffn",), top_k=(), latent=()),
}


@pytest.mark.parametrize("axes", ELASTIC.values(), ids=ELASTIC.keys())
def test_the_routers_costs_are_means_over_all_choices_and_its_choices_run_as_their_subnets(model, axes):
    axes = axes.bind(CONFIG)
    elastic = ElasticModel(CONFIG, axes, RANKING)
    rows = [(axis, row) for axis in axes.names for row in range(elastic.rows(axis))]
    probabilities = {
        axis: torch.rand(
            elastic.rows(axis), len(axes.choices(axis)), generator=generator(axis), dtype=torch.float64
        ).softmax(-1)
        for axis in axes.names
    }
    memory = elastic.cost_of(Budget(name="s", memory=MemoryTarget(bytes=10**9, serving=Serving(context=64))))
    params = bytes_ = 0.0
    for number, picked in enumerate(product(*(range(len(axes.choices(axis))) for axis, _ in rows))):
        choice = dict(zip(rows, picked, strict=True))
        one_hot = {
            axis: F.one_hot(
                torch.tensor([choice[axis, row] for row in range(elastic.rows(axis))]), len(axes.choices(axis))
            ).double()
            for axis in axes.names
        }
        subnet, masks = soft_subnet(elastic, one_hot)
        likely = float(torch.stack([probabilities[axis][row, i] for (axis, row), i in choice.items()]).prod())
        params += likely * cost.subnet_params(CONFIG, subnet)
        bytes_ += likely * memory.of(subnet)
        if number % 30 == 0:
            with torch.no_grad():
                masked, prefix = (model(batches()[0].inputs_BT, subnet, m) for m in (masks, None))
            assert float((masked - prefix).abs().max()) <= FLOAT64 * float(prefix.abs().max())
    assert float(expected_params(elastic, probabilities)) == pytest.approx(params, rel=FLOAT64)
    assert float(expected_cost(elastic, probabilities, memory)) == pytest.approx(bytes_, rel=FLOAT64)


@pytest.mark.parametrize("elastic", ELASTIC.values(), ids=ELASTIC.keys())
def test_a_family_with_experts_is_ranked_routed_trained_and_sliced(model, tmp_path: Path, elastic: Axes):
    teacher, tokens = tmp_path / "teacher", tmp_path / "tokens.safetensors"
    checkpoint.write_weights(teacher, CONFIG, model.state_dict(), torch.float32)
    save_file({"tokens": torch.randint(40, (600,), generator=generator("stream"), dtype=torch.int32)}, tokens)
    axes = elastic.bind(CONFIG)
    order = importance_order(CONFIG, width_scores(model, batches()), RANKING, axes)
    router = Router(ElasticModel(CONFIG, axes, RANKING), len(BUDGETS), 8)
    router.initialise(generator("router"))
    described = checkpoint.Family(axes=elastic, budgets=(), layer_ranking=RANKING, lineage={})

    def beside(staging: Path) -> None:
        write_order(staging, order)
        shards.write_tensors(staging / checkpoint.ROUTER_FILE, router.state_dict())
        checkpoint.write_family(staging, job.resolved_family(described, router, BUDGETS))

    reorder_checkpoint(teacher, order, tmp_path / "family", beside=beside)
    work = tmp_path / "work"
    work.mkdir()
    stage = Stage(
        name="stage1",
        sequence_length=12,
        batch_size=6,
        micro_batch_size=2,
        steps=4,
        budgets={"l": 1, "m": 1, "s": 1},
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=2),
        recompute=True,
    )
    settings = job.TrainJob(
        stage=stage,
        distillation=Distillation(),
        student=str(tmp_path / "family"),
        teacher=str(teacher),
        tokens=str(tokens),
        work=str(work),
        output=str(work / "family"),
        dtype="bfloat16",
        seed=0,
        lineage={},
    )
    job.run_job(settings, ALONE)
    family = checkpoint.read_family(work / "family")
    assert build(checkpoint.Family, to_dict(family)) == family
    before, after = (checkpoint.load_weights(path) for path in (tmp_path / "family", work / "family"))
    assert not torch.equal(before["layers.1.mixer.gate.weight"], after["layers.1.mixer.gate.weight"])
    assert {name: weight.dtype for name, weight in after.items() if "gate" in name} == {
        name: torch.float32 for name in after if "gate" in name
    }, "a router keeps the type that it came in"
    for large, small in itertools.pairwise(family.budgets):
        assert is_nested(small.subnet, large.subnet)
    for budget in family.budgets:
        assert budget.budget.target is None or budget.params <= budget.budget.target
        slice_checkpoint(work / "family", budget.subnet, tmp_path / budget.name, ffn_layout="list")
        sliced = checkpoint.load_weights(tmp_path / budget.name)
        assert sum(weight.numel() for weight in sliced.values()) == budget.params
        assert torch.equal(logits(tmp_path / budget.name), logits(work / "family", budget.subnet))
    if elastic.per_layer:
        assert any(len(set(budget.subnet.expert_ffn)) > 1 for budget in family.budgets)


def test_a_family_from_before_the_experts_a_token_were_an_axis_is_read_as_one_that_keeps_them_all(tmp_path: Path):
    config = dataclasses.replace(CONFIG, moe_latent_size=None)
    axes = dataclasses.replace(AXES, top_k=(), latent=())
    model, order = ElasticNemotronH(config, "torch"), identity_order(config)
    router = Router(ElasticModel(config, axes.bind(config), RANKING), len(BUDGETS), 8)
    router.initialise(generator("router"))
    order = dataclasses.replace(order, layers=RANKING)
    unresolved = checkpoint.Family(axes=axes, budgets=(), layer_ranking=RANKING, lineage={})
    written = job.resolved_family(unresolved, router, BUDGETS)

    def beside(staging: Path) -> None:
        write_order(staging, order)
        weights = {name: weight for name, weight in router.state_dict().items() if "top_k" not in name}
        shards.write_tensors(staging / checkpoint.ROUTER_FILE, weights)
        checkpoint.write_family(staging, written)

    checkpoint.write_weights(tmp_path / "family", config, model.state_dict(), torch.float32, beside=beside)
    path = tmp_path / "family" / checkpoint.FAMILY_FILE
    stated = shards.read_json(path)
    assert [budget["subnet"].pop("top_k") for budget in stated["budgets"]] == [2, 2, 2]
    shards.write_json(path, stated)
    family = checkpoint.read_family(tmp_path / "family")
    assert family == written
    read = job.load_router(tmp_path / "family", config, family)
    assert resolve_budgets(read, BUDGETS) == tuple(budget.subnet for budget in family.budgets)


def test_a_budget_of_active_parameters_is_met_and_a_routers_expectation_is_its_mean():
    elastic = ElasticModel(CONFIG, AXES.bind(CONFIG), RANKING)
    axes = elastic.axes
    probabilities = {
        axis: torch.rand(1, len(axes.choices(axis)), generator=generator(axis), dtype=torch.float64).softmax(-1)
        for axis in axes.names
    }
    budget, mean, sizes = Budget(name="s", active_params=6000), 0.0, set[int]()
    for picked in product(*(range(len(axes.choices(axis))) for axis in axes.names)):
        subnet = elastic.subnet({axis: [axes.choices(axis)[i]] for axis, i in zip(axes.names, picked, strict=True)})
        likely = float(torch.stack([probabilities[a][0, i] for a, i in zip(axes.names, picked, strict=True)]).prod())
        mean += likely * cost.active_params(CONFIG, subnet)
        sizes.add(cost.active_params(CONFIG, subnet))
    found = expected_cost(elastic, probabilities, elastic.cost_of(budget))
    assert float(found) == pytest.approx(mean, rel=FLOAT64)

    router = Router(elastic, 2, 8)
    router.initialise(generator("router"))
    large, small = resolve_budgets(router, (Budget(name="l"), budget))
    assert large == full_subnet(CONFIG)
    assert cost.active_params(CONFIG, small) <= 6000 and is_nested(small, large)
    for target in sorted(sizes):
        exact = Budget(name="any", active_params=target)
        assert cost.active_params(CONFIG, resolve_target(router, [large], exact)) <= target
    with pytest.raises(ValueError, match=f"{min(sizes) - 1:,} active parameters is below the smallest subnet"):
        resolve_target(router, [large], Budget(name="any", active_params=min(sizes) - 1))


@pytest.mark.parametrize("axis", ["experts", "latent"])
def test_dropping_by_importance_loses_less_than_at_random(axis: str):
    """Experts of every size, chosen by few tokens and by most, and latent channels of every size, in no order."""
    model = ElasticNemotronH(CONFIG, "torch").double()
    model.initialise(generator("uneven"))
    draw = generator("sizes")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(20 if weight.ndim == 2 else 1)  # of fresh weights, a layer adds next to nothing
            if ".mixer.experts." in name and "down_proj" in name:
                weight.mul_(3 * torch.rand((), generator=draw) ** 2)
            if name.endswith("e_score_correction_bias"):
                weight.normal_(0.0, 0.5, generator=draw)
            if "latent_proj" in name:
                by_channel = 2 * torch.rand(16, generator=draw) ** 2
                weight.mul_(by_channel[:, None] if "fc1" in name else by_channel)
    axes = Axes(**{axis: AXES.choices(axis)}).bind(CONFIG)
    order = importance_order(CONFIG, width_scores(model, batches()), RANKING, axes)
    of_axis = dataclasses.replace(identity_order(CONFIG), **{axis: getattr(order, axis)})
    reorder_in_place(model.state_dict(), of_axis, CONFIG)
    inputs = batches()[0].inputs_BT
    whole = model.logits(model(inputs, full_subnet(CONFIG))).log_softmax(-1)

    def distance(subnet: Subnet) -> float:
        cut = model.logits(model(inputs, subnet)).log_softmax(-1)
        return float(F.kl_div(cut, whole, log_target=True, reduction="none").sum(-1).mean())

    (cut,) = compare_orders(model, axes, RANKING, distance, random_orders=8, generator=generator("orders"))
    assert (cut.axis, cut.size) == (axis, AXES.choices(axis)[-1])
    assert cut.beats_random, cut


def test_an_expert_that_few_tokens_choose_is_dropped_before_one_of_the_same_weights_that_most_choose(model):
    mixer = copy.deepcopy(model.layers[CONFIG.layers_of("E")[0]].mixer)
    x_BTD = torch.randn(1, 200, CONFIG.hidden_size, generator=generator("inputs"), dtype=torch.float64)
    with torch.no_grad():
        for expert in mixer.experts[1:]:
            expert.load_state_dict(mixer.experts[0].state_dict())
        mixer.gate.weight.normal_(0.0, 0.2, generator=generator("gate"))
        mixer.gate.e_score_correction_bias.copy_(torch.linspace(0.5, -0.5, CONFIG.n_routed_experts))
    counts_X = mixer.route(x_BTD[0], WHOLE)[0].flatten().bincount(minlength=CONFIG.n_routed_experts)
    order = KINDS["E"].order(CONFIG, KINDS["E"].added(mixer, x_BTD, TORCH)[0], {})
    assert counts_X[order["experts"]].tolist() == sorted(counts_X.tolist(), reverse=True)


def test_sizes_that_transformers_cannot_multiply_are_no_choices():
    with pytest.raises(ValueError, match=r"axes.expert_ffn=20 is not a multiple of .*=8; nearest valid: 16 or 24"):
        Axes(expert_ffn=(24, 20)).bind(CONFIG)
