"""The root-mean-square norm that every layer begins with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.layers.ssm import joined, segments
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
        kept = None if mask_D is None else mask_D.to(dtype).sum()

        outputs = []
        for segment_BTD in segments(x_BTD):
            wide = segment_BTD.to(dtype)
            if kept is None:
                normed = F.rms_norm(wide, weight.shape, weight, self.eps)
            else:
                normed = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / kept + self.eps) * weight
            outputs.append(normed.to(x_BTD.dtype))
        return joined(outputs)
