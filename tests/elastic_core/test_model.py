"""C1 and C3: one model, many widths, and every form of a subnet gives the same logits at its own cost."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import NemotronHForCausalLM

from elastic_core.files.checkpoint import load_weights, read_config, tensor_places
from elastic_core.files.reorder import random_order, reorder_weights
from elastic_core.files.slicing import slice_checkpoint, slice_weights
from elastic_core.generate import decode
from elastic_core.geometry import ATTENTION, MAMBA, Axes, ModelConfig
from elastic_core.layers import ssm
from elastic_core.layers.ffn import FeedForward
from elastic_core.layers.kernels import TORCH
from elastic_core.layers.kind import Cache
from elastic_core.layers.norm import Energy, RMSNorm
from elastic_core.layers.packing import Packing, pack
from elastic_core.layers.ssm import time_steps
from elastic_core.layout import WHOLE
from elastic_core.model import ElasticNemotronH
from elastic_core.router import ElasticModel, soft_subnet
from elastic_core.subnet import Masks, Subnet, full_subnet, keep_layers, sliced_config
from elastic_core.training.curriculum import generator

FLOAT32_AGAINST_STOCK = 1e-5  # transformers computes norms and the scan in float32, whatever the dtype
BFLOAT16 = 0.1  # 8 bits of mantissa, over 8 layers
FLOAT64_OWN_FORMS = 1e-12  # the same sums in another order

AXES = Axes(
    hidden=(48, 40, 24),
    ffn=(40, 32, 16),
    mamba_heads=(12, 8, 4),
    mamba_head_dim=(6, 4),
    attention_heads=(6, 4, 2),
    depth=(8, 6, 5),
)
RANKING = (0, 3, 1, 4, 5, 2, 7, 6)
UNIFORM = {
    "full": (48, 40, 12, 6, 6, 8),
    "hidden": (24, 40, 12, 6, 6, 8),
    "ffn": (48, 16, 12, 6, 6, 8),
    "mamba_heads": (48, 40, 4, 6, 6, 8),
    "mamba_head_dim": (48, 40, 12, 4, 6, 8),
    "attention_heads": (48, 40, 12, 6, 2, 8),
    "depth": (48, 40, 12, 6, 6, 5),
    "every axis": (40, 32, 8, 4, 4, 6),
    "smallest": (24, 16, 4, 4, 2, 5),
}


def uniform(config: ModelConfig, hidden: int, ffn: int, heads: int, head_dim: int, queries: int, depth: int) -> Subnet:
    return Subnet(
        hidden=hidden,
        ffn=(ffn,) * len(config.layers_of("-")),
        mamba_heads=(heads,) * len(config.layers_of(MAMBA)),
        mamba_head_dim=head_dim,
        attention_heads=(queries,) * len(config.layers_of(ATTENTION)),
        layers=keep_layers(RANKING, depth),
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def tokens(config: ModelConfig, batch: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def load(directory: Path, dtype: torch.dtype) -> ElasticNemotronH:
    model = ElasticNemotronH(read_config(directory), backend="torch")
    model.load_state_dict(load_weights(directory))
    return model.to(dtype)


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory, stock_model) -> Path:
    """Weights of a trained model's size: with larger ones the layers magnify float32's own rounding past 1e-5."""
    directory = tmp_path_factory.mktemp("stock") / "calm"
    stock = stock_model()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(0.5 if parameter.ndim == 2 else 1.0)
    stock.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def small_steps(tmp_path_factory, stock_model) -> Path:
    """A teacher most of whose time steps lie far below the 0.001 at which transformers clamps when it reads a text.

    Its inputs and states are large, so that the little that such a step adds is seen in the logits.
    """
    directory = tmp_path_factory.mktemp("stock") / "small steps"
    stock = stock_model()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith("dt_bias"):
                parameter.copy_(torch.linspace(-14, -7, len(parameter)))
            elif "conv1d" in name:
                parameter.mul_(8)
            elif parameter.ndim == 2:
                parameter.mul_(0.5)
    stock.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["usual steps", "small steps"])
def teacher(request, tiny_checkpoint, small_steps) -> Path:
    return tiny_checkpoint if request.param == "usual steps" else small_steps


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> ElasticNemotronH:
    """Every law holds with norms that are scaled."""
    loaded = load(tiny_checkpoint, torch.float64)
    loaded.scale_norms(Energy(torch.linspace(2.0, 0.1, loaded.config.hidden_size)))
    return loaded


def logits(model: ElasticNemotronH, subnet: Subnet, masks: Masks | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(tokens(model.config), subnet, masks))


def cut(model: ElasticNemotronH, subnet: Subnet) -> ElasticNemotronH:
    sliced = ElasticNemotronH(sliced_config(model.config, subnet), backend="torch").to(torch.float64)
    sliced.load_state_dict(slice_weights(model.state_dict(), subnet, model.config, energy=model.energy))
    return sliced


def stock_logits(directory: Path, *, cached: bool = False, **changes: object) -> torch.Tensor:
    """What transformers says of a checkpoint, token by token with its cache or all at once.

    Both are oracles of what we export: its config has transformers 5.23 clamp time steps when it reads a text where the
    model does, and with a cache it never clamps.
    """
    stock, info = NemotronHForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **changes
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    text, cache, pieces = tokens(read_config(directory)), None, []
    with torch.no_grad():
        for piece in text.split(1, dim=1) if cached else [text]:
            said = stock.eval()(piece, past_key_values=cache, use_cache=True)
            cache = said.past_key_values
            pieces.append(said.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("sizes", UNIFORM.values(), ids=UNIFORM.keys())
def test_a_subnet_equals_its_slice_in_stock_transformers(sizes, teacher, tmp_path):
    model = load(teacher, torch.float32)
    subnet = uniform(model.config, *sizes)
    slice_checkpoint(teacher, subnet, tmp_path / "slice")
    ours = logits(model, subnet)
    assert difference(ours, stock_logits(tmp_path / "slice")) < FLOAT32_AGAINST_STOCK
    assert difference(ours, stock_logits(tmp_path / "slice", cached=True)) < FLOAT32_AGAINST_STOCK


def test_a_slice_of_a_slice_is_that_slice_in_stock_transformers(small_steps, tmp_path):
    model = load(small_steps, torch.float32)
    slice_checkpoint(small_steps, full_subnet(model.config), tmp_path / "full")
    subnet = uniform(model.config, *UNIFORM["every axis"])
    slice_checkpoint(tmp_path / "full", subnet, tmp_path / "slice")
    assert read_config(tmp_path / "slice") == sliced_config(model.config, subnet)
    assert difference(logits(model, subnet), stock_logits(tmp_path / "slice")) < FLOAT32_AGAINST_STOCK


def test_small_time_steps_are_seen_in_the_logits(small_steps, tmp_path):
    """Else the tests above would say nothing of the clamp."""
    ours = logits(load(small_steps, torch.float32), full_subnet(read_config(small_steps)))
    assert difference(ours, stock_logits(small_steps)) < FLOAT32_AGAINST_STOCK
    assert difference(ours, stock_logits(small_steps, time_step_min=0.001)) > 100 * FLOAT32_AGAINST_STOCK


def test_a_model_with_limits_of_its_own_clamps_there(small_steps, tmp_path):
    """transformers clamps at the lower one alone: the upper one is tried by a model that has no step above it."""
    config = json.loads((small_steps / "config.json").read_text())
    shutil.copytree(small_steps, tmp_path / "limited")
    (tmp_path / "limited/config.json").write_text(json.dumps(config | {"time_step_limit": [1e-4, 1.0]}))
    model = load(tmp_path / "limited", torch.float32)
    assert model.config.time_step_limit == (1e-4, 1.0)
    expected = stock_logits(small_steps, time_step_min=1e-4)
    assert difference(logits(model, full_subnet(model.config)), expected) < FLOAT32_AGAINST_STOCK
    assert float(time_steps(torch.tensor([[[9.0]]]), torch.zeros(1), model.config.time_step_limit)) == 1.0


def test_a_subnet_with_ffn_per_layer_equals_its_padded_slice_in_stock_transformers(tiny_checkpoint, tmp_path):
    model = load(tiny_checkpoint, torch.float32)
    subnet = replace(uniform(model.config, 40, 32, 8, 4, 4, 8), ffn=(16, 40, 32))
    slice_checkpoint(tiny_checkpoint, subnet, tmp_path / "slice")
    assert difference(logits(model, subnet), stock_logits(tmp_path / "slice")) < FLOAT32_AGAINST_STOCK


@pytest.mark.parametrize("sizes", UNIFORM.values(), ids=UNIFORM.keys())
def test_a_subnet_equals_its_slice(sizes, model):
    subnet = uniform(model.config, *sizes)
    sliced = cut(model, subnet)
    assert difference(logits(model, subnet), logits(sliced, full_subnet(sliced.config))) < FLOAT64_OWN_FORMS


def one_hot_choice(elastic: ElasticModel, subnet: Subnet) -> dict[str, torch.Tensor]:
    values = {
        "hidden": [subnet.hidden],
        "ffn": subnet.ffn,
        "mamba_heads": subnet.mamba_heads,
        "mamba_head_dim": [subnet.mamba_head_dim],
        "attention_heads": subnet.attention_heads,
        "depth": [subnet.depth],
    }
    return {
        axis: torch.stack(
            [
                torch.tensor([float(choice == value) for choice in elastic.axes.choices(axis)], dtype=torch.float64)
                for value in list(values[axis])[: elastic.rows(axis)]
            ]
        )
        for axis in Axes.NAMES
    }


def masks_over_full(elastic: ElasticModel, probabilities: dict[str, torch.Tensor]) -> tuple[Subnet, Masks]:
    """The masks of a choice over the whole model: every choice keeps the least of weight, then the exact one-hot."""
    everywhere = {axis: torch.full_like(p, 1e-9) for axis, p in probabilities.items()}
    subnet, _ = soft_subnet(elastic, everywhere)
    assert subnet == full_subnet(elastic.config)
    _, enclosing = soft_subnet(elastic, everywhere)
    _, exact = soft_subnet(elastic, probabilities)

    def widen(mask: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
        return torch.cat([mask, torch.zeros(len(over) - len(mask), dtype=mask.dtype)])

    return subnet, Masks(
        hidden=widen(exact.hidden, enclosing.hidden),
        ffn=tuple(map(widen, exact.ffn, enclosing.ffn)),
        mamba_heads=tuple(map(widen, exact.mamba_heads, enclosing.mamba_heads)),
        mamba_head_dim=widen(exact.mamba_head_dim, enclosing.mamba_head_dim),
        attention_heads=tuple(map(widen, exact.attention_heads, enclosing.attention_heads)),
        layers=exact.layers,
    )


@pytest.mark.parametrize("sizes", UNIFORM.values(), ids=UNIFORM.keys())
def test_a_one_hot_mask_over_the_full_width_equals_the_subnet(sizes, model):
    elastic = ElasticModel(model.config, AXES.bind(model.config), RANKING)
    subnet = uniform(model.config, *sizes)
    enclosing, masks = masks_over_full(elastic, one_hot_choice(elastic, subnet))
    assert difference(logits(model, enclosing, masks), logits(model, subnet)) < FLOAT64_OWN_FORMS


def test_masks_with_sizes_per_layer_equal_the_subnet(model):
    axes = AXES.bind(model.config)
    axes = replace(axes, per_layer=("ffn", "mamba_heads", "attention_heads"))
    elastic = ElasticModel(model.config, axes, RANKING)
    subnet = replace(
        uniform(model.config, 40, 32, 8, 4, 4, 8), ffn=(16, 40, 32), mamba_heads=(4, 12, 8), attention_heads=(2, 6)
    )
    enclosing, masks = masks_over_full(elastic, one_hot_choice(elastic, subnet))
    assert difference(logits(model, enclosing, masks), logits(model, subnet)) < FLOAT64_OWN_FORMS


def test_soft_masks_run_at_the_largest_choice_with_weight(model):
    elastic = ElasticModel(model.config, AXES.bind(model.config), RANKING)
    probabilities = one_hot_choice(elastic, uniform(model.config, *UNIFORM["smallest"]))
    probabilities["hidden"] = torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.float64)
    subnet, masks = soft_subnet(elastic, probabilities)
    assert subnet == uniform(model.config, 40, 16, 4, 4, 2, 5)
    assert masks.hidden.tolist() == [1.0] * 24 + [0.25] * 16


@pytest.mark.parametrize("sizes", UNIFORM.values(), ids=UNIFORM.keys())
def test_forward_and_backward_at_a_subnet_cost_what_its_slice_costs(sizes, model):
    subnet = uniform(model.config, *sizes)
    sliced = cut(model, subnet)

    def flops(model: ElasticNemotronH, subnet: Subnet) -> int:
        with FlopCounterMode(display=False) as counter:
            model.logits(model(tokens(model.config), subnet)).sum().backward()
        model.zero_grad()
        return counter.get_total_flops()

    assert flops(model, subnet) == flops(sliced, full_subnet(sliced.config))


def test_gradients_at_a_subnet_are_those_of_its_slice_and_zero_elsewhere(model):
    subnet = uniform(model.config, *UNIFORM["every axis"])
    sliced = cut(model, subnet)
    model.logits(model(tokens(model.config), subnet)).square().mean().backward()
    sliced.logits(sliced(tokens(model.config), full_subnet(sliced.config))).square().mean().backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    gain, places = model.energy.gain(subnet.hidden), tensor_places(sliced.config)
    for name, kept in slice_weights(gradients, subnet, model.config).items():
        expected = sliced.get_parameter(name).grad * (gain if places[name].stream_norm else 1.0)
        assert torch.allclose(kept, expected, rtol=1e-9, atol=FLOAT64_OWN_FORMS), name
    total = sum(float(g.abs().sum()) for g in gradients.values())
    inside = sum(float(g.abs().sum()) for g in slice_weights(gradients, subnet, model.config).values())
    assert total == pytest.approx(inside, rel=1e-12)


def test_gradients_of_several_budgets_add_up(model):
    names = ["smallest", "full", "every axis"]

    def gradients(*names: str) -> dict[str, torch.Tensor]:
        for name in names:
            hidden_BTD = model(tokens(model.config), uniform(model.config, *UNIFORM[name]))
            model.logits(hidden_BTD).square().mean().backward()
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        return found

    together, alone = gradients(*names), [gradients(name) for name in names]
    for name, total in together.items():
        expected = sum(gradient[name] for gradient in alone)
        assert torch.allclose(total, expected, rtol=1e-9, atol=FLOAT64_OWN_FORMS), name


class Largest(TorchDispatchMode):
    """Watches the largest tensor that comes into being."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_a_step_at_a_subnet_makes_no_tensor_larger_than_its_slice_makes(model):
    subnet = uniform(model.config, *UNIFORM["smallest"])
    sliced = cut(model, subnet)

    def largest(model: ElasticNemotronH, subnet: Subnet) -> int:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with Largest() as watched:
            model.logits(model(tokens(model.config, 1, 2), subnet)).sum().backward()
        model.zero_grad()
        return watched.numel

    assert (
        largest(model, subnet)
        <= largest(sliced, full_subnet(sliced.config))
        < largest(model, full_subnet(model.config))
    )


