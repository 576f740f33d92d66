"""Floating-point operations of a training step at a subnet, per sequence; a multiply-add counts as two.

Counted is what the matrix units do: projections, the scan's products, attention, the head; and the convolution.
Elementwise work (norms, activations, softmax, decays) is bound by memory, and lookups cost none. A backward pass costs
twice its forward pass, for the gradients of both factors of every product; attention's costs two and a half times,
because it makes its scores again.
"""

from elastic_core.cost import shapes
from elastic_core.geometry import ModelConfig
from elastic_core.layers.kind import Flops
from elastic_core.layers.kinds import KINDS
from elastic_core.subnet import Subnet


def forward_flops(model: ModelConfig, subnet: Subnet, tokens: int) -> Flops:
    """One forward pass over a sequence, with its logits."""
    return _layers(model, subnet, tokens, last_projection=True) + Flops(
        head=2 * tokens * subnet.hidden * model.vocab_size
    )


def backward_flops(model: ModelConfig, subnet: Subnet, tokens: int) -> Flops:
    """The backward pass of `forward_flops`."""
    forward = forward_flops(model, subnet, tokens)
    return Flops(
        projections=2 * forward.projections,
        convolution=2 * forward.convolution,
        scan=2 * forward.scan,
        attention=5 * forward.attention // 2,
        head=2 * forward.head,
    )


def recomputed_flops(model: ModelConfig, subnet: Subnet, tokens: int, *, masked: bool = False) -> Flops:
    """What activation recomputation adds: every layer's forward pass once more.

    A layer is not run to its end: its last projection yields nothing that the backward pass reads, unless the router's
    masks weigh it.
    """
    return _layers(model, subnet, tokens, last_projection=masked)


def _layers(model: ModelConfig, subnet: Subnet, tokens: int, *, last_projection: bool) -> Flops:
    total = Flops()
    for shape in shapes(model, subnet):
        total += KINDS[shape.kind].flops(model, shape, tokens, last_projection=last_projection)
    return total
