"""How much each part of the teacher matters: width scores from forward passes, and the iterative ranking of layers.

arXiv 2511.16664, section on importance estimation. Only the teacher and calibration tokens are needed, no gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.files.reorder import Order
from elastic_core.geometry import ATTENTION, MAMBA, ModelConfig
from elastic_core.layers.kernels import select_backend
from elastic_core.model import Attention, ElasticNemotronH, FeedForward, Layer, MambaMixer
from elastic_core.recipe import MambaScores
from elastic_core.subnet import full_subnet
from elastic_core.training.tokens import TokenBatch

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthScores:
    """Importance of every component along each width axis, in float64; higher is kept.

    `ffn_F`, `mamba_HP` and `query_Q` have one entry a layer of their kind.
    """

    hidden_D: Tensor
    ffn_F: tuple[Tensor, ...]
    mamba_HP: tuple[Tensor, ...]
    query_Q: tuple[Tensor, ...]


@torch.no_grad()
def width_scores(
    model: ElasticNemotronH, batches: Iterable[TokenBatch], mamba_scores: MambaScores = "absolute"
) -> WidthScores:
    """Activation-based importance of hidden channels, FFN neurons, Mamba channels and query heads.

    `batches` yields calibration tokens; only their inputs are read. With X the input of a layer, summed over tokens:
    hidden channel i: |RMSNorm(X)|_i over all layers; FFN neuron i: |RMSNorm(X) W1|_i before the activation;
    Mamba (head, channel): |RMSNorm(X) W_x|, or where `mamba_scores` is signed RMSNorm(X) W_x, whose sum is small for a
    channel that is often large in both directions; query head: the norm of its query.
    """
    config, full = model.config, full_subnet(model.config)
    device = model.embeddings.weight.device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    hidden_D = zeros(config.hidden_size)
    ffn_F = tuple(zeros(width) for width in config.ffn_sizes)
    mamba_HP = tuple(zeros(config.mamba_num_heads, config.mamba_head_dim) for _ in config.layers_of(MAMBA))
    query_Q = tuple(zeros(config.num_attention_heads) for _ in config.layers_of(ATTENTION))
    backend = select_backend(model.backend, device)
    for batch in (batch.to(device) for batch in batches):
        x_BTD = model.embeddings(batch.inputs_BT)
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            mixer, ordinal = layer.mixer, config.ordinal(index)
            normed_BTD = layer.norm(x_BTD)
            hidden_D += normed_BTD.abs().sum((0, 1))
            if isinstance(mixer, FeedForward):
                ffn_F[ordinal].add_(F.linear(normed_BTD, mixer.up_proj.weight).abs().sum((0, 1)))
            elif isinstance(mixer, MambaMixer):
                x_rows = mixer.in_proj.weight[config.mamba_size : 2 * config.mamba_size]
                if mamba_scores == "absolute":
                    sums = F.linear(normed_BTD, x_rows).abs().sum((0, 1))
                else:
                    sums = F.linear(normed_BTD.sum((0, 1)), x_rows)
                mamba_HP[ordinal].add_(sums.view(mamba_HP[ordinal].shape))
            elif isinstance(mixer, Attention):
                queries = F.linear(normed_BTD, mixer.q_proj.weight).unflatten(-1, (-1, config.head_dim))
                query_Q[ordinal].add_(queries.norm(dim=-1).sum((0, 1)))
            x_BTD = x_BTD + mixer(normed_BTD, full, None, None, backend, batch.packing)
    return WidthScores(hidden_D=hidden_D, ffn_F=ffn_F, mamba_HP=mamba_HP, query_Q=query_Q)


def importance_order(
    config: ModelConfig, scores: WidthScores, layer_ranking: Sequence[int], kept_head_dim: int
) -> Order:
    """The order of importance on every axis.

    Mamba channels are ranked first, one order for all heads, by s_d = ||S_{:,d}||_2; then heads inside their group by
    f_h = ||S_{h,top}||_2 over the `kept_head_dim` best channels, those that every subnet keeps. Query heads are ranked
    inside their KV group.
    """
    channels = tuple(_descending(s_HP.norm(dim=0)) for s_HP in scores.mamba_HP)
    return Order(
        hidden=_descending(scores.hidden_D),
        ffn=tuple(_descending(s_F) for s_F in scores.ffn_F),
        mamba_channels=channels,
        mamba_heads=tuple(
            _descending_in_groups(s_HP[:, top[:kept_head_dim].to(s_HP.device)].norm(dim=1), config.n_groups)
            for s_HP, top in zip(scores.mamba_HP, channels, strict=True)
        ),
        query_heads=tuple(_descending_in_groups(s_Q, config.num_key_value_heads) for s_Q in scores.query_Q),
        layers=tuple(layer_ranking),
    )


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True).cpu()


def _descending_in_groups(scores: Tensor, groups: int) -> Tensor:
    in_group = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True).cpu()
    return (in_group + torch.arange(groups)[:, None] * in_group.shape[1]).flatten()


@torch.no_grad()
def rank_layers(
    model: ElasticNemotronH, batches: Sequence[TokenBatch], smallest_depth: int, progress: Progress | None = None
) -> tuple[int, ...]:
    """All layers, most important first, by iterative removal.

    Each round bypasses every remaining layer j in turn, on top of those already removed, scores it by
    s_j = sum (M_full - M_-j)^2 / sum M_full^2 over the logits M, and removes the least important, until
    `smallest_depth` layers remain; these are ordered by their scores in one last round. The last attention layer stays.
    """
    remaining = list(range(model.config.num_layers))
    removed: list[int] = []
    gram_DD = _gram(model.lm_head.weight)
    batches = [batch.to(gram_DD.device) for batch in batches]
    full = full_subnet(model.config)
    full_hidden = [model(batch.inputs_BT, full, packing=batch.packing) for batch in batches]
    rounds = len(remaining) - smallest_depth + 1
    for done in range(rounds):
        scores = _removal_scores(model, batches, full_hidden, gram_DD, remaining)
        if done < rounds - 1:
            least = min(_removable(model.config, remaining), key=lambda layer: scores[layer])
            remaining.remove(least)
            removed.append(least)
        if progress is not None:
            progress(done + 1, rounds)
    ranked = sorted(remaining, key=lambda layer: -scores[layer])
    return (*ranked, *reversed(removed))


def _removable(config: ModelConfig, remaining: Sequence[int]) -> list[int]:
    """The layers that may go next: all but the last attention layer, without which engines' caches do not work."""
    attention = [layer for layer in remaining if config.hybrid_override_pattern[layer] == ATTENTION]
    return [layer for layer in remaining if attention != [layer]]