def test_decoding_takes_weights_once_a_text(model):
    subnet, cache = uniform(model.config, *UNIFORM["every axis"]), Cache()

    def taken(text: torch.Tensor) -> dict[int, set[int]]:
        with torch.no_grad():
            model(text, subnet, cache=cache)
        return {i: set(map(id, of_layer.values())) for i, of_layer in cache.weights.items()}

    read = taken(tokens(model.config))
    assert set(read) == set(subnet.layers)
    assert taken(tokens(model.config)[:, :1]) == read


def test_reading_a_prompt_in_pieces_says_the_same(model):
    prompt, subnet = tokens(model.config), uniform(model.config, *UNIFORM["every axis"])
    whole = list(decode(model, prompt, subnet, max_new_tokens=6))
    pieces = list(decode(model, prompt, subnet, max_new_tokens=6, read_at_once=5))
    assert torch.equal(torch.stack(whole), torch.stack(pieces))


def test_under_autocast_the_residual_stream_is_in_its_dtype(model):
    full, single = full_subnet(model.config), model.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden_BTD = single(tokens(model.config), full)
    with torch.no_grad():
        expected = single(tokens(model.config), full)
    model.double()
    assert hidden_BTD.dtype == torch.bfloat16
    assert difference(hidden_BTD, expected) < BFLOAT16


