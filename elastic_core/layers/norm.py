"""The root-mean-square norm that every layer begins with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.layers.ssm import joined, segments
from elastic_core.layers.tiles import over_tiles
from elastic_core.layers.weights import take
from elastic_core.layout import Layout, grid


class RMSNorm(nn.Module):
    """Root-mean-square norm over the hidden channels, in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self._layout = eps, Layout((grid(hidden=size),))

    def forward(self, x_BTD: Tensor, mask_D: Tensor | None = None) -> Tensor:
        """Under a mask, which `x_BTD` already carries, the mean is over the channels that the mask keeps."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        weight = take(self.weight, self._layout, {"hidden": x_BTD.shape[-1]}).to(dtype)
        if mask_D is not None:
            return over_tiles(self._masked, (x_BTD,), (weight, mask_D.to(dtype).sum()))
        pieces = (segment_BTD.to(dtype) for segment_BTD in segments(x_BTD))
        return joined([F.rms_norm(wide, weight.shape, weight, self.eps).to(x_BTD.dtype) for wide in pieces])

    def _masked(self, x_BTD: Tensor, weight_D: Tensor, kept: Tensor) -> Tensor:
        wide = x_BTD.to(weight_D.dtype)
        normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / kept + self.eps) * weight_D
        return normed.to(x_BTD.dtype)
