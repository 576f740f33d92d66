"""A Mamba-2 layer and a whole model, forward and backward on a CPU, beside stock transformers without its kernels.

pytest -m benchmark -s tests/benchmarks/bench_layer.py [-k "8192 and bfloat16"]

In float32, and with products in bfloat16 under autocast, as a recipe's `dtype: bfloat16` trains. Both have the same
weights and see the same input. Outputs and every gradient are checked to be equal first. A second row compares with the
linear layers alone, which both forms must compute and which bound what any form can gain.
"""

from collections.abc import Callable

import pytest
import torch
from bench import BOUND, interleaved, record
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from elastic_core.geometry import ModelConfig
from elastic_core.layers.kernels import TORCH
from elastic_core.layers.mamba import MambaMixer
from elastic_core.layout import WHOLE
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import full_subnet
from elastic_core.training.curriculum import generator
from elastic_core.training.losses import distillation_loss

# Of the largest value: a gradient of a weight sums thousands of products in another order; transformers narrows more of
# them than we do.
SAME = {"float32": 1e-4, "bfloat16": 0.1}

TINY = {
    "hybrid_override_pattern": "M-M*-M-M*-M-",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "vocab_size": 1024,
    "chunk_size": 64,
}
# Nano's proportions at a width that two CPU cores can train.
SMALL = {
    "hybrid_override_pattern": "M-M-M*-M-",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "vocab_size": 16384,
    "chunk_size": 128,
}
# Geometry, batch, tokens. The tiny recipe's micro-batch; Mamba layers narrow, usual and wide for their hidden size; and
# the length of a sequence in the first stage of the small and the 12B recipe.
LAYERS = {
    "tiny": (TINY, 16, 128),
    "16-heads": ({**SMALL, "mamba_num_heads": 16}, 1, 2048),
    "32-heads": (SMALL, 1, 2048),
    "64-heads": ({**SMALL, "mamba_num_heads": 64}, 1, 2048),
    "16-heads-8192": ({**SMALL, "mamba_num_heads": 16}, 1, 8192),
    "32-heads-8192": (SMALL, 1, 8192),
}
MODELS = {"tiny": (TINY, 16, 128), "small": (SMALL, 1, 1024), "small-8192": (SMALL, 1, 8192)}


def fill(module: nn.Module) -> None:
    """Weights of a trained model's size, also where a fresh one has constants."""
    random = generator("weights")
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim == 2:
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=random)
            elif "conv1d" in name:
                weight.normal_(0.0, 0.5, generator=random)
            elif name.endswith("dt_bias"):
                weight.uniform_(-5.0, -2.0, generator=random)