@pytest.mark.parametrize("masked", [False, True])
def test_the_norm_does_not_depend_on_how_many_tokens_it_takes_at_once(masked, monkeypatch):
    x_BTD, grad_BTD = (torch.randn(2, 7, 24, dtype=torch.float64, generator=generator(i)) for i in (0, 1))
    mask_D = torch.linspace(0.1, 1, 24, dtype=torch.float64) if masked else None
    norm = RMSNorm(24, 1e-5).double()

    def results() -> list[torch.Tensor]:
        given = x_BTD.clone().requires_grad_()
        y_BTD = norm(given, mask_D)
        return [y_BTD, *torch.autograd.grad(y_BTD, [given, norm.weight], grad_BTD)]

    at_once = results()
    monkeypatch.setattr(ssm, "SEGMENT_VALUES", 2 * 24 * 2)
    assert max(map(difference, results(), at_once)) < FLOAT64_OWN_FORMS


def test_the_activation_is_the_square_of_a_relu(tiny_config):
    layer = FeedForward(tiny_config, tiny_config.layers_of("-")[0]).double()
    x_BTD = torch.randn(2, 3, tiny_config.hidden_size, dtype=torch.float64, requires_grad=True)
    expected = layer.down_proj(torch.relu(layer.up_proj(x_BTD)).square())
    y_BTD = layer(x_BTD, WHOLE, None, None, TORCH)
    wanted = [x_BTD, *layer.parameters()]
    for ours, theirs in zip(
        (y_BTD, *torch.autograd.grad(y_BTD.sin().sum(), wanted)),
        (expected, *torch.autograd.grad(expected.sin().sum(), wanted)),
        strict=True,
    ):
        assert difference(ours, theirs) < FLOAT64_OWN_FORMS
    with torch.no_grad():
        assert difference(layer(x_BTD, WHOLE, None, None, TORCH), expected) < FLOAT64_OWN_FORMS


