"""How much each part of the teacher matters: width scores from forward passes, and the iterative ranking of layers.

arXiv 2511.16664, section on importance estimation. Only the teacher and calibration tokens are needed, no gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_core.files.reorder import Order
from elastic_core.geometry import ATTENTION, Axes, ModelConfig
from elastic_core.layers.kernels import select_backend
from elastic_core.layers.kind import descending
from elastic_core.layers.kinds import KINDS
from elastic_core.layout import WHOLE
from elastic_core.model import ElasticNemotronH, Layer
from elastic_core.recipe import MambaScores
from elastic_core.subnet import full_subnet
from elastic_core.training.tokens import TokenBatch

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthScores:
    """Importance of every component, in float64; higher is kept.

    `hidden_D` is that of the hidden channels, `layers` has the scores of each layer's own components, as its kind
    gives them.
    """

    hidden_D: Tensor
    layers: tuple[Tensor, ...]


@torch.no_grad()
def width_scores(
    model: ElasticNemotronH, batches: Iterable[TokenBatch], channel_scores: MambaScores = "absolute"
) -> WidthScores:
    """Activation-based importance of hidden channels and of each layer's components.

    `batches` yields calibration tokens; only their inputs are read. With X the input of a layer, summed over tokens:
    hidden channel i: |RMSNorm(X)|_i over all layers. The kinds say how they score their components.
    """
    device = model.embeddings.weight.device
    hidden_D = torch.zeros(model.config.hidden_size, dtype=torch.float64, device=device)
    layers: dict[int, Tensor] = {}
    backend = select_backend(model.backend, device)
    for batch in (batch.to(device) for batch in batches):
        x_BTD = model.embeddings(batch.inputs_BT)
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            normed_BTD = layer.norm(x_BTD)
            hidden_D += normed_BTD.abs().sum((0, 1))
            sums = layer.kind.scores(layer.mixer, normed_BTD, signed=channel_scores == "signed").double()
            layers[index] = layers[index] + sums if index in layers else sums
            x_BTD = x_BTD + layer.mixer(normed_BTD, WHOLE, None, None, backend, batch.packing)
    return WidthScores(hidden_D=hidden_D, layers=tuple(layers.values()))


def importance_order(config: ModelConfig, scores: WidthScores, layer_ranking: Sequence[int], axes: Axes) -> Order:
    """The order of importance on every axis, for subnets of these (bound) axes."""
    kept = {axis: axes.choices(axis)[-1] for axis in Axes.SHARED}
    entries: dict[str, list[Tensor]] = {axis: [] for axis in Axes.IN_LAYERS}
    for kind, of_layer in zip(config.hybrid_override_pattern, scores.layers, strict=True):
        for axis, entry in KINDS[kind].order(config, of_layer, kept).items():
            entries[axis].append(entry)
    in_layers: dict[str, Any] = {axis: tuple(of_axis) for axis, of_axis in entries.items()}
    return Order(hidden=descending(scores.hidden_D), layers=tuple(layer_ranking), **in_layers)


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