def products_in(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def with_gradients(dtype: str, module: nn.Module, run: Callable[[], Tensor], *others: Tensor) -> dict[str, Tensor]:
    """What `run` returns, and the gradients of its sum with respect to every weight of `module` and to `others`."""
    module.zero_grad()
    with products_in(dtype):
        result = run()
    result.sum().backward()
    return {
        "result": result.detach(),
        **{name: weight.grad for name, weight in module.named_parameters()},
        **{f"input {i}": other.grad for i, other in enumerate(others)},
    }


def assert_same(dtype: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    off = {name: ((ours[name] - t).abs().max() / t.abs().max()).item() for name, t in theirs.items()}
    assert {name: value for name, value in off.items() if not value <= SAME[dtype]} == {}


def linear_layers(dtype: str, module: nn.Module, rows: int) -> Callable[[], None]:
    """Forward and backward of every linear layer of `module` alone, on so many rows."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    inputs = [torch.randn(rows, layer.in_features).requires_grad_() for layer in layers]
    gradients = [torch.randn(rows, layer.out_features, dtype=getattr(torch, dtype)) for layer in layers]

    def run() -> None:
        for layer, given, gradient in zip(layers, inputs, gradients, strict=True):
            with products_in(dtype):
                result = layer(given)
            torch.autograd.grad(result, [given, layer.weight], gradient)

    return run


def record_both(benchmark: str, shape: str, seconds: dict[str, float]) -> None:
    for alternative, title, target in (
        ("transformers", "transformers without kernels", "at most 0.5"),
        ("products", "its linear layers alone", BOUND),
    ):
        record(
            benchmark=benchmark,
            shape=shape,
            unit="s",
            ours=seconds["ours"],
            theirs=seconds[alternative],
            alternative=title,
            target=target,
        )


@pytest.mark.benchmark
@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_beside_transformers(name: str, dtype: str) -> None:
    geometry, batch, tokens = LAYERS[name]
    config = ModelConfig(**geometry)
    ours, theirs = MambaMixer(config, 0), NemotronHMamba2Mixer(NemotronHConfig(**geometry), 0).train()
    fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    x_BTD, weight_BTD = (torch.randn(batch, tokens, config.hidden_size, generator=generator(i)) for i in "xw")

    def our_layer(x_BTD: Tensor) -> Tensor:
        return ours(x_BTD, WHOLE, None, None, TORCH) * weight_BTD

    def stock_layer(x_BTD: Tensor) -> Tensor:
        return theirs(x_BTD) * weight_BTD

    def step(module: nn.Module, layer: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        given = x_BTD.clone().requires_grad_()
        return with_gradients(dtype, module, lambda: layer(given), given)

    assert_same(dtype, step(ours, our_layer), step(theirs, stock_layer))
    seconds = interleaved(
        {
            "ours": lambda: step(ours, our_layer),
            "transformers": lambda: step(theirs, stock_layer),
            "products": linear_layers(dtype, theirs, batch * tokens),
        }
    )
    shape = (
        f"{batch} x {tokens} tokens, hidden {config.hidden_size}, {config.mamba_num_heads} heads x "
        f"{config.mamba_head_dim}, {config.n_groups} groups, state {config.ssm_state_size}, {dtype}"
    )
    record_both("Mamba-2 layer, forward and backward", shape, seconds)


@pytest.mark.benchmark
@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize("name", MODELS)
def test_model_step_beside_transformers(name: str, dtype: str) -> None:
    geometry, batch, tokens = MODELS[name]
    config = ModelConfig(**geometry)
    subnet = full_subnet(config)
    ours, theirs = ElasticNemotronH(config, "torch"), NemotronHForCausalLM(NemotronHConfig(**geometry)).train()
    fill(theirs)
    ours.load_state_dict({key.removeprefix("model."): weight for key, weight in theirs.state_dict().items()})
    tokens_BT = torch.randint(config.vocab_size, (batch, tokens), generator=generator("tokens"))
    # transformers shifts the labels itself.
    targets_BT = torch.cat([tokens_BT[:, 1:], torch.full((batch, 1), -100)], dim=1)

    def our_loss() -> Tensor:
        hidden_TD = ours(tokens_BT, subnet).flatten(0, 1)
        head_VD = ours.head_weight(subnet.hidden)
        return distillation_loss(
            hidden_TD, head_VD, None, None, targets_BT.flatten(), kl_weight=0.0, ce_weight=1.0
        ).total

    def stock_loss() -> Tensor:
        return theirs(tokens_BT, labels=tokens_BT, use_cache=False).loss

    expected = {key.removeprefix("model."): t for key, t in with_gradients(dtype, theirs, stock_loss).items()}
    assert_same(dtype, with_gradients(dtype, ours, our_loss), expected)
    seconds = interleaved(
        {
            "ours": lambda: with_gradients(dtype, ours, our_loss),
            "transformers": lambda: with_gradients(dtype, theirs, stock_loss),
            "products": linear_layers(dtype, theirs, batch * tokens),
        }
    )
    parameters = sum(weight.numel() for weight in ours.parameters())
    shape = f"{batch} x {tokens} tokens, {parameters / 1e6:.1f}M parameters, {config.hybrid_override_pattern}, {dtype}"
    record_both("model, forward, loss and backward", shape, seconds)