def test_reordering_leaves_the_function_unchanged(model):
    reordered = ElasticNemotronH(model.config, backend="torch").to(torch.float64)
    order = random_order(model.config, generator(0, "order"))
    reordered.load_state_dict(reorder_weights(model.state_dict(), order, model.config))
    full = full_subnet(model.config)
    assert difference(logits(reordered, full), logits(model, full)) < FLOAT64_OWN_FORMS
    assert not torch.equal(reordered.embeddings.weight, model.embeddings.weight)


@pytest.mark.parametrize("name", ["full", "every axis", "smallest"])
def test_decoding_with_caches_gives_the_logits_of_reading_the_whole_text(name, model):
    subnet, text = uniform(model.config, *UNIFORM[name]), tokens(model.config)
    cache = Cache()
    with torch.no_grad():
        pieces = [model.logits(model(piece, subnet, cache=cache)) for piece in text.split([7, 1, 1, 3, 1, 6], dim=1)]
    assert difference(torch.cat(pieces, dim=1), logits(model, subnet)) < FLOAT64_OWN_FORMS


def test_a_switch_in_mid_generation_says_what_the_new_budget_would_have_said(model):
    small, full = uniform(model.config, *UNIFORM["smallest"]), full_subnet(model.config)
    prompt = tokens(model.config)
    switched = list(decode(model, prompt, small, max_new_tokens=12, switch={5: full}))
    first = list(decode(model, prompt, small, max_new_tokens=5))
    rest = list(decode(model, torch.cat([prompt, torch.stack(first, 1)], 1), full, max_new_tokens=7))
    assert torch.equal(torch.stack(switched), torch.stack(first + rest))


