"""How much each component of the teacher matters along its widths, from forward passes.

arXiv 2511.16664, section on importance estimation. Only the teacher and calibration tokens are needed, no gradients.
Layers are ranked in depth.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.files.reorder import Order
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.layers.kernels import select_backend
from elastic_core.layers.kind import descending
from elastic_core.layers.kinds import KINDS
from elastic_core.layout import WHOLE
from elastic_core.model import ElasticNemotronH, Layer
from elastic_core.recipe import Scores
from elastic_core.training.tokens import TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthScores:
    """Importance of every component, in float64; higher is kept.

    `hidden_D` is that of the hidden channels, `layers` has the scores of each layer's own components, as its kind
    gives them. `energy_D` is no importance: the mean square of each hidden channel in what the norms give before their
    weights.
    """

    hidden_D: Tensor
    energy_D: Tensor
    layers: tuple[Tensor, ...]


@torch.no_grad()
def width_scores(model: ElasticNemotronH, batches: Iterable[TokenBatch], by: Scores = "added") -> WidthScores:
    """Importance of hidden channels and of each layer's components.

    `batches` yields calibration tokens; only their inputs are read. With X the input of a layer, summed over tokens:
    hidden channel i: |RMSNorm(X)|_i over all layers. The kinds say how they score their components.
    """
    device = model.embeddings.weight.device
    size, eps = model.config.hidden_size, model.config.layer_norm_epsilon
    hidden_D, energy_D = torch.zeros(2, size, dtype=torch.float64, device=device)
    layers: dict[int, Tensor] = {}
    backend = select_backend(model.backend, device)
    for batch in (batch.to(device) for batch in batches):
        x_BTD = model.embeddings(batch.inputs_BT)
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            normed_BTD = layer.norm(x_BTD)
            hidden_D += normed_BTD.abs().sum((0, 1))
            energy_D += (
                F.rms_norm(x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32)), (size,), eps=eps)
                .square()
                .sum((0, 1))
            )
            if by == "added":
                sums, output_BTD = layer.kind.added(layer.mixer, normed_BTD, backend, batch.packing)
            else:
                sums = layer.kind.activations(layer.mixer, normed_BTD, signed=by == "signed").double()
                output_BTD = layer.mixer(normed_BTD, WHOLE, None, None, backend, batch.packing)
            layers[index] = layers[index] + sums if index in layers else sums
            x_BTD = x_BTD + output_BTD
    return WidthScores(hidden_D=hidden_D, energy_D=energy_D / energy_D.mean(), layers=tuple(layers.values()))


def importance_order(config: ModelConfig, scores: WidthScores, layer_ranking: Sequence[int], axes: Axes) -> Order:
    """The order of importance on every axis, for subnets of these (bound) axes."""
    kept = {axis: axes.choices(axis)[-1] for axis in axes.shared}
    entries: dict[str, list[Tensor]] = {axis: [] for axis in Axes.ORDERED}
    for kind, of_layer in zip(config.hybrid_override_pattern, scores.layers, strict=True):
        for axis, entry in KINDS[kind].order(config, of_layer, kept).items():
            entries[axis].append(entry)
    in_layers: dict[str, Any] = {axis: tuple(of_axis) for axis, of_axis in entries.items()}
    hidden = descending(scores.hidden_D)
    energy_D = scores.energy_D.cpu()[hidden].float()
    return Order(hidden=hidden, layers=tuple(layer_ranking), energy=energy_D, **in_layers)
