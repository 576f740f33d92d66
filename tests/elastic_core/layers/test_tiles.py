"""What is computed over tiles is what is computed at once: value and gradients; and autograd keeps the inputs alone."""

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor

from elastic_core.layers import ssm, tiles
from elastic_core.layers.norm import RMSNorm
from elastic_core.layers.tiles import over_tiles

# Sums over tokens in another order, in float64.
EXACT = 1e-12
TOKENS, CHANNELS, GROUPS = 50, 24, 4


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def gated(y: Tensor, gate: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return ssm.gated_rms_norm(y, gate, weight, GROUPS, 1e-5, mask)


def gated_at_once(y: Tensor, gate: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    grouped = (y * torch.nn.functional.silu(gate) * mask).unflatten(-1, (GROUPS, -1))
    mean = grouped.square().sum(-1, keepdim=True) / mask.unflatten(-1, (GROUPS, -1)).sum(-1, keepdim=True)
    return (grouped / (mean + 1e-5).sqrt()).flatten(-2) * weight


def normed(x: Tensor, _: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    norm = RMSNorm(CHANNELS, 1e-5).double()
    del norm.weight
    norm.weight = weight  # which asks for a gradient as a parameter does
    return norm(x, mask)


def normed_at_once(x: Tensor, _: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) / mask.sum() + 1e-5).sqrt() * weight


def results(function, inputs: list[Tensor], wanted: list[int]) -> list[Tensor]:
    own = [tensor.clone().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
    output = function(*own)
    found = torch.autograd.grad(output, [own[index] for index in wanted], random(*output.shape))
    return [output.detach(), *found]


@pytest.mark.parametrize("wanted", [[0, 2, 3], [2, 3], [0]], ids=["all", "shared", "tokens"])
@pytest.mark.parametrize(
    ("tiled", "at_once"), [(gated, gated_at_once), (normed, normed_at_once)], ids=["gated norm", "norm"]
)
@pytest.mark.parametrize("tokens", [1, 7, TOKENS])
def test_a_tiled_norm_is_the_norm(tiled, at_once, wanted: list[int], tokens: int, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "CPU_VALUES", tokens * 2 * CHANNELS)
    inputs = [random(2, TOKENS, CHANNELS), random(2, TOKENS, CHANNELS + 0) + 1, random(CHANNELS), random(CHANNELS)]
    inputs[3] = inputs[3].sigmoid()
    for ours, theirs in zip(results(tiled, inputs, wanted), results(at_once, inputs, wanted), strict=True):
        assert torch.allclose(ours, theirs, rtol=EXACT, atol=EXACT * float(theirs.abs().max()))


def test_nothing_but_inputs_is_kept_and_a_tile_alone_is_wide(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "CPU_VALUES", 2**12)
    x, scale = torch.randn(1, 4096, 64).bfloat16().requires_grad_(), torch.ones(64, requires_grad=True)
    with LiveBytes([x, scale]) as counted:
        y = over_tiles(lambda x, scale: (x.float().exp() * scale).sin().to(x.dtype), (x,), (scale,))
        assert counted.live == y.nbytes
        y.backward(torch.ones_like(y))
    assert counted.peak < 4 * y.nbytes  # the output, its gradient, the input's, and some tiles in float32
