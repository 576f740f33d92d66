"""The root-mean-square norm that every layer begins with, and what a narrower stream changes in it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.layers.ssm import joined, segments
from elastic_core.layers.tiles import over_tiles
from elastic_core.layers.weights import take
from elastic_core.layout import Layout, grid


class Energy:
    """How the mean square of the residual stream is spread over its channels, and the gain that follows for a subnet.

    The norm of the full model divides by the root of E/D, where E is the square of the stream's length over all D
    channels. The norm of a subnet divides by the root of E_d/d over its first d channels. Where the first channels
    carry more than their share, as principal components do, that root is larger, so the subnet's layers would read a
    smaller stream than the full model's. gain(d) = sqrt(sum_{i<d} e_i / d) makes up for it; e_i is the mean square of
    channel i at a root mean square of 1, and gain(D) = 1. A slice has the gain in the weights of its norms.
    """

    def __init__(self, of_channel_D: Tensor) -> None:
        energy_D = of_channel_D.double().cpu()
        self._of_channel_D = energy_D * (len(energy_D) / energy_D.sum())
        kept = torch.arange(1, len(energy_D) + 1, dtype=torch.float64)
        self._gains: list[float] = (self._of_channel_D.cumsum(0) / kept).sqrt().tolist()
        self._gains[-1] = 1.0
        self._on_device: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def gain(self, hidden: int) -> float:
        """What the weights of the norms are multiplied by in a subnet of the first `hidden` channels."""
        return self._gains[hidden - 1]

    def scaled(self, weight: Tensor, hidden: int) -> Tensor:
        """The weight of a norm over `hidden` channels, or some rows of it, times its gain, in at least float32.

        Never rounded to less: a slice keeps it so, and has the function of its subnet in whichever type both are read.
        """
        gain = self.gain(hidden)
        return weight if gain == 1.0 else weight.to(torch.promote_types(weight.dtype, torch.float32)) * gain

    def masked_gain(self, mask_D: Tensor) -> Tensor:
        """`gain` where a soft mask in [0, 1] weighs the first channels, ()."""
        key = (mask_D.device, mask_D.dtype)
        if key not in self._on_device:
            with torch.inference_mode(False):  # what is kept must serve training too
                self._on_device[key] = self._of_channel_D.to(mask_D.device, mask_D.dtype)
        return ((self._on_device[key][: len(mask_D)] * mask_D).sum() / mask_D.sum()).sqrt()

    def permuted(self, order_D: Tensor) -> "Energy":
        """The same after the channels were put in another order."""
        return Energy(self._of_channel_D[order_D])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the hidden channels, in at least float32.

    With an `energy` a subnet's output is scaled to the size that the full model's has.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.energy: Energy | None = None
        self.eps, self._layout = eps, Layout((grid(hidden=size),))

    def forward(self, x_BTD: Tensor, mask_D: Tensor | None = None) -> Tensor:
        """Under a mask, which `x_BTD` already carries, the mean is over the channels that the mask keeps."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        mask_D = None if mask_D is None else mask_D.to(dtype)
        weight = self._scaled(take(self.weight, self._layout, {"hidden": x_BTD.shape[-1]}).to(dtype), mask_D)
        if mask_D is not None:
            return over_tiles(self._masked, (x_BTD,), (weight, mask_D.sum()))
        pieces = (segment_BTD.to(dtype) for segment_BTD in segments(x_BTD))
        return joined([F.rms_norm(wide, weight.shape, weight, self.eps).to(x_BTD.dtype) for wide in pieces])

    def _scaled(self, weight_D: Tensor, mask_D: Tensor | None) -> Tensor:
        if self.energy is None:
            return weight_D
        if mask_D is not None:
            return weight_D * self.energy.masked_gain(mask_D)
        return self.energy.scaled(weight_D, len(weight_D))

    def _masked(self, x_BTD: Tensor, weight_D: Tensor, kept: Tensor) -> Tensor:
        wide = x_BTD.to(weight_D.dtype)
        normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / kept + self.eps) * weight_D
        return normed.to(x_BTD.dtype)
