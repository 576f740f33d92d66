"""Laws of the rotation: the function stays, the types stay, and the first channels carry the most."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import NemotronHForCausalLM

from elastic_core.files import shards
from elastic_core.files.checkpoint import load_weights, open_checkpoint, write_weights
from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.rotation import principal_basis, residual_covariance, rotate_checkpoint, rotate_weights
from elastic_core.subnet import full_subnet
from elastic_core.training.tokens import TokenBatch

# Products in float64, 8 layers of sums of at most 72 terms.
FLOAT64_SUMS = 1e-12
# Each weight is rounded to float32 once more, in 8 layers; a wrong rotation gives differences near 1.
FLOAT32_ROUNDING = 2e-5
# The same float32 activations, added up in another order.
FLOAT32_BATCHING = 1e-5


def random_basis(size: int, seed: int = 0) -> Tensor:
    draw = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(draw).Q


def batch_of(config: ModelConfig, seed: int = 0) -> TokenBatch:
    tokens = torch.randint(config.vocab_size, (2, 23), generator=torch.Generator().manual_seed(seed))
    return TokenBatch(inputs_BT=tokens, targets_BT=tokens, packing=None, learned=tokens.numel())


@pytest.fixture
def weights(tiny_checkpoint: Path) -> dict[str, Tensor]:
    """Weights whose norms are no ones."""
    weights, draw = load_weights(tiny_checkpoint), torch.Generator().manual_seed(1)
    return {
        name: weight * torch.empty_like(weight).uniform_(0.5, 2.0, generator=draw) if "norm" in name else weight
        for name, weight in weights.items()
    }


def model_of(config: ModelConfig, weights: dict[str, Tensor]) -> ElasticNemotronH:
    model = ElasticNemotronH(config, backend="torch").to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def logits(model: ElasticNemotronH, batch: TokenBatch) -> Tensor:
    return model.logits(model(batch.inputs_BT, full_subnet(model.config)))


def test_a_rotated_model_computes_the_same_function(tiny_config: ModelConfig, weights: dict[str, Tensor]) -> None:
    exact = {name: weight.double() for name, weight in weights.items()}
    rotated = rotate_weights(exact, random_basis(tiny_config.hidden_size), tiny_config)
    assert not torch.allclose(rotated["lm_head.weight"], exact["lm_head.weight"], atol=1e-3)
    before, after = (logits(model_of(tiny_config, w), batch_of(tiny_config)) for w in (exact, rotated))
    assert (before - after).abs().max() <= FLOAT64_SUMS * before.abs().max()


def test_stock_transformers_computes_the_same_function_from_a_rotated_checkpoint(
    tiny_config: ModelConfig, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    write_weights(tmp_path / "before", tiny_config, weights, torch.float32)
    rotate_checkpoint(tmp_path / "before", random_basis(tiny_config.hidden_size), tmp_path / "after")
    with torch.no_grad():
        before, after = (
            NemotronHForCausalLM.from_pretrained(tmp_path / name).eval()(batch_of(tiny_config).inputs_BT).logits
            for name in ("before", "after")
        )
    assert (before - after).abs().max() <= FLOAT32_ROUNDING * before.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_gives_what_memory_gives_in_the_stored_types(
    tiny_config: ModelConfig,
    weights: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
) -> None:
    write_weights(tmp_path / "before", tiny_config, weights, dtype)
    stored = load_weights(tmp_path / "before")
    basis = random_basis(tiny_config.hidden_size)
    expected = rotate_weights(stored, basis, tiny_config)
    monkeypatch.setattr(shards, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 3000)
    rotate_checkpoint(tmp_path / "before", basis, tmp_path / "after")
    found = load_weights(tmp_path / "after")
    assert {name: w.dtype for name, w in found.items()} == {name: w.dtype for name, w in stored.items()}
    one_step = 2 * torch.finfo(dtype).eps  # sums in another order may round to the neighbour
    for name, weight in expected.items():
        assert torch.allclose(found[name].double(), weight.double(), rtol=one_step, atol=1e-7), name
    assert open_checkpoint(tmp_path / "after").config == tiny_config


def test_the_covariance_is_that_of_every_norms_input(
    tiny_config: ModelConfig, stock_model: Callable[..., NemotronHForCausalLM]
) -> None:
    stock = stock_model()
    model = ElasticNemotronH(tiny_config, backend="torch")
    model.load_state_dict({name.removeprefix("model."): value for name, value in stock.state_dict().items()})
    batches = [batch_of(tiny_config, seed) for seed in range(2)]
    inputs: list[Tensor] = []
    norms = [layer.norm for layer in stock.model.layers] + [stock.model.norm_f]
    hooks = [norm.register_forward_hook(lambda _module, given, _output: inputs.append(given[0])) for norm in norms]
    with torch.no_grad():
        for batch in batches:
            stock(batch.inputs_BT)
    for hook in hooks:
        hook.remove()
    slow = torch.zeros(tiny_config.hidden_size, tiny_config.hidden_size, dtype=torch.float64)
    for x_D in (x for given in inputs for x in given.double().flatten(0, 1)):
        slow += torch.outer(x_D, x_D) / (x_D.square().mean() + tiny_config.layer_norm_epsilon)
    assert len(inputs) == len(batches) * (tiny_config.num_layers + 1)
    found = residual_covariance(model, batches)
    assert (found - slow).abs().max() <= FLOAT32_BATCHING * slow.abs().max()


def test_the_first_principal_channels_carry_more_than_any_others() -> None:
    draw = torch.Generator().manual_seed(0)
    x_TD = torch.randn(200, 12, dtype=torch.float64, generator=draw) @ torch.randn(12, 12, generator=draw).double()
    covariance = x_TD.T @ x_TD
    basis = principal_basis(covariance)
    assert torch.allclose(basis.T @ basis, torch.eye(12, dtype=torch.float64), atol=1e-12)
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all()
    energy = (x_TD @ basis).square().sum(0)
    assert energy.tolist() == sorted(energy.tolist(), reverse=True)
    for kept in range(1, 12):
        best_of_axes = x_TD.square().sum(0).sort(descending=True).values[:kept].sum()
        at_random = (x_TD @ random_basis(12, kept)[:, :kept]).square().sum()
        assert energy[:kept].sum() >= max(best_of_axes, at_random)


def test_half_a_model_that_a_rotation_has_hidden_is_found_again(
    tiny_config: ModelConfig, weights: dict[str, Tensor]
) -> None:
    """A model that uses half of its channels, rotated at random, loses none of its stream in principal channels."""
    half = tiny_config.hidden_size // 2
    used_D = (torch.arange(2 * half) < half).double()
    exact = {name: weight.double() for name, weight in weights.items()}
    exact["embeddings.weight"] *= used_D
    for name in exact:
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            exact[name] *= used_D[:, None]
    scrambled = rotate_weights(exact, random_basis(2 * half), tiny_config)
    basis = principal_basis(residual_covariance(model_of(tiny_config, scrambled), [batch_of(tiny_config)]))
    found = rotate_weights(scrambled, basis, tiny_config)

    def lost(weights: dict[str, Tensor]) -> float:
        energy_D = weights["embeddings.weight"][batch_of(tiny_config).inputs_BT.flatten()].square().sum(0)
        return float(energy_D[half:].sum() / energy_D.sum())

    assert lost(scrambled) > 0.1
    assert lost(found) < 1e-9  # the covariance adds up float32 products


def test_a_basis_that_is_none_is_refused(tiny_config: ModelConfig, weights: dict[str, Tensor]) -> None:
    size = tiny_config.hidden_size
    with pytest.raises(ValueError, match=rf"basis is \[{size}, 3\]; the model's hidden size needs \[{size}, {size}\]"):
        rotate_weights(weights, torch.eye(size)[:, :3], tiny_config)
    with pytest.raises(ValueError, match=r"basis is not orthonormal: an entry of B\^T B is 3\.0e\+00 off"):
        rotate_weights(weights, 2 * torch.eye(size), tiny_config)
