"""The elastic Nemotron-H: a hybrid of Mamba-2, attention and FFN layers that runs at any subnet.

A subnet is an argument. Every layer multiplies only the subnet's weights, which are views of prefixes (C3), so that
a step costs what the submodel costs. Parameters have the names and shapes of the stock checkpoint without its
`backbone.` prefix.

Shape suffixes, in the whole package unless a module says otherwise:
    B batch   T tokens   D hidden   H ssm heads   P ssm head dim   G groups   N state   R heads in a group
    Q query heads   K key-value heads   E attention head dim   F ffn   V vocab   C chunks
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from elastic_core.geometry import ModelConfig
from elastic_core.layers.kernels import Backend, BackendName, select_backend
from elastic_core.layers.kind import Cache as Cache
from elastic_core.layers.kind import Padding as Padding
from elastic_core.layers.kinds import KINDS
from elastic_core.layers.norm import Energy, RMSNorm
from elastic_core.layers.packing import Packing
from elastic_core.layers.weights import gradient, take
from elastic_core.layout import Layout, grid
from elastic_core.subnet import Masks, Subnet, kept_at, masks_at


def is_matrix(weight: Tensor) -> bool:
    """Whether a weight is a matrix, and not one of the few and small others: norms, A_log, D, dt_bias, convolutions.

    Those are computed in float32, whatever the matrices are multiplied in, keep the type that they are stored in, and
    do not decay: a decayed A_log or dt_bias forgets at another speed, and a decayed norm only trades size with the
    matrix that follows.
    """
    return weight.ndim == 2


def keeps_type(name: str, dimensions: int) -> bool:
    """Whether a tensor keeps the type that it is stored in: all that is no matrix, and the router of experts.

    A router is computed in float32, and near a tie its rounding chooses another expert.
    """
    return dimensions != 2 or name.endswith(".gate.weight")


def _sums_by_token(tokens_T: Tensor, values_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The values of equal tokens summed in float32: the sorted tokens, and the sum at the first of each, else zeros.

    A sum in bfloat16 stops growing after a few hundred terms, and a common token has thousands. Sizes do not depend on
    the data, so that nothing waits for the device.
    """
    sorted_T, order_T = tokens_T.sort(stable=True)
    sums_TD = torch.zeros_like(values_TD, dtype=torch.float32)
    sums_TD.index_put_((torch.searchsorted(sorted_T, sorted_T),), values_TD[order_T].float(), accumulate=True)
    return sorted_T, sums_TD


class _Embed(torch.autograd.Function):
    """Rows of the embedding at a hidden size; only the rows that were read get a gradient, in place."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens_BT: Tensor, hidden: int) -> Tensor:
        ctx.weight, ctx.hidden = weight, hidden
        ctx.save_for_backward(tokens_BT)
        return F.embedding(tokens_BT, weight[:, :hidden])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[None, None, None]:
        (tokens_BT,) = ctx.saved_tensors
        kept = gradient(ctx.weight)[:, : ctx.hidden]
        rows, values = tokens_BT, grad_BTD
        if kept.dtype.itemsize < torch.float32.itemsize:
            rows, values = _sums_by_token(tokens_BT.flatten(), grad_BTD.flatten(0, 1))
        # Not index_add_, whose order of addition on CUDA changes from run to run (C6).
        kept.index_put_((rows,), values.to(kept.dtype), accumulate=True)
        return None, None, None


class Layer(nn.Module):
    """One residual layer: a norm and a mixer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.index, self.kind = config, layer, KINDS[config.hybrid_override_pattern[layer]]
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = self.kind.mixer(config, layer)

    def forward(
        self,
        x_BTD: Tensor,
        subnet: Subnet,
        masks: Masks | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None = None,
    ) -> Tensor:
        kept = kept_at(subnet, self.config, self.index)
        if masks is None:
            update: Tensor = self.mixer(self.norm(x_BTD), kept, None, cache, backend, packing)
            return x_BTD + update
        soft = masks_at(masks, self.config, self.index)
        update = self.mixer(self.norm(x_BTD, masks.hidden), kept, soft, cache, backend, packing)
        return x_BTD + update * (masks.layers[self.index] * masks.hidden).to(update.dtype)


class ElasticNemotronH(nn.Module):
    """A Nemotron-H language model that runs at any subnet of itself."""

    def __init__(self, config: ModelConfig, backend: BackendName = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, backend
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._head = Layout((grid(vocab=config.vocab_size),), (grid(hidden=config.hidden_size),))

    @property
    def energy(self) -> Energy | None:
        """What scales the norms of subnets."""
        return self.norm_f.energy

    def scale_norms(self, energy: Energy | None) -> None:
        """Scale the norms of subnets by `energy`, or, without one, not at all. The full model stays as it is."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.norm.energy = energy
        self.norm_f.energy = energy

    def forward(
        self,
        tokens_BT: Tensor,
        subnet: Subnet,
        masks: Masks | None = None,
        cache: Cache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Last hidden states (B, T, subnet.hidden), after the final norm.

        `masks` weigh the widths of `subnet`, which encloses every choice that has weight. With a `cache`, the tokens
        continue those that the cache has seen, at the same subnet. Each document of a `packing` is read as if it
        stood alone: no bit of its hidden states, or of a gradient of them, depends on the documents before it.
        """
        if packing is not None and cache is not None:
            raise ValueError("a cache holds one text a row; read packed documents without one")
        if cache is not None:
            cache.read(tokens_BT.shape[1])
        backend = select_backend(self.backend, tokens_BT.device)
        x_BTD = self._embed(tokens_BT, subnet.hidden)
        if masks is not None:
            x_BTD = x_BTD * masks.hidden.to(x_BTD.dtype)
        for index in subnet.layers:
            x_BTD = self.layers[index](x_BTD, subnet, masks, cache, backend, packing)
        hidden_BTD: Tensor = self.norm_f(x_BTD, masks.hidden if masks else None)
        return hidden_BTD

    def _embed(self, tokens_BT: Tensor, hidden: int) -> Tensor:
        weight = self.embeddings.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            x_BTD: Tensor = _Embed.apply(weight, tokens_BT, hidden)  # type: ignore[no-untyped-call]
        else:
            x_BTD = F.embedding(tokens_BT, weight[:, :hidden])
        device = x_BTD.device.type
        return x_BTD.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x_BTD

    def head_weight(self, hidden: int) -> Tensor:
        """The output head over the first `hidden` channels, (V, hidden)."""
        return take(self.lm_head.weight, self._head, {"hidden": hidden})

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (B, T, V) of last hidden states, in at least float32."""
        logits_BTV = F.linear(hidden_BTD, self.head_weight(hidden_BTD.shape[-1]))
        return logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: normal, residual projections over sqrt(layers), A and dt as Mamba-2 draws them."""
        std = self.config.initializer_range
        self.embeddings.weight.normal_(0.0, std, generator=generator)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.norm.weight.fill_(1.0)
            for name, weight in layer.mixer.named_parameters():
                layer.kind.initialise(name, weight, self.config, generator)
        self.norm_f.weight.fill_(1.0)
        self.lm_head.weight.normal_(0.0, std, generator=generator)
