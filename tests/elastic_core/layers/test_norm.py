"""Laws of the stream's norm and of the gain by which a narrower one makes up for the channels that it does not see."""

import math

import pytest
import torch
from torch import Tensor

from elastic_core.layers.norm import Energy, RMSNorm

SIZE = 12
FLOAT64_SUM = 1e-12  # relative: a dozen roundings of float64


def energies(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(SIZE, generator=generator, dtype=torch.float64).sort(descending=True).values + 0.01


def norm_with(energy: Energy | None, eps: float = 1e-5) -> RMSNorm:
    norm = RMSNorm(SIZE, eps).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2.0, SIZE))
    norm.energy = energy
    return norm


def stream(rows: int = 5) -> Tensor:
    return torch.randn(1, rows, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("kept", range(1, SIZE + 1))
def test_a_gain_is_the_root_of_the_kept_channels_energy_over_their_number(kept: int) -> None:
    energy_D = energies(0)
    share = sum(energy_D.tolist()[:kept]) / sum(energy_D.tolist())
    assert Energy(energy_D).gain(kept) == pytest.approx(math.sqrt(share * SIZE / kept), rel=FLOAT64_SUM)


def test_the_full_model_has_no_gain_at_all() -> None:
    for seed in range(50):
        energy = Energy(energies(seed).float())
        assert energy.gain(SIZE) == 1.0
        assert torch.equal(norm_with(energy)(stream()), norm_with(None)(stream()))


@pytest.mark.parametrize("kept", [3, 7, 11])
def test_a_subnets_norm_gives_what_the_full_models_does_where_the_other_channels_are_empty(kept: int) -> None:
    """The purpose: what is cut carries nothing, so nothing of what the layers read may change. eps is no channel's."""
    x_BTD = stream()
    x_BTD[..., kept:] = 0
    energy_D = energies(1)
    energy_D[kept:] = 0
    full = norm_with(Energy(energy_D), eps=0.0)(x_BTD)[..., :kept]
    assert relative(norm_with(Energy(energy_D), eps=0.0)(x_BTD[..., :kept]), full) < FLOAT64_SUM
    assert relative(norm_with(None, eps=0.0)(x_BTD[..., :kept]), full) > 0.01


@pytest.mark.parametrize("kept", [1, 5, SIZE])
def test_a_mask_of_zeros_and_ones_is_the_subnet(kept: int) -> None:
    norm, x_BTD = norm_with(Energy(energies(2))), stream()
    mask_D = (torch.arange(SIZE) < kept).double()
    masked = norm(x_BTD * mask_D, mask_D)
    assert relative(masked[..., :kept], norm(x_BTD[..., :kept])) < FLOAT64_SUM
    assert not masked[..., kept:].any()


def test_a_soft_mask_weighs_energies_as_it_weighs_channels_and_gets_the_gradient_of_both() -> None:
    energy_D, energy = energies(4), Energy(energies(4))
    mask_D = torch.linspace(1.0, 0.1, 8, dtype=torch.float64).requires_grad_(True)
    of_channel = energy_D * SIZE / energy_D.sum()
    expected = math.sqrt(sum(e * m for e, m in zip(of_channel.tolist(), mask_D.tolist(), strict=False)) / 4.4)
    assert energy.masked_gain(mask_D).item() == pytest.approx(expected, rel=FLOAT64_SUM)
    assert torch.autograd.gradcheck(energy.masked_gain, (mask_D,))


def test_a_permuted_energy_is_that_of_the_permuted_channels() -> None:
    energy_D, order_D = energies(5), torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    permuted, expected = Energy(energy_D).permuted(order_D), Energy(energy_D[order_D])
    assert [permuted.gain(kept) for kept in range(1, SIZE)] == pytest.approx(
        [expected.gain(kept) for kept in range(1, SIZE)], rel=FLOAT64_SUM
    )


def test_the_weights_gradient_has_the_gain() -> None:
    norm, x_BTD = norm_with(Energy(energies(6))), stream()[..., :5]
    norm(x_BTD).sum().backward()
    scaled = norm.weight.grad[:5].clone()
    norm.weight.grad, norm.energy = None, None
    norm(x_BTD).sum().backward()
    assert relative(scaled, norm.weight.grad[:5] * Energy(energies(6)).gain(5)) < FLOAT64_SUM
