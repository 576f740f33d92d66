"""Laws of the ranking of layers: it is the paper's iterative removal, and runs no layer that cannot change it."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import NemotronHForCausalLM

from elastic_core.depth import RemovalTerms, rank_layers
from elastic_core.geometry import ModelConfig
from elastic_core.layers.packing import pack
from elastic_core.model import ElasticNemotronH, Layer
from elastic_core.subnet import full_subnet
from elastic_core.training.tokens import TokenBatch
from tasks.running.devices import dealt, gathered

StockModel = Callable[..., NemotronHForCausalLM]

# The elastic and the stock model run in float32 and add up in different orders.
FLOAT32_SUM = 1e-4
# float64: through the head's Gram matrix, and with the logits written out.
FLOAT64_SUM = 1e-9

NANO_PATTERN = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"


@pytest.fixture(scope="module")
def stock(stock_model: StockModel) -> NemotronHForCausalLM:
    """Weights of a trained model's size, so that no layer drowns the others.

    The head reads little of the upper half of the channels, where the last layer mostly writes.
    """
    model = stock_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if parameter.ndim == 2 else 1.0)
        half = model.config.hidden_size // 2
        model.lm_head.weight[:, half:] *= 0.01
        model.model.layers[-1].mixer.down_proj.weight[:half] *= 0.1
    return model


@pytest.fixture
def elastic(stock: NemotronHForCausalLM, tiny_config: ModelConfig) -> ElasticNemotronH:
    """The same weights; made anew for each test, which may change them."""
    model = ElasticNemotronH(tiny_config, backend="torch")
    model.load_state_dict({name.removeprefix("model."): value for name, value in stock.state_dict().items()})
    return model


def token_batches(config: ModelConfig, count: int, length: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(config.vocab_size, (2, length), generator=generator) for _ in range(count)]


def unpacked(batches: Sequence[Tensor]) -> list[TokenBatch]:
    """The same tokens as rows of one document each."""
    return [TokenBatch(inputs_BT=tokens, targets_BT=tokens, packing=None, learned=tokens.numel()) for tokens in batches]


def ranked(
    model: ElasticNemotronH, batches: list[TokenBatch], smallest_depth: int, devices: int = 1, **options: Any
) -> tuple[int, ...]:
    """The ranking, the batches dealt to as many devices."""
    shares = [RemovalTerms(model, share) for share in dealt(batches, devices)]

    def terms(groups: range, candidates: Sequence[int], remaining: Sequence[int]) -> list[list[float]]:
        return gathered([share.on(groups, candidates, remaining) for share in shares])

    return rank_layers(model.config, smallest_depth, terms, -(-len(batches) // devices), **options)


def random_model(config: ModelConfig, seed: int, spread: float) -> ElasticNemotronH:
    """Weights that keep activations at one size, and layers that weigh by a log-normal factor."""
    generator = torch.Generator().manual_seed(seed)
    model = ElasticNemotronH(config, backend="torch").requires_grad_(False)
    model.initialise(generator)
    model.embeddings.weight.normal_(0, 1, generator=generator)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        factor = math.exp(spread * torch.randn((), generator=generator).item()) / math.sqrt(config.num_layers)
        for name, weight in layer.mixer.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
                weight.mul_(factor if name.startswith(("out_proj", "o_proj", "down_proj")) else 1.0)
    return model


def whole_sums(model: ElasticNemotronH, batches: Sequence[Tensor], smallest_depth: int) -> tuple[int, ...]:
    """Iterative removal with every candidate's whole sum, on logits that are written out."""
    full, attention = full_subnet(model.config), set(model.config.layers_of("*"))

    def logits(layers: Sequence[int]) -> Tensor:
        return torch.cat([model.logits(model(tokens, replace(full, layers=tuple(layers)))) for tokens in batches])

    remaining, removed, whole = list(full.layers), list[int](), logits(full.layers)
    while len(remaining) > smallest_depth:
        lost = {j: float((whole - logits([i for i in remaining if i != j])).square().sum()) for j in remaining}
        for a, b in itertools.pairwise(sorted(lost.values())):
            assert 1 - a / b > FLOAT64_SUM, "the scores must be far enough apart to tell"
        removed.append(min((j for j in remaining if attention & set(remaining) != {j}), key=lambda j: lost[j]))
        remaining.remove(removed[-1])
    return (*remaining, *reversed(removed))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_dropped_early_changes_no_order(tiny_config: ModelConfig, seed: int) -> None:
    model = random_model(tiny_config, seed, spread=0.5).double()
    batches = token_batches(tiny_config, count=5, length=6)
    expected = whole_sums(model, batches, 1)
    assert ranked(model, unpacked(batches), 1) == ranked(model, unpacked(batches), 1, devices=2) == expected


