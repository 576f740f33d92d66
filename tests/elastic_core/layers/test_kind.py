"""A layer kind is one file: a gated MLP, registered here, obeys the laws of ranking, routing, training and slicing."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from trainee import ALONE, STAGE, train_job

from elastic_core import cost, geometry
from elastic_core.budget import Budget, Serving
from elastic_core.depth import RemovalTerms, rank_layers
from elastic_core.files import checkpoint, shards
from elastic_core.files.reorder import reorder_checkpoint, reorder_weights, write_order
from elastic_core.files.slicing import slice_checkpoint, slice_weights, target_config
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.importance import importance_order, width_scores
from elastic_core.layers.kind import Flops, Kind, LayerShape, Mixer, ServingStep, Training, descending
from elastic_core.layers.kinds import KINDS
from elastic_core.layout import Layout, grid
from elastic_core.model import ElasticNemotronH
from elastic_core.planning.flops import forward_flops
from elastic_core.resolve import resolve_budgets
from elastic_core.router import ElasticModel, Router, expected_params, soft_subnet
from elastic_core.schema import build, to_dict
from elastic_core.subnet import Subnet, full_subnet, is_nested
from elastic_core.training import job
from elastic_core.training.curriculum import generator
from elastic_core.training.tokens import TokenBatch

FLOAT64 = 1e-12  # rounding of sums in another order
GATED = "G"


class GatedMLP(Mixer):
    """down(silu(gate(x)) * up(x)); gate and up are one matrix, [gate, up]."""

    residual = "down_proj.weight"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        width = config.ffn_sizes[config.ordinal(layer)]
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    @staticmethod
    def lay_out(model: ModelConfig, layer: int) -> dict[str, Layout]:
        hidden, neurons = grid(hidden=model.hidden_size), grid(ffn=model.ffn_sizes[model.ordinal(layer)])
        return {
            "gate_up_proj.weight": Layout((neurons, neurons), (hidden,)),
            "down_proj.weight": Layout((hidden,), (neurons,)),
        }

    def components(self, x_BTD, weights, kept, soft, cache, backend, packing) -> Tensor:
        gate, up = F.linear(x_BTD, weights["gate_up_proj.weight"]).chunk(2, dim=-1)
        h_BTF = F.silu(gate) * up
        if soft is not None:
            h_BTF = h_BTF * soft["ffn"].to(h_BTF.dtype)
        return h_BTF


class GatedKind(Kind):
    letter, mixer = GATED, GatedMLP

    def width(self, model: ModelConfig) -> tuple[str, object]:
        return "gated width", model.intermediate_size

    def activations(self, mixer: Mixer, normed_BTD: Tensor, *, signed: bool) -> Tensor:
        gate, up = F.linear(normed_BTD, mixer.gate_up_proj.weight).chunk(2, dim=-1)
        return (F.silu(gate) * up).abs().sum((0, 1))

    def order(self, model: ModelConfig, scores: Tensor, kept: Mapping[str, int]) -> dict[str, Tensor]:
        return {"ffn": descending(scores)}

    def serving_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        return serving.rows * (4 * shape.width + shape.hidden) * serving.width

    def saved_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        return (5 if step.masked else 4) * step.width * shape.width

    def gradient_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        return step.width * 4 * shape.width

    def flops(self, model: ModelConfig, shape: LayerShape, tokens: int, *, last_projection: bool) -> Flops:
        return Flops(projections=(3 if last_projection else 2) * 2 * tokens * shape.hidden * shape.width)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(geometry.KIND_NAMES, GATED, "gated MLP")
    monkeypatch.setitem(geometry.LAYER_AXES, GATED, ("ffn",))
    monkeypatch.setitem(KINDS, GATED, GatedKind())


AXES = Axes(
    hidden=(24, 16), ffn=(20, 12, 8), mamba_heads=(8, 4), mamba_head_dim=(4, 2), attention_heads=(4, 2), depth=(5, 4)
)
BUDGETS = (Budget(name="l"), Budget(name="m", params=9000), Budget(name="s", params=6000))


@pytest.fixture
def config(registered: None) -> ModelConfig:
    return ModelConfig(
        hybrid_override_pattern="MG*GM",
        hidden_size=24,
        intermediate_size=20,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        mamba_num_heads=8,
        mamba_head_dim=4,
        ssm_state_size=4,
        n_groups=2,
        vocab_size=40,
        chunk_size=8,
    )


@pytest.fixture
def model(config: ModelConfig) -> ElasticNemotronH:
    made = ElasticNemotronH(config, "torch")
    made.initialise(generator("model"))
    return made.double()


def batches(config: ModelConfig) -> list[TokenBatch]:
    tokens = torch.randint(config.vocab_size, (3, 14), generator=generator("tokens"))
    return [TokenBatch(inputs_BT=tokens, targets_BT=tokens, packing=None, learned=tokens.numel())]


def logits(weights: Mapping[str, Tensor], config: ModelConfig, subnet: Subnet | None = None, masks=None) -> Tensor:
    made = ElasticNemotronH(config, "torch").double()
    made.load_state_dict(dict(weights))
    with torch.no_grad():
        return made.logits(made(batches(config)[0].inputs_BT, subnet or full_subnet(config), masks))


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= FLOAT64 * float(expected.abs().max())


def subnets(config: ModelConfig) -> Iterator[Subnet]:
    for hidden, ffn, heads, head_dim, queries in product((24, 16), (20, 8), (8, 4), (4, 2), (4, 2)):
        for layers in ((0, 1, 2, 3, 4), (1, 2, 4)):
            yield Subnet(
                hidden=hidden,
                ffn=(ffn, 12),
                mamba_heads=(heads,) * 2,
                mamba_head_dim=head_dim,
                attention_heads=(queries,),
                layers=layers,
            )


def ranked(model, config):
    read = batches(config)
    return rank_layers(config, 4, RemovalTerms(model, read).on, len(read))


def test_ranking_puts_dead_neurons_last_and_reordering_keeps_the_function(model, config):
    with torch.no_grad():
        for layer in config.layers_of(GATED):
            model.layers[layer].mixer.gate_up_proj.weight[20 + 7] = 0.0  # of the second part, [gate, up]
    scores = width_scores(model, batches(config))
    order = importance_order(config, scores, ranked(model, config), AXES.bind(config))
    assert [int(entry[-1]) for entry in order.ffn] == [7, 7]
    weights = model.state_dict()
    reordered = reorder_weights(weights, order, config)
    assert_same(logits(reordered, config), logits(weights, config))
    mixer, first = "layers.1.mixer.gate_up_proj.weight", int(order.ffn[0][0])
    assert torch.equal(reordered[mixer][20], weights[mixer][20 + first][order.hidden])


def test_every_subnet_is_what_its_slice_is_and_costs_what_its_slice_holds(model, config):
    for subnet in subnets(config):
        sliced = slice_weights(model.state_dict(), subnet, config, ffn_layout="list")
        assert_same(
            logits(sliced, target_config(config, subnet, ffn_layout="list")), logits(model.state_dict(), config, subnet)
        )
        assert cost.subnet_params(config, subnet) == sum(weight.numel() for weight in sliced.values())


def test_the_router_weighs_it_as_any_other_and_its_costs_are_means_over_all_choices(model, config):
    elastic = ElasticModel(config, AXES.bind(config), (0, 2, 1, 4, 3))
    probabilities = {
        axis: torch.rand(1, len(AXES.choices(axis)), generator=generator(axis), dtype=torch.float64).softmax(-1)
        for axis in Axes.NAMES
    }
    mean, total = expected_params(elastic, probabilities), 0.0
    for picked in product(*(range(len(AXES.choices(axis))) for axis in Axes.NAMES)):
        one_hot = {
            a: F.one_hot(torch.tensor([i]), len(AXES.choices(a))).double()
            for a, i in zip(Axes.NAMES, picked, strict=True)
        }
        subnet, masks = soft_subnet(elastic, one_hot)
        likely = float(torch.stack([probabilities[a][0, i] for a, i in zip(Axes.NAMES, picked, strict=True)]).prod())
        total += likely * cost.subnet_params(config, subnet)
        if sum(picked) % 5 == 0:
            weights = model.state_dict()
            assert_same(logits(weights, config, subnet, masks), logits(weights, config, subnet))
    assert float(mean) == pytest.approx(total, rel=FLOAT64)


def test_a_family_with_it_is_ranked_routed_trained_and_sliced(model, config, tmp_path: Path):
    teacher, tokens = tmp_path / "teacher", tmp_path / "tokens.safetensors"
    checkpoint.write_weights(teacher, config, model.state_dict(), torch.float32)
    assert checkpoint.read_config(teacher) == config
    save_file({"tokens": torch.randint(40, (600,), generator=generator("stream"), dtype=torch.int32)}, tokens)
    axes, ranking = AXES.bind(config), ranked(model, config)
    order = importance_order(config, width_scores(model, batches(config)), ranking, axes)
    router = Router(ElasticModel(config, axes, ranking), len(BUDGETS), 8)
    router.initialise(generator("router"))
    described = checkpoint.Family(axes=AXES, budgets=(), layer_ranking=ranking, lineage={})

    def beside(staging: Path) -> None:
        write_order(staging, order)
        shards.write_tensors(staging / checkpoint.ROUTER_FILE, router.state_dict())
        checkpoint.write_family(staging, job.resolved_family(described, router, BUDGETS))

    reorder_checkpoint(teacher, order, tmp_path / "family", beside=beside)
    work, stage = tmp_path / "work", dataclasses.replace(STAGE, steps=6, recompute=True)
    job.run_job(train_job(tmp_path / "family", tokens, work, stage=stage), ALONE)
    family = checkpoint.read_family(work / "family")
    before, after = (
        checkpoint.load_weights(path)["layers.1.mixer.gate_up_proj.weight"]
        for path in (tmp_path / "family", work / "family")
    )
    assert not torch.equal(before, after)
    for large, small in itertools.pairwise(family.budgets):
        assert is_nested(small.subnet, large.subnet)
    for budget in family.budgets:
        assert budget.budget.target is None or budget.params <= budget.budget.target
        slice_checkpoint(work / "family", budget.subnet, tmp_path / budget.name)
        whole, alone = (
            job.load_model(path, torch.device("cpu"), torch.float32)
            for path in (work / "family", tmp_path / budget.name)
        )
        assert sum(weight.numel() for weight in alone.parameters()) == budget.params
        with torch.no_grad():
            expected = whole(batches(config)[0].inputs_BT, budget.subnet)
            assert torch.equal(alone(batches(config)[0].inputs_BT, full_subnet(alone.config)), expected)
    assert build(checkpoint.Family, to_dict(family)) == family


def test_its_memory_its_operations_and_its_latency_are_counted(config):
    gated = dataclasses.replace(full_subnet(config), layers=config.layers_of(GATED))
    assert forward_flops(config, gated, 10).projections == 2 * (3 * 2 * 10 * 24 * 20)
    counted = cost.MemoryCost(model=config, serving=Serving(context=16), prefill=8)
    assert counted.layer(LayerShape(kind=GATED, hidden=24, width=20)) == 2 * (24 + 3 * 24 * 20)
    assert {shape.width for shape in cost.choices(config, AXES.bind(config), GATED)} == {20, 12, 8}


def test_budgets_resolve_to_nested_subnets_with_a_width_a_layer(config):
    axes = dataclasses.replace(AXES, per_layer=("ffn",)).bind(config)
    router = Router(ElasticModel(config, axes, (0, 2, 1, 4, 3)), len(BUDGETS), 8)
    router.initialise(generator("router"))
    found = resolve_budgets(router, BUDGETS)
    assert all(len(subnet.ffn) == 2 for subnet in found)
    assert all(is_nested(small, large) for large, small in itertools.pairwise(found))


def test_two_kinds_of_one_width_in_a_model_are_refused(config):
    with pytest.raises(ValueError, match="has two kinds of one width axis"):
        dataclasses.replace(config, hybrid_override_pattern="MG*-M")
