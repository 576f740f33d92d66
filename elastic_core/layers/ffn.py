"""The FFN: two projections around a squared ReLU, not gated."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic_core.geometry import FFN, ModelConfig
from elastic_core.layers.kernels import Backend
from elastic_core.layers.kind import Cache, Flops, Kind, LayerShape, Mixer, ServingStep, Training, descending
from elastic_core.layers.packing import Packing
from elastic_core.layout import Kept, Layout, grid


class FeedForward(Mixer):
    """Two projections at any subnet."""

    residual = "down_proj.weight"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        width = config.ffn_sizes[config.ordinal(layer)]
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    @staticmethod
    def lay_out(model: ModelConfig, layer: int) -> dict[str, Layout]:
        hidden, neurons = (grid(hidden=model.hidden_size),), (grid(ffn=model.ffn_sizes[model.ordinal(layer)]),)
        return {"up_proj.weight": Layout(neurons, hidden), "down_proj.weight": Layout(hidden, neurons)}

    def components(
        self,
        x_BTD: Tensor,
        weights: Mapping[str, Tensor],
        kept: Kept,
        soft: Mapping[str, Tensor] | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None,
    ) -> Tensor:
        h_BTF = squared_relu_(F.linear(x_BTD, weights["up_proj.weight"]))
        if soft is not None:
            h_BTF = h_BTF * soft["ffn"].to(h_BTF.dtype)
        return h_BTF


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2, whose slope is 2 relu(x): autograd's own backward would take the square and the ReLU one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        slope: Tensor = grad * positive
        return slope.mul_(2)


def squared_relu_(x: Tensor) -> Tensor:
    """relu(x)^2, in place where no gradient is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        squared: Tensor = _SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
        return squared
    return x.relu_().square_()


class FeedForwardKind(Kind):
    """What an FFN layer answers."""

    letter, mixer = FFN, FeedForward

    def width(self, model: ModelConfig) -> tuple[str, object]:
        return "FFN width", model.intermediate_size

    def activations(self, mixer: Mixer, normed_BTD: Tensor, *, signed: bool) -> Tensor:
        """Neuron i: |RMSNorm(X) W1|_i, before the activation."""
        assert isinstance(mixer, FeedForward)
        return F.linear(normed_BTD, mixer.up_proj.weight).abs().sum((0, 1))

    def order(self, model: ModelConfig, scores: Tensor, kept: Mapping[str, int]) -> dict[str, Tensor]:
        return {"ffn": descending(scores)}

    def serving_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        """The neurons, and the output."""
        return serving.rows * (shape.width + shape.hidden) * serving.width

    def saved_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """The neurons after the ReLU, squared, and masked."""
        return (3 if step.masked else 2) * step.width * shape.width

    def gradient_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """The gradients of the squares, and of what the ReLU takes."""
        return step.width * 2 * shape.width

    def flops(self, model: ModelConfig, shape: LayerShape, tokens: int, *, last_projection: bool) -> Flops:
        return Flops(projections=(2 if last_projection else 1) * 2 * tokens * shape.hidden * shape.width)
