"""How the tokens of a step spread over the experts of each layer: two curves, and a balance without a loss of its own.

The selection bias of an expert chooses and weighs nothing, so no gradient reaches it. It may follow the load instead
(arXiv 2408.15664): after each step, b_i falls by a fixed rate where more tokens chose expert i than the mean of the
experts that they could choose among, and rises where fewer did.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from elastic_core.layers.moe import Mixture
from elastic_core.training.parallel import World


@dataclass(slots=True)
class Routing:
    """What the layers of experts chose for the tokens of one micro-batch.

    `kept` has the kept experts of each layer, and `excess`, by layer and expert, their number times its tokens, less
    the tokens of all: a whole number above 0 where the expert has more than the mean, and 0 where it is not kept.
    """

    kept: dict[int, list[int]] = field(default_factory=dict)
    excess: dict[int, Tensor] = field(default_factory=dict)
    loads: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)

    def see(self, layer: int, experts: int, kept: list[int], chosen_NS: Tensor, scores_NX: Tensor) -> None:
        """Count what one layer of `experts` chose among those `kept`, of which `chosen_NS` are indices."""
        counts_X = chosen_NS.flatten().bincount(minlength=len(kept))
        above_X = len(kept) * counts_X - counts_X.sum()
        self.kept[layer] = kept
        self.excess[layer] = counts_X.new_zeros(experts).index_copy_(
            0, torch.tensor(kept, device=counts_X.device), above_X
        )
        self.loads.append(len(kept) * counts_X.max() / counts_X.sum())
        shares_NX = scores_NX / scores_NX.sum(-1, keepdim=True)
        self.entropies.append(torch.special.entr(shares_NX).sum(-1).mean())

    def curves(self) -> dict[str, Tensor]:
        """Means over the layers: tokens of the most chosen expert over the mean, and nats of a token's scores."""
        if not self.loads:
            return {}
        return {
            "expert_load": torch.stack(self.loads).mean(),
            "expert_entropy": torch.stack(self.entropies).mean(),
        }


@contextmanager
def watched(model: nn.Module) -> Iterator[Routing]:
    """What the experts of `model` choose while the block runs. A second forward pass, after it, is not counted."""
    routing, mixtures = Routing(), _mixtures(model)
    for mixture in mixtures:
        mixture.see = routing.see
    try:
        yield routing
    finally:
        for mixture in mixtures:
            mixture.see = None


def _mixtures(model: nn.Module) -> list[Mixture]:
    return [module for module in model.modules() if isinstance(module, Mixture)]


def give_idle_gradients(model: nn.Module, seen: Iterable[Routing]) -> None:
    """Zero gradients for the experts that were kept and that no token chose.

    Where several processes train they have these (`Mixture.runs_idle`), and an optimizer that leaves out what has no
    gradient, its momentum and decay too, would train other weights in one process.
    """
    kept: dict[int, set[int]] = {}
    for routing in seen:
        for layer, experts in routing.kept.items():
            kept.setdefault(layer, set()).update(experts)
    for mixture in _mixtures(model):
        for expert in kept.get(mixture.layer, ()):
            for weight in mixture.experts[expert].parameters():
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)


@torch.no_grad()
def balance(model: nn.Module, seen: Sequence[Routing], rate: float, world: World) -> None:
    """Move the selection biases of `model` by `rate`, against what was chosen in all micro-batches and processes.

    Loads over the means of subnets that keep fewer experts count as those of others: all are brought to one multiple of
    the kept numbers, so that the sums stay whole.
    """
    common = math.lcm(*(len(kept) for routing in seen for kept in routing.kept.values()))
    biases = {mixture.layer: mixture.gate.e_score_correction_bias for mixture in _mixtures(model)}
    totals = {layer: torch.zeros(len(bias), dtype=torch.int64, device=bias.device) for layer, bias in biases.items()}
    for routing in seen:
        for layer, excess in routing.excess.items():
            totals[layer] += excess * (common // len(routing.kept[layer]))
    means = torch.tensor(world.mean(torch.cat(list(totals.values()))), dtype=torch.float64)
    for bias, mean in zip(biases.values(), means.split([len(bias) for bias in biases.values()]), strict=True):
        bias.sub_(rate * mean.sign().to(bias))
