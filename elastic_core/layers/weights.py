"""A subnet's weights as views, whose gradients cost what the views cost (C3)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic_core.layout import Kept, Layout


def take(weight: Tensor, layout: Layout, kept: Kept) -> Tensor:
    """What is kept of a weight; a view where one prefix is all of it.

    The gradient is added in place to what is kept of `weight.grad`. Plain autograd would allocate a full-size zero
    tensor for each use, so that a small subnet's step would cost as much as the full one's.
    """
    if layout.is_whole(kept):
        return weight
    if torch.is_grad_enabled() and weight.requires_grad:
        taken: Tensor = _Take.apply(weight, layout, kept)  # type: ignore[no-untyped-call]
        return taken
    return layout.join(layout.views(weight, kept))


def gradient(weight: Tensor) -> Tensor:
    """The gradient of a leaf, zero if there is none yet."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


class _Take(torch.autograd.Function):
    """`take` with a gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, layout: Layout, kept: Kept) -> Tensor:
        assert weight.is_leaf, "the gradient of a part is added to the gradient of a leaf"
        ctx.weight, ctx.layout, ctx.kept = weight, layout, kept
        return layout.join(layout.views(weight, kept))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.layout.add(gradient(ctx.weight), ctx.kept, grad)
        return None, None, None
