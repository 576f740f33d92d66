"""Floating-point operations of a training step at a subnet, per sequence; a multiply-add counts as two.

Counted is what the matrix units do: projections, the scan's products, attention, the head; and the convolution.
Elementwise work (norms, activations, softmax, decays) is bound by memory, and lookups cost none. A backward pass costs
twice its forward pass, for the gradients of both factors of every product; attention's costs two and a half times,
because it makes its scores again.
"""

from dataclasses import dataclass, fields

from elastic_core.cost import Shape, shapes
from elastic_core.geometry import ATTENTION, FFN, MAMBA, ModelConfig
from elastic_core.subnet import Subnet


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs by part. `projections` are the weights' products but for the head's, `scan` the SSD scan's.

    `attention` is the two products of the scores, of which a causal kernel computes T (T + 1) / 2 a head, not T^2.
    """

    projections: int = 0
    convolution: int = 0
    scan: int = 0
    attention: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return self.projections + self.convolution + self.scan + self.attention + self.head

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


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
    kinds = {MAMBA: _mamba, ATTENTION: _attention, FFN: _ffn}
    for shape in shapes(model, subnet):
        total += kinds[shape.kind](model, shape, tokens, last_projection)
    return total


def _ffn(model: ModelConfig, shape: Shape, tokens: int, last_projection: bool) -> Flops:
    return Flops(projections=(2 if last_projection else 1) * 2 * tokens * shape.hidden * shape.width)


def _mamba(model: ModelConfig, shape: Shape, tokens: int, last_projection: bool) -> Flops:
    channels = shape.width * shape.mamba_head_dim
    in_proj = 2 * tokens * shape.hidden * (2 * channels + model.state_rows + shape.width)
    out_proj = 2 * tokens * channels * shape.hidden if last_projection else 0
    chunks, rest = divmod(tokens, model.chunk_size)
    scan = chunks * _scan_chunk(model, channels, model.chunk_size) + _scan_chunk(model, channels, rest)
    convolution = 2 * tokens * model.conv_kernel * (channels + model.state_rows)
    return Flops(projections=in_proj + out_proj, convolution=convolution, scan=scan)


def _scan_chunk(model: ModelConfig, channels: int, tokens: int) -> int:
    """The four products of ssm.py: scores, what targets read of sources, the chunk's state, what reads the state."""
    scores = 2 * model.n_groups * tokens**2 * model.ssm_state_size
    within = 2 * channels * tokens**2
    states = 2 * 2 * channels * model.ssm_state_size * tokens
    return scores + within + states


def _attention(model: ModelConfig, shape: Shape, tokens: int, last_projection: bool) -> Flops:
    queries, keys = shape.width * model.head_dim, model.num_key_value_heads * model.head_dim
    widths = queries + 2 * keys + (queries if last_projection else 0)
    return Flops(
        projections=2 * tokens * shape.hidden * widths,
        attention=2 * 2 * queries * (tokens * (tokens + 1) // 2),
    )
