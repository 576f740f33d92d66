"""The ranking of layers by iterative removal (arXiv 2511.16664), with no layer run that cannot change its outcome.

Each round removes the layer j whose absence changes the logits least: s_j = sum (M_full - M_-j)^2 / sum M_full^2, where
M_-j lacks j and every layer removed before. A score is a sum over batches of terms that are not negative. Therefore a
candidate is dropped, exactly, as soon as its partial sum exceeds the whole sum of another. The divisor is the same for
all candidates, and is left out.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic_core.geometry import ATTENTION, ModelConfig
from elastic_core.layers.kernels import select_backend
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import full_subnet
from elastic_core.training.tokens import TokenBatch

# Called with (groups of batches, candidates, remaining layers), all rising; of each batch the terms of the candidates.
Terms = Callable[[range, Sequence[int], Sequence[int]], list[list[float]]]
OnRemoved = Callable[[Sequence[int]], None]


def rank_layers(
    config: ModelConfig,
    smallest_depth: int,
    terms: Terms,
    groups: int,
    *,
    removed: Sequence[int] = (),
    on_removed: OnRemoved | None = None,
) -> tuple[int, ...]:
    """All layers: the `smallest_depth` that every subnet keeps, in model order; then the others, last removed first.

    `terms` measures candidates on the calibration batches, which come in `groups`: one batch a device. Nothing is run
    to order the layers that every subnet keeps. `removed` are the layers that earlier rounds removed, in order;
    `on_removed` gets all of them after each round, so that an interrupted ranking goes on. The last attention layer
    stays.
    """
    gone = list(removed)
    remaining = [layer for layer in range(config.num_layers) if layer not in gone]
    while len(remaining) > smallest_depth:
        least = _least_important(terms, groups, _removable(config, remaining), remaining)
        remaining.remove(least)
        gone.append(least)
        if on_removed is not None:
            on_removed(gone)
    return (*remaining, *reversed(gone))


def _removable(config: ModelConfig, remaining: Sequence[int]) -> list[int]:
    """The layers that may go next: all but the last attention layer, without which engines' caches do not work."""
    attention = [layer for layer in remaining if config.hybrid_override_pattern[layer] == ATTENTION]
    return [layer for layer in remaining if attention != [layer]]


def _least_important(terms: Terms, groups: int, candidates: Sequence[int], remaining: Sequence[int]) -> int:
    """The candidate with the least sum of terms; the first of several that are equal.

    The best on the first group is summed over all groups first. Its sum is the bar that the others are held against.
    """
    sums = dict.fromkeys(candidates, 0.0)

    def add(which: range, layers: Sequence[int]) -> None:
        for of_batch in terms(which, layers, remaining):
            for layer, term in zip(layers, of_batch, strict=True):
                if not math.isfinite(term):
                    raise ValueError(f"without layer {layer} the teacher's last hidden states are not finite numbers")
                sums[layer] += term

    add(range(1), candidates)
    guess = min(candidates, key=lambda layer: sums[layer])
    add(range(1, groups), [guess])
    alive = [layer for layer in candidates if layer != guess]
    for group in range(1, groups):
        alive = [layer for layer in alive if sums[layer] <= sums[guess]]
        if not alive:
            break
        add(range(group, group + 1), alive)
    return min((layer for layer in candidates if layer in {guess, *alive}), key=lambda layer: sums[layer])


class RemovalTerms:
    """The terms of `rank_layers` over one device's batches: it runs the model on them with layers left out."""

    @torch.no_grad()
    def __init__(self, model: ElasticNemotronH, batches: Sequence[TokenBatch]) -> None:
        self._model, self._gram_DD = model, _gram(model.lm_head.weight)
        self._batches = [batch.to(self._gram_DD.device) for batch in batches]
        full = full_subnet(model.config)
        self._full_hidden = [model(batch.inputs_BT, full, packing=batch.packing) for batch in self._batches]

    @torch.no_grad()
    def on(self, groups: range, candidates: Sequence[int], remaining: Sequence[int]) -> list[list[float]]:
        """sum (M_full - M_-j)^2 of every candidate j on this device's batch of each group, where it has one.

        Waits for the device once, at the end.
        """
        own = groups[: max(0, len(self._batches) - groups.start)]
        rows = [self._on_batch(number, set(candidates), remaining) for number in own]
        terms: list[list[float]] = torch.stack(rows).tolist() if rows else []
        return terms

    def _on_batch(self, number: int, candidates: set[int], remaining: Sequence[int]) -> Tensor:
        """The terms of a batch, float64 (candidates,); the layers before a candidate run once for all of them."""
        batch, full_BTD = self._batches[number], self._full_hidden[number]
        model, full = self._model, full_subnet(self._model.config)
        backend = select_backend(model.backend, full_BTD.device)
        last = max(candidates)
        terms = list[Tensor]()
        before_BTD = model.embeddings(batch.inputs_BT)
        for position, layer in enumerate(remaining):
            if layer in candidates:
                x_BTD = before_BTD
                for later in remaining[position + 1 :]:
                    x_BTD = model.layers[later](x_BTD, full, None, None, backend, batch.packing)
                terms.append(_squared_logits(full_BTD - model.norm_f(x_BTD), self._gram_DD))
            if layer == last:
                break
            before_BTD = model.layers[layer](before_BTD, full, None, None, backend, batch.packing)
        return torch.stack(terms)


def _gram(head_VD: Tensor) -> Tensor:
    """W^T W in float64, (D, D), summed over blocks of the vocabulary."""
    gram_DD = torch.zeros(head_VD.shape[1], head_VD.shape[1], dtype=torch.float64, device=head_VD.device)
    for block in head_VD.split(8192):
        gram_DD.addmm_(block.T.double(), block.double())
    return gram_DD


def _squared_logits(hidden_BTD: Tensor, gram_DD: Tensor) -> Tensor:
    """sum (h W^T)^2 = sum h (W^T W) h^T, which needs no tokens x vocabulary tensor."""
    hidden = hidden_BTD.flatten(0, -2).double()
    return (hidden @ gram_DD * hidden).sum()
