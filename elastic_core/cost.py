"""What a subnet costs: its parameters, exactly for a subnet, differentiably for the router's expected one (C4)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from elastic_core.config import ATTENTION, FFN, MAMBA, ModelConfig
from elastic_core.subnet import Subnet

Size = int | float | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """The sizes of a subnet as numbers or scalar tensors.

    `ffn`, `mamba_heads` and `attention_heads` have one entry a layer of their kind; `layers` has one entry a layer of
    the model: 1 kept, 0 dropped, or the probability of being kept.
    """

    hidden: Size
    ffn: Sequence[Size]
    mamba_heads: Sequence[Size]
    mamba_head_dim: Size
    attention_heads: Sequence[Size]
    layers: Sequence[Size]


def widths(model: ModelConfig, subnet: Subnet) -> Widths:
    """The widths of a subnet."""
    kept = set(subnet.layers)
    return Widths(
        hidden=subnet.hidden,
        ffn=subnet.ffn,
        mamba_heads=subnet.mamba_heads,
        mamba_head_dim=subnet.mamba_head_dim,
        attention_heads=subnet.attention_heads,
        layers=[int(i in kept) for i in range(model.num_layers)],
    )


def subnet_params(model: ModelConfig, subnet: Subnet) -> int:
    """Parameters of a subnet: the number of elements in its sliced checkpoint."""
    count = params(model, widths(model, subnet))
    assert isinstance(count, int), f"{count}"
    return count


def params(model: ModelConfig, w: Widths) -> Size:
    """Parameters of a submodel of these widths.

    The count is linear in each width, so that with expected widths of independent choices it is the expected count.
    """
    total: Size = embedding_params(model, w.hidden)
    for layer, kept in enumerate(w.layers):
        total = total + kept * layer_params(model, w, layer)
    return total


def embedding_params(model: ModelConfig, hidden: Size) -> Size:
    """Embedding, output head and final norm."""
    return 2 * model.vocab_size * hidden + hidden


def layer_params(model: ModelConfig, w: Widths, layer: int) -> Size:
    """One residual layer with its norm."""
    kind, ordinal = model.hybrid_override_pattern[layer], model.ordinal(layer)
    if kind == MAMBA:
        return mamba_params(model, w.hidden, w.mamba_heads[ordinal], w.mamba_head_dim)
    if kind == ATTENTION:
        return attention_params(model, w.hidden, w.attention_heads[ordinal])
    assert kind == FFN, kind
    return ffn_params(w.hidden, w.ffn[ordinal])


def mamba_params(model: ModelConfig, hidden: Size, heads: Size, head_dim: Size) -> Size:
    """in_proj [z, x, B, C, dt], conv1d over [x, B, C], A_log, D and dt_bias, gated norm, out_proj, layer norm."""
    channels = heads * head_dim
    in_proj = hidden * (2 * channels + model.state_rows + heads)
    conv = (channels + model.state_rows) * (model.conv_kernel + int(model.use_conv_bias))
    return in_proj + conv + 3 * heads + channels + channels * hidden + hidden


def attention_params(model: ModelConfig, hidden: Size, heads: Size) -> Size:
    """Query and output projections over `heads`, key and value projections over all KV heads, layer norm."""
    return 2 * hidden * model.head_dim * (heads + model.num_key_value_heads) + hidden


def ffn_params(hidden: Size, ffn: Size) -> Size:
    """Up and down projections, layer norm."""
    return 2 * hidden * ffn + hidden