def test_a_round_of_62_layers_and_64_batches_runs_a_quarter_of_the_layers_at_most(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against every candidate on every batch, the layers before it shared: 62 + 61 + ... + 1 runs a batch."""
    config = replace(tiny_config, hybrid_override_pattern=NANO_PATTERN)
    runs = count_runs(monkeypatch)
    measured = RemovalTerms(random_model(config, 0, spread=0.5), unpacked(token_batches(config, 64, length=2)))
    runs.clear()
    rank_layers(config, 61, measured.on, 64)
    assert 4 * len(runs) <= 64 * 62 * 63 / 2


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that run from now on."""
    runs, run = list[int](), Layer.forward

    def forward(self: Layer, *args: Any) -> Tensor:
        runs.append(self.index)
        return run(self, *args)

    monkeypatch.setattr(Layer, "forward", forward)
    return runs


def test_nothing_is_measured_where_every_subnet_keeps_every_layer(tiny_config: ModelConfig) -> None:
    def terms(*_: Any) -> list[list[float]]:
        raise AssertionError("something was measured")

    assert rank_layers(tiny_config, tiny_config.num_layers, terms, 3) == tuple(range(tiny_config.num_layers))


def test_an_interrupted_ranking_goes_on_after_its_last_whole_round(
    elastic: ElasticNemotronH, tiny_config: ModelConfig
) -> None:
    batches, rounds = unpacked(token_batches(tiny_config, count=2)), list[list[int]]()
    expected = ranked(elastic, batches, 4, on_removed=lambda removed: rounds.append(list(removed)))
    assert [len(removed) for removed in rounds] == [1, 2, 3, 4]
    later = list[list[int]]()
    assert ranked(elastic, batches, 4, removed=rounds[1], on_removed=lambda r: later.append(list(r))) == expected
    assert later == rounds[2:]


def test_a_model_whose_numbers_are_not_finite_is_not_ranked(
    elastic: ElasticNemotronH, tiny_config: ModelConfig
) -> None:
    with torch.no_grad():
        elastic.norm_f.weight[0] = math.inf
    with pytest.raises(ValueError, match="without layer 0 the teacher's last hidden states are not finite"):
        ranked(elastic, unpacked(token_batches(tiny_config, count=1)), 4)


def test_packed_documents_are_ranked_by_as_each_of_them_alone(
    elastic: ElasticNemotronH, tiny_config: ModelConfig
) -> None:
    text = token_batches(tiny_config, count=1)[0][:1]
    lengths = [3, 1, text.shape[1] - 4]
    packing = pack(torch.arange(3).repeat_interleave(torch.tensor(lengths))[None])
    together = [TokenBatch(inputs_BT=text, targets_BT=text, packing=packing, learned=text.numel())]
    alone = unpacked(text.split(lengths, dim=1))
    assert ranked(elastic, together, 1) == ranked(elastic, alone, 1) != ranked(elastic, unpacked([text]), 1)


def slow_rank_layers(
    stock: NemotronHForCausalLM, config: ModelConfig, batches: Sequence[Tensor], smallest_depth: int
) -> tuple[tuple[int, ...], float]:
    """Iterative removal on the stock model's logits, and the least relative gap of two scores."""
    layers, attention = list(stock.model.layers), set(config.layers_of("*"))

    def logits(kept: Sequence[int]) -> Tensor:
        stock.model.layers = nn.ModuleList([layers[i] for i in kept])
        with torch.no_grad():
            found = torch.cat([stock(tokens).logits.double() for tokens in batches])
        stock.model.layers = nn.ModuleList(layers)
        return found

    remaining, removed, gaps = list(range(len(layers))), list[int](), list[float]()
    full = logits(remaining)
    while len(remaining) > smallest_depth:
        scores = {
            j: float((full - logits([i for i in remaining if i != j])).square().sum() / full.square().sum())
            for j in remaining
        }
        rising = sorted(remaining, key=lambda j: scores[j])
        gaps += [1 - scores[a] / scores[b] for a, b in itertools.pairwise(rising)]
        least = next(j for j in rising if attention & set(remaining) != {j})
        remaining.remove(least)
        removed.append(least)
    return (*remaining, *reversed(removed)), min(gaps)


@pytest.mark.parametrize("smallest_depth", [1, 4])
def test_depth_ranking_is_iterative_removal_on_the_stock_models_logits(
    elastic: ElasticNemotronH, stock: NemotronHForCausalLM, tiny_config: ModelConfig, smallest_depth: int
) -> None:
    batches = token_batches(tiny_config, count=2)
    expected, gap = slow_rank_layers(stock, tiny_config, batches, smallest_depth)
    assert gap > FLOAT32_SUM, "the scores must be far enough apart for float32 to tell"
    assert ranked(elastic, unpacked(batches), smallest_depth) == expected


def test_ranking_is_a_permutation_whose_tail_does_not_depend_on_where_removal_stops(
    elastic: ElasticNemotronH, tiny_config: ModelConfig
) -> None:
    batches = token_batches(tiny_config, count=1)
    to_the_end = ranked(elastic, unpacked(batches), 1)
    for smallest_depth in range(1, 9):
        ranking = ranked(elastic, unpacked(batches), smallest_depth)
        assert sorted(ranking) == list(range(8))
        assert ranking[smallest_depth:] == to_the_end[smallest_depth:]


@pytest.mark.parametrize(("layer", "projection"), [(0, "out_proj"), (5, "out_proj"), (1, "down_proj"), (3, "o_proj")])
@pytest.mark.parametrize("smallest_depth", [3, 7])
def test_a_layer_that_adds_nothing_is_ranked_last(
    elastic: ElasticNemotronH, tiny_config: ModelConfig, layer: int, projection: str, smallest_depth: int
) -> None:
    with torch.no_grad():
        getattr(elastic.layers[layer].mixer, projection).weight.zero_()
    assert ranked(elastic, unpacked(token_batches(tiny_config, count=1)), smallest_depth)[-1] == layer


def test_the_last_attention_layer_stays(elastic: ElasticNemotronH, tiny_config: ModelConfig) -> None:
    attention = tiny_config.layers_of("*")
    with torch.no_grad():
        for layer in attention:
            elastic.layers[layer].mixer.o_proj.weight.zero_()
    for smallest_depth in (1, 2, 4):
        kept = ranked(elastic, unpacked(token_batches(tiny_config, count=1)), smallest_depth)[:smallest_depth]
        assert len(set(kept) & set(attention)) == 1


def test_ranking_leaves_the_model_as_it_was(elastic: ElasticNemotronH, tiny_config: ModelConfig) -> None:
    before = {name: value.clone() for name, value in elastic.state_dict().items()}
    ranked(elastic, unpacked(token_batches(tiny_config, count=1)), 6)
    assert all(torch.equal(before[name], value) for name, value in elastic.state_dict().items())
    assert all(parameter.grad is None for parameter in elastic.parameters())
