"""Laws of importance: width scores agree with the paper's formulas on the stock model, written out slowly."""

import typing
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import NemotronHForCausalLM

from elastic_core.files.reorder import check_order
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.importance import WidthScores, importance_order, width_scores
from elastic_core.layers.packing import pack
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Scores
from elastic_core.training.tokens import TokenBatch

StockModel = Callable[..., NemotronHForCausalLM]

# Both models run in float32 and add up in different orders; signed Mamba sums cancel by some ten times.
FLOAT32_SUM = 1e-4
# The same float32 activations, added up in float64 in another order: only the models' matrix products may differ.
FLOAT32_BATCHING = 1e-5


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


def token_batches(config: ModelConfig, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(config.vocab_size, (2, 11), generator=generator) for _ in range(count)]


def unpacked(batches: Sequence[Tensor]) -> list[TokenBatch]:
    """The same tokens as rows of one document each."""
    return [TokenBatch(inputs_BT=tokens, targets_BT=tokens, packing=None, learned=tokens.numel()) for tokens in batches]


def last_projection(block: nn.Module) -> nn.Linear:
    names = ("out_proj", "o_proj", "down_proj")
    return next(getattr(block.mixer, name) for name in names if hasattr(block.mixer, name))


def record_activations(
    stock: NemotronHForCausalLM, config: ModelConfig, batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What each layer's norm gives, its first projection gives and its last one takes, in float64, one row a token."""
    normed: list[list[Tensor]] = [[] for _ in stock.model.layers]
    projected: list[list[Tensor]] = [[] for _ in stock.model.layers]
    parts: list[list[Tensor]] = [[] for _ in stock.model.layers]

    def keep_in(rows: list[Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: rows.append(output.double().flatten(0, -2))

    def keep_input(rows: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _module, inputs: rows.append(inputs[0].double().flatten(0, -2))

    hooks = []
    for layer, block in enumerate(stock.model.layers):
        first = {"M": "in_proj", "*": "q_proj", "-": "up_proj"}[config.hybrid_override_pattern[layer]]
        hooks.append(block.norm.register_forward_hook(keep_in(normed[layer])))
        hooks.append(getattr(block.mixer, first).register_forward_hook(keep_in(projected[layer])))
        hooks.append(last_projection(block).register_forward_pre_hook(keep_input(parts[layer])))
    with torch.no_grad():
        for tokens in batches:
            stock(tokens)
    for hook in hooks:
        hook.remove()
    return (
        [torch.cat(rows) for rows in normed],
        [torch.cat(rows) for rows in projected],
        [torch.cat(rows) for rows in parts],
    )


def slow_added(parts: Tensor, projection: nn.Linear) -> Tensor:
    """The norm of what each input of the projection adds to its output, summed over the rows of `parts`."""
    columns = projection.weight.detach().double().T
    sums = torch.zeros(len(columns), dtype=torch.float64)
    for row in parts:
        for component, column in enumerate(columns):
            sums[component] += float((row[component] * column).norm())
    return sums


def slow_width_scores(
    stock: NemotronHForCausalLM, config: ModelConfig, batches: Sequence[Tensor], by: Scores
) -> WidthScores:
    """The sums over the stock model's activations, token after token and component after component."""
    normed, projected, parts = record_activations(stock, config, batches)
    hidden = torch.stack([row.abs() for row in torch.cat(normed)]).sum(0)
    energy = torch.zeros(config.hidden_size, dtype=torch.float64)
    for rows, block in zip(normed, stock.model.layers, strict=True):
        energy += (rows / block.norm.weight.detach().double()).square().sum(0)

    def ffn_scores(layer: int) -> Tensor:
        return torch.stack([row.abs() for row in projected[layer]]).sum(0)

    def mamba_scores(layer: int) -> Tensor:
        sums = torch.zeros(config.mamba_num_heads, config.mamba_head_dim, dtype=torch.float64)
        sign = torch.clone if by == "signed" else torch.abs
        for row in projected[layer]:  # [z, x, B, C, dt]
            for head in range(config.mamba_num_heads):
                start = config.mamba_size + head * config.mamba_head_dim
                channels = row[start : start + config.mamba_head_dim]
                sums[head] += sign(channels)
        return sums.flatten()

    def query_scores(layer: int) -> Tensor:
        norms = torch.zeros(config.num_attention_heads, dtype=torch.float64)
        for row in projected[layer]:
            for head in range(config.num_attention_heads):
                norms[head] += row[head * config.head_dim : (head + 1) * config.head_dim].square().sum().sqrt()
        return norms

    if by == "added":
        layers = tuple(map(slow_added, parts, map(last_projection, stock.model.layers)))
    else:
        of_kind = {"-": ffn_scores, "M": mamba_scores, "*": query_scores}
        layers = tuple(of_kind[kind](layer) for layer, kind in enumerate(config.hybrid_override_pattern))
    return WidthScores(hidden_D=hidden, energy_D=energy / energy.mean(), layers=layers)


def of_kind(scores: WidthScores, config: ModelConfig, kind: str) -> list[Tensor]:
    return [scores.layers[layer] for layer in config.layers_of(kind)]


def all_scores(scores: WidthScores) -> list[Tensor]:
    return [scores.hidden_D, scores.energy_D, *scores.layers]


def assert_close(found: WidthScores, expected: WidthScores, tolerance: float) -> None:
    for a, b in zip(all_scores(found), all_scores(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == torch.float64
        assert float((a - b).abs().max()) < tolerance * float(b.abs().max())


@pytest.mark.parametrize("by", typing.get_args(Scores))
def test_width_scores_are_sums_over_the_stock_models_activations(
    elastic: ElasticNemotronH, stock: NemotronHForCausalLM, tiny_config: ModelConfig, by: Scores
) -> None:
    batches = token_batches(tiny_config)
    expected = slow_width_scores(stock, tiny_config, batches, by)
    assert_close(width_scores(elastic, unpacked(batches), by), expected, FLOAT32_SUM)


def test_a_channel_that_is_large_in_both_directions_counts_unless_scores_are_signed(
    elastic: ElasticNemotronH, tiny_config: ModelConfig
) -> None:
    """Every Mamba layer's first channel answers to one token with a large value, to another with its negative."""
    config = tiny_config
    with torch.no_grad():
        for layer in elastic.layers:  # the residual stream stays what the embedding says
            for name, weight in layer.mixer.named_parameters():
                if name.startswith(("out_proj", "o_proj", "down_proj")):
                    weight.zero_()
        elastic.embeddings.weight[1] = -elastic.embeddings.weight[0]
        for layer in config.layers_of("M"):
            norm, rows = elastic.layers[layer].norm, elastic.layers[layer].mixer.in_proj.weight
            rows[config.mamba_size] = 10 * norm.weight * elastic.embeddings.weight[0]
    batch = torch.tensor([[0, 1, 0, 1]])
    absolute, signed = (
        of_kind(width_scores(elastic, unpacked([batch]), by), config, "M") for by in ("activations", "signed")
    )
    for first, second in zip(absolute, signed, strict=True):
        assert first[0] > 2 * first[1:].max()
        assert second.abs().max() < FLOAT32_SUM * first.max()


def test_packed_documents_are_ranked_by_as_each_of_them_alone(
    elastic: ElasticNemotronH, tiny_config: ModelConfig
) -> None:
    text = token_batches(tiny_config, count=1)[0][:1]
    lengths = [3, 1, text.shape[1] - 4]
    packing = pack(torch.arange(3).repeat_interleave(torch.tensor(lengths))[None])
    together = [TokenBatch(inputs_BT=text, targets_BT=text, packing=packing, learned=text.numel())]
    alone = unpacked(text.split(lengths, dim=1))
    assert_close(width_scores(elastic, together), width_scores(elastic, alone), FLOAT32_BATCHING)


@pytest.mark.parametrize("by", typing.get_args(Scores))
def test_width_scores_do_not_depend_on_how_samples_are_batched(
    elastic: ElasticNemotronH, tiny_config: ModelConfig, by: Scores
) -> None:
    batches = token_batches(tiny_config)
    whole = width_scores(elastic, unpacked([torch.cat(batches)]), by)
    assert_close(width_scores(elastic, unpacked(batches), by), whole, FLOAT32_BATCHING)
    assert_close(width_scores(elastic, unpacked(torch.cat(batches).split(1)), by), whole, FLOAT32_BATCHING)


def random_scores(config: ModelConfig, seed: int) -> WidthScores:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shapes = {
        "M": (config.mamba_num_heads, config.mamba_head_dim),
        "-": (config.ffn_sizes[0],),
        "*": (config.num_attention_heads,),
    }
    layers = [draw(*shapes[kind]) for kind in config.hybrid_override_pattern]
    return WidthScores(
        hidden_D=draw(config.hidden_size).abs(),
        energy_D=draw(config.hidden_size).square(),
        layers=tuple(scores if scores.ndim > 1 else scores.abs() for scores in layers),
    )


def keeping(config: ModelConfig, head_dim: int) -> Axes:
    """Axes whose every subnet keeps at least `head_dim` channels of a Mamba head."""
    return Axes(mamba_head_dim=tuple(range(config.mamba_head_dim, head_dim - 1, -1))).bind(config)


def ranked_in_groups(scores: Sequence[float], groups: int) -> list[int]:
    size = len(scores) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    return [unit for group in members for unit in sorted(group, key=lambda u: -scores[u])]


@pytest.mark.parametrize("kept_head_dim", [1, 4, 6])
def test_components_are_ranked_by_score_and_heads_inside_their_group(
    tiny_config: ModelConfig, kept_head_dim: int
) -> None:
    for seed in range(5):
        scores = random_scores(tiny_config, seed)
        ranking = tuple(range(tiny_config.num_layers))
        order = importance_order(tiny_config, scores, ranking, keeping(tiny_config, kept_head_dim))
        check_order(order, tiny_config)
        assert order.layers == ranking
        assert order.hidden.tolist() == ranked_in_groups(scores.hidden_D.tolist(), 1)
        assert order.energy.tolist() == scores.energy_D[order.hidden].float().tolist()
        for found, expected in zip(order.ffn, of_kind(scores, tiny_config, "-"), strict=True):
            assert found.tolist() == ranked_in_groups(expected.tolist(), 1)
        for found, expected in zip(order.attention_heads, of_kind(scores, tiny_config, "*"), strict=True):
            assert found.tolist() == ranked_in_groups(expected.tolist(), 2)
        mamba = of_kind(scores, tiny_config, "M")
        for channels, heads, s_HP in zip(order.mamba_head_dim, order.mamba_heads, mamba, strict=True):
            rows = s_HP.tolist()
            by_channel = [sum(row[d] ** 2 for row in rows) for d in range(6)]
            assert channels.tolist() == ranked_in_groups(by_channel, 1)
            kept = channels.tolist()[:kept_head_dim]
            by_head = [sum(row[d] ** 2 for d in kept) for row in rows]
            assert heads.tolist() == ranked_in_groups(by_head, 2)


def test_mamba_heads_are_ranked_on_the_kept_channels_only(tiny_config: ModelConfig) -> None:
    scores = random_scores(tiny_config, 0)
    for s_HP in of_kind(scores, tiny_config, "M"):
        s_HP.fill_(1.0)
        s_HP[:, 5] = 0.0
        s_HP[3, 5] = 2.0  # head 3 stands out, in the least important channel
        s_HP[4, :5] = 1.1
    ranking = tuple(range(tiny_config.num_layers))
    for head_dim, best in ((6, 3), (5, 4)):
        order = importance_order(tiny_config, scores, ranking, keeping(tiny_config, head_dim))
        assert order.mamba_heads[0][0] == best


def test_dead_components_are_ranked_last(elastic: ElasticNemotronH, tiny_config: ModelConfig) -> None:
    config = tiny_config
    mamba, ffn, attention = (config.layers_of(kind)[0] for kind in "M-*")
    with torch.no_grad():
        for layer in elastic.layers:
            layer.norm.weight[7] = 0.0
        elastic.layers[ffn].mixer.up_proj.weight[11] = 0.0
        elastic.layers[attention].mixer.o_proj.weight[:, 4 * config.head_dim : 5 * config.head_dim] = 0.0
        gates = elastic.layers[mamba].mixer.in_proj.weight[: config.mamba_size]
        gates_HPD = gates.unflatten(0, (config.mamba_num_heads, config.mamba_head_dim))
        gates_HPD[8] = 0.0
        gates_HPD[:, 2] = 0.0
    scores = width_scores(elastic, unpacked(token_batches(config)))
    order = importance_order(config, scores, range(config.num_layers), Axes().bind(config))
    assert order.hidden[-1] == 7
    assert order.ffn[0][-1] == 11
    assert order.attention_heads[0][-1] == 4, "last of the second KV group"
    assert order.mamba_heads[0][-1] == 8, "last of the second SSM group"
    assert order.mamba_head_dim[0][-1] == 2


def test_scoring_leaves_the_model_as_it_was(elastic: ElasticNemotronH, tiny_config: ModelConfig) -> None:
    before = {name: value.clone() for name, value in elastic.state_dict().items()}
    batches = token_batches(tiny_config, count=1)
    width_scores(elastic, unpacked(batches))
    assert all(torch.equal(before[name], value) for name, value in elastic.state_dict().items())
    assert all(parameter.grad is None for parameter in elastic.parameters())
