"""Functions of each token alone, computed tile by tile, of which autograd keeps the inputs and nothing else.

The backward pass computes a tile again and differentiates it. What is in float32 on the way is there for one tile.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values of the widest input in a tile: 1 MiB of float32 stays in a core's cache; a GPU is kept busy by 128 MiB.
CPU_VALUES, GPU_VALUES = 2**18, 2**25


def over_tiles(function: Callable[..., Tensor], along: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    """`function(*along, *shared)`, (B, T, ...), computed over tiles of the tokens of `along`, each (B, T, ...).

    The function must treat every token alone. It can be differentiated once.
    """
    inputs = (*along, *shared)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        tiled: Tensor = _OverTiles.apply(function, len(along), *inputs)  # type: ignore[no-untyped-call]
        return tiled
    return _forward(function, along, shared)


def _forward(function: Callable[..., Tensor], along: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
    outputs = [function(*(tensor[:, tile] for tensor in along), *shared) for tile in _tiles(along)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _tiles(along: Sequence[Tensor]) -> Iterator[slice]:
    tokens = along[0].shape[1]
    values = CPU_VALUES if along[0].device.type == "cpu" else GPU_VALUES
    at_once = max(1, values * tokens // max(tensor.numel() for tensor in along))
    return (slice(start, start + at_once) for start in range(0, tokens, at_once))


class _OverTiles(torch.autograd.Function):
    """`over_tiles` with gradients; those of what all tiles share are summed in their own type, in the tiles' order."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], count: int, *inputs: Tensor) -> Tensor:
        ctx.function, ctx.count = function, count
        ctx.save_for_backward(*inputs)
        return _forward(function, inputs[:count], inputs[count:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, count = ctx.saved_tensors, ctx.count
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        gradients = {
            i: torch.empty(inputs[i].shape, dtype=inputs[i].dtype, device=grad.device) for i in wanted if i < count
        }
        gradients |= {i: torch.zeros_like(inputs[i]) for i in wanted if i >= count}
        for tile in _tiles(inputs[:count]):
            with torch.enable_grad():
                own = [tensor.detach() if i >= count else tensor[:, tile].detach() for i, tensor in enumerate(inputs)]
                for index in wanted:
                    own[index].requires_grad_()
                output = ctx.function(*own)
            for index, found in zip(
                wanted, torch.autograd.grad(output, [own[i] for i in wanted], grad[:, tile]), strict=True
            ):
                if index < count:
                    gradients[index][:, tile] = found
                else:
                    gradients[index] += found
        return None, None, *(gradients.get(index) for index in range(len(inputs)))