def _removal_scores(
    model: ElasticNemotronH,
    batches: Sequence[TokenBatch],
    full_hidden: Sequence[Tensor],
    gram_DD: Tensor,
    remaining: Sequence[int],
) -> dict[int, float]:
    """s_j of every remaining layer; the layers before j run once for all of them."""
    full = full_subnet(model.config)
    backend = select_backend(model.backend, gram_DD.device)
    scores = dict.fromkeys(remaining, 0.0)
    total = sum(_squared_logits(hidden, gram_DD) for hidden in full_hidden)
    for batch, hidden_BTD in zip(batches, full_hidden, strict=True):
        before_BTD = model.embeddings(batch.inputs_BT)
        for position, layer in enumerate(remaining):
            x_BTD = before_BTD
            for later in remaining[position + 1 :]:
                x_BTD = model.layers[later](x_BTD, full, None, None, backend, batch.packing)
            scores[layer] += _squared_logits(hidden_BTD - model.norm_f(x_BTD), gram_DD) / total
            before_BTD = model.layers[layer](before_BTD, full, None, None, backend, batch.packing)
    return scores


def _gram(head_VD: Tensor) -> Tensor:
    """W^T W in float64, (D, D), summed over blocks of the vocabulary."""
    gram_DD = torch.zeros(head_VD.shape[1], head_VD.shape[1], dtype=torch.float64, device=head_VD.device)
    for block in head_VD.split(8192):
        gram_DD.addmm_(block.T.double(), block.double())
    return gram_DD


def _squared_logits(hidden_BTD: Tensor, gram_DD: Tensor) -> float:
    """sum (h W^T)^2 = sum h (W^T W) h^T, which needs no tokens x vocabulary tensor."""
    hidden = hidden_BTD.flatten(0, -2).double()
    return float((hidden @ gram_DD * hidden).sum())