def test_fresh_weights_are_a_function_of_the_generator(tiny_config):
    first, second = ElasticNemotronH(tiny_config), ElasticNemotronH(tiny_config)
    first.initialise(generator(3))
    second.initialise(generator(3))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    loss = torch.nn.functional.cross_entropy(
        logits(first, full_subnet(tiny_config)).flatten(0, 1), tokens(tiny_config).flatten()
    )
    assert float(loss) == pytest.approx(torch.log(torch.tensor(float(tiny_config.vocab_size))).item(), rel=0.05)


# Packed documents

LENGTHS = [[9, 10], [3, 1, 15]]


def packed_documents() -> Packing:
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]
    packing = pack(torch.stack(rows))
    assert packing is not None
    return packing


def soft(model: ElasticNemotronH) -> tuple[Subnet, Masks]:
    elastic = ElasticModel(model.config, AXES.bind(model.config), RANKING)
    probabilities = {
        axis: torch.linspace(1, 2, len(elastic.axes.choices(axis))).softmax(0).expand(elastic.rows(axis), -1)
        for axis in Axes.NAMES
    }
    return soft_subnet(elastic, probabilities)


FORMS = {
    "full": lambda model: (full_subnet(model.config), None),
    "subnet": lambda model: (uniform(model.config, *UNIFORM["every axis"]), None),
    "soft masks": soft,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_packed_document_is_read_as_it_is_alone(form, model):
    text, packing = tokens(model.config), packed_documents()
    subnet, masks = FORMS[form](model)
    with torch.no_grad():
        together = model(text, subnet, masks, packing=packing)
        for row, first, end in packing.spans:
            alone = model(text[row : row + 1, first:end], subnet, masks)
            assert difference(together[row : row + 1, first:end], alone) < FLOAT64_OWN_FORMS, (row, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_no_bit_of_a_packed_document_or_its_gradients_depends_on_the_one_before(form, dtype, tiny_checkpoint):
    """Hidden states and logits of each row's last document, and every gradient of a loss on them."""
    model, packing = load(tiny_checkpoint, torch.float32), packed_documents()
    subnet, masks = FORMS[form](model)
    text = tokens(model.config)
    changed = text.clone()
    for row, first, end in packing.spans:
        if end < text.shape[1]:
            changed[row, first:end] = (text[row, first:end] + 7) % model.config.vocab_size
    found = []
    for given in (text, changed):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden_BTD = model(given, subnet, masks, packing=packing)
            last = [hidden_BTD[row, first:end] for row, first, end in packing.spans if end == text.shape[1]]
            logits = model.logits(torch.cat(last))
        logits.log_softmax(-1)[:, 3].sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([hidden_BTD[0, LENGTHS[0][0] :], logits, *gradients])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_packed_documents_are_not_read_into_a_cache(model):
    with pytest.raises(ValueError, match="a cache holds one text a row"):
        model(tokens(model.config), full_subnet(model.config), cache=Cache(), packing=packed_documents())


def test_the_embeddings_gradient_is_summed_in_float32_where_the_weights_are_narrower(tiny_config):
    """As FSDP2 gathers them. A sum in bfloat16 would stop at 256 of 600 equal terms."""
    narrow, wide = ElasticNemotronH(tiny_config).bfloat16(), ElasticNemotronH(tiny_config)
    text_BT = torch.cat([torch.full((2, 300), 7), torch.arange(20).expand(2, -1)], dim=1)
    terms_BTD = torch.rand(2, 320, 32, generator=generator("terms")).bfloat16()
    for model in (narrow, wide):
        model._embed(text_BT, 32).backward(terms_BTD.to(model.embeddings.weight.dtype))
    expected = wide.embeddings.weight.grad
    assert expected[7, :32].min() > 256
    assert torch.equal(narrow.embeddings.weight.grad, expected.bfloat16())
