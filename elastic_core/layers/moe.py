"""A mixture of experts: each token passes through the few experts that a router chooses, and through a shared one.

Every expert is an FFN around a squared ReLU. The router is as transformers has it:

    s = sigmoid(W x)                             scores, in float32
    chosen = the k largest of s + b              b the selection bias; inside the groups that are chosen first
    g_j = scale s_j / (sum of s over chosen)     gates, without the bias

A subnet keeps the first experts of each group, the first neurons of each expert and the first latent channels, and may
choose fewer experts. The score of an expert under a mask m is multiplied by m. It is chosen by s + b as without a mask,
by -infinity where m is 0, whatever the sign of s + b: chosen by less, it would never be where m is small, and its gate
would tell the router nothing. Where k has a mask, the score of the i-th best is multiplied by its entry i.

Shape suffixes beside those of model.py: X experts   N tokens of all texts   S chosen experts of a token   W channels
that experts read and write.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.geometry import MOE, ModelConfig
from elastic_core.layers.ffn import squared_relu_
from elastic_core.layers.kernels import Backend
from elastic_core.layers.kind import (
    FLOAT32_BYTES,
    Cache,
    Flops,
    Kind,
    LayerShape,
    Mixer,
    ServingStep,
    Training,
    descending,
)
from elastic_core.layers.packing import Packing
from elastic_core.layers.weights import take
from elastic_core.layout import WHOLE, Kept, Layout, Member, Run, grid

INDEX_BYTES = 8
NO_MASKS: Mapping[str, Tensor] = {}


def expert_grid(model: ModelConfig) -> Run:
    """The routed experts: [group, expert in group]."""
    return grid(group=model.n_group, experts=model.n_routed_experts // model.n_group)


def _width(model: ModelConfig, layer: int) -> int:
    """The neurons of a layer's routed experts."""
    return model.full_sizes("expert_ffn")[model.ordinal(layer)]


class _Gate(nn.Module):
    """The router's weights; the bias chooses and weighs nothing, so that no gradient reaches it."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(model.n_routed_experts, model.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(model.n_routed_experts))


class _Expert(nn.Module):
    """The two projections of an expert."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(channels, width, bias=False)
        self.down_proj = nn.Linear(width, channels, bias=False)


class Mixture(Mixer):
    """Routed experts and a shared one at any subnet. An expert that no token chose is not read, unless `runs_idle`.

    Where several processes train together, a weight's gradient is averaged over all of them, so that each process needs
    one of every kept expert: `runs_idle` runs those that no token chose on no rows, and their gradients are zero.

    `see` is told of every choice: the layer, its experts, which of them are kept, the chosen (N, S), the scores (N, X).
    """

    residual = "down_proj.weight"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.runs_idle = False
        self.see: Callable[[int, int, list[int], Tensor, Tensor], None] | None = None
        hidden = config.hidden_size
        channels = hidden if config.moe_latent_size is None else config.moe_latent_size
        self.gate = _Gate(config)
        width = _width(config, layer)
        self.experts = nn.ModuleList(_Expert(channels, width) for _ in range(config.n_routed_experts))
        self.shared_experts = _Expert(hidden, config.moe_shared_expert_intermediate_size)
        if config.moe_latent_size is not None:
            self.fc1_latent_proj = nn.Linear(hidden, config.moe_latent_size, bias=False)
            self.fc2_latent_proj = nn.Linear(config.moe_latent_size, hidden, bias=False)

    @staticmethod
    def lay_out(model: ModelConfig, layer: int) -> dict[str, Layout]:
        hidden, routed = (grid(hidden=model.hidden_size),), (expert_grid(model),)
        latent = hidden if model.moe_latent_size is None else (grid(latent=model.moe_latent_size),)
        neurons = (grid(expert_ffn=_width(model, layer)),)
        shared = (grid(shared_ffn=model.moe_shared_expert_intermediate_size),)
        found = {
            "gate.weight": Layout(routed, hidden),
            "gate.e_score_correction_bias": Layout(routed),
        }
        for index in range(model.n_routed_experts):
            member = Member("experts", index, model.n_routed_experts // model.n_group)
            found[f"experts.{index}.up_proj.weight"] = Layout(neurons, latent, member=member)
            found[f"experts.{index}.down_proj.weight"] = Layout(latent, neurons, member=member)
        found["shared_experts.up_proj.weight"] = Layout(shared, hidden)
        found["shared_experts.down_proj.weight"] = Layout(hidden, shared)
        if model.moe_latent_size is not None:
            found["fc1_latent_proj.weight"] = Layout(latent, hidden)
            found["fc2_latent_proj.weight"] = Layout(hidden, latent)
        return found

    def forward(
        self,
        x_BTD: Tensor,
        kept: Kept,
        soft: Mapping[str, Tensor] | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None = None,
    ) -> Tensor:
        x_ND, masks = x_BTD.flatten(0, 1), soft or {}
        chosen_NS, scores_NS = self.route(x_ND, kept, cache, masks)
        gates_NS = self.gates(scores_NS)
        outputs_NSW = self.run_experts(x_ND, chosen_NS, kept, cache, masks)
        routed = self.weigh(gates_NS, outputs_NSW).to(x_BTD.dtype)
        if self.config.moe_latent_size is not None:
            routed = F.linear(_masked(routed, masks.get("latent")), self._weight("fc2_latent_proj.weight", kept, cache))
        h_NF = squared_relu_(F.linear(x_ND, self._weight("shared_experts.up_proj.weight", kept, cache)))
        h_NF = _masked(h_NF, masks.get("shared_ffn"))
        shared = F.linear(h_NF, self._weight("shared_experts.down_proj.weight", kept, cache))
        return (routed + shared).view_as(x_BTD)

    def route(
        self, x_ND: Tensor, kept: Kept, cache: Cache | None = None, masks: Mapping[str, Tensor] = NO_MASKS
    ) -> tuple[Tensor, Tensor]:
        """The chosen experts of each token (N, S), by their index among those kept, and their scores s (N, S).

        The best come first. Of `masks`, "experts" weighs the kept ones of a group, and "top_k" the chosen ones; scores
        are multiplied by both.
        """
        config, wide = self.config, torch.promote_types(x_ND.dtype, torch.float32)
        weight_XD = self._weight("gate.weight", kept, cache).to(wide)
        bias_X = self._weight("gate.e_score_correction_bias", kept, cache).detach().to(wide)
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NX = F.linear(x_ND.to(wide), weight_XD).sigmoid()
        weighed_NX, mask_X = scores_NX, masks.get("experts")
        if mask_X is not None:
            mask_X = mask_X.to(wide).repeat(config.n_group)
            bias_X = bias_X.masked_fill(mask_X == 0, -math.inf)
            weighed_NX = scores_NX * mask_X
        choice_NGX = (scores_NX.detach() + bias_X).unflatten(-1, (config.n_group, -1))
        if config.topk_group < config.n_group:
            best_NG = choice_NGX.topk(2, dim=-1).values.sum(-1)
            is_out_NG = torch.ones_like(best_NG, dtype=torch.bool)
            is_out_NG.scatter_(1, best_NG.topk(config.topk_group, dim=-1).indices, False)
            choice_NGX = choice_NGX.masked_fill(is_out_NG.unsqueeze(-1), -math.inf)
        chosen_NS = choice_NGX.flatten(1).topk(kept.get("top_k", config.num_experts_per_tok), dim=-1).indices
        if self.see is not None:
            self.see(self.layer, config.n_routed_experts, self._kept_experts(kept), chosen_NS, scores_NX.detach())
        return chosen_NS, _masked(weighed_NX.gather(1, chosen_NS), masks.get("top_k"))

    def gates(self, scores_NS: Tensor) -> Tensor:
        """What weighs the outputs of each token's chosen experts, of their scores."""
        if self.config.norm_topk_prob:
            scores_NS = scores_NS / (scores_NS.sum(-1, keepdim=True) + 1e-20)
        return scores_NS * self.config.routed_scaling_factor

    def weigh(self, gates_NS: Tensor, outputs_NSW: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, each times its gate, (N, W), in the gates' type."""
        return torch.einsum("ns,nsw->nw", gates_NS, outputs_NSW.to(gates_NS.dtype))

    def run_experts(
        self,
        x_ND: Tensor,
        chosen_NS: Tensor,
        kept: Kept,
        cache: Cache | None = None,
        masks: Mapping[str, Tensor] = NO_MASKS,
    ) -> Tensor:
        """What the chosen experts make of each token, (N, S, W), before the gates weigh it.

        Tokens are sorted by expert, and each chosen expert runs once, with `runs_idle` every kept one. Rows are
        permuted and never added by index, so that the sums of a gradient have one order on every device (C6).
        """
        if self.config.moe_latent_size is not None:
            x_ND = _masked(F.linear(x_ND, self._weight("fc1_latent_proj.weight", kept, cache)), masks.get("latent"))
        order = chosen_NS.flatten().argsort(stable=True)
        sorted_RW = x_ND.unsqueeze(1).expand(-1, chosen_NS.shape[1], -1).flatten(0, 1).index_select(0, order)
        experts = self._kept_experts(kept)
        counts = chosen_NS.flatten().bincount(minlength=len(experts)).tolist()
        outputs = list[Tensor]()
        for expert, rows_RW in zip(experts, sorted_RW.split(counts), strict=True):
            if len(rows_RW) or (self.runs_idle and torch.is_grad_enabled()):
                h_RF = squared_relu_(F.linear(rows_RW, self._weight(f"experts.{expert}.up_proj.weight", kept, cache)))
                h_RF = _masked(h_RF, masks.get("expert_ffn"))
                outputs.append(F.linear(h_RF, self._weight(f"experts.{expert}.down_proj.weight", kept, cache)))
        outputs_NSW: Tensor = torch.cat(outputs).index_select(0, order.argsort()).unflatten(0, chosen_NS.shape)
        return outputs_NSW

    def _kept_experts(self, kept: Kept) -> list[int]:
        """The kept experts, in the order of the router's rows."""
        experts = (Member("experts", i, expert_grid(self.config)[1].size) for i in range(self.config.n_routed_experts))
        return [expert.index for expert in experts if expert.is_kept(kept)]

    def _weight(self, name: str, kept: Kept, cache: Cache | None) -> Tensor:
        """What is kept of a tensor: taken when first used, for the tensors of most experts are not."""
        of_layer = {} if cache is None else cache.weights.setdefault(self.layer, {})
        if name not in of_layer:
            of_layer[name] = take(self.get_parameter(name), self.layouts[name], kept)
        return of_layer[name]


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values times the mask of their last dimension, where there is one."""
    return values if mask is None else values * mask.to(values.dtype)


def _added(expert: _Expert, rows_RW: Tensor, gates_R1: Tensor) -> Tensor:
    """What each neuron of an expert adds for these rows: g |y| ||W2_:,y||, summed, (F,)."""
    neurons_RF = squared_relu_(F.linear(rows_RW, expert.up_proj.weight)) * gates_R1
    norms_F: Tensor = expert.down_proj.weight.double().norm(dim=0)
    return neurons_RF.sum(0, dtype=torch.float64) * norms_F


def _before_activation(expert: _Expert, rows_RW: Tensor, gates_R1: Tensor) -> Tensor:
    """|x W1| of each neuron, summed over the rows, (F,)."""
    return F.linear(rows_RW, expert.up_proj.weight).abs().sum(0)


def _channels(shape: LayerShape) -> int:
    """The channels that routed experts read and write."""
    return shape.latent or shape.hidden


class MixtureKind(Kind):
    """What a layer of experts answers."""

    letter, mixer = MOE, Mixture

    def width(self, model: ModelConfig) -> tuple[str, object]:
        return (
            "experts",
            f"{model.n_routed_experts} of {model.moe_intermediate_size}, {model.num_experts_per_tok} a token",
        )

    def text(self, sizes: Mapping[str, object]) -> str:
        latent = f", latent {sizes['latent']}" if "latent" in sizes else ""
        of_each = f"{sizes['experts']} x {sizes['expert_ffn']}, {sizes['top_k']} a token"
        return f"{of_each}, shared {sizes['shared_ffn']}{latent}"

    def initialise(self, name: str, weight: Tensor, model: ModelConfig, generator: torch.Generator) -> None:
        """The selection bias is zero; every projection back to the residual stream is residual."""
        if name == "gate.e_score_correction_bias":
            weight.zero_()
            return
        is_residual = name.endswith(("down_proj.weight", "fc2_latent_proj.weight"))
        super().initialise(self.mixer.residual if is_residual else name, weight, model, generator)

    # Importance

    def added(
        self, mixer: Mixer, normed_BTD: Tensor, backend: Backend, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        sums = self._sums(mixer, normed_BTD, _added)
        return sums, mixer(normed_BTD, WHOLE, None, None, backend, packing)

    def activations(self, mixer: Mixer, normed_BTD: Tensor, *, signed: bool) -> Tensor:
        return self._sums(mixer, normed_BTD, _before_activation)

    def _sums(
        self, mixer: Mixer, normed_BTD: Tensor, of_neurons: Callable[[_Expert, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Sums over tokens, joined: of every expert g(x) ||f(x)||, then of its neurons; those of the shared neurons.

        Where there are latent channels, the sums of what is read of each and of what is written to it follow (`order`).

        g is the gate, 0 where a token did not choose the expert. REAP (arXiv 2510.13999) takes the mean over the tokens
        that chose it: an expert that few tokens need would rank with one that most do. The neurons of an expert count
        for the tokens that chose it.
        """
        assert isinstance(mixer, Mixture)
        x_ND, has_latent = normed_BTD.flatten(0, 1), mixer.config.moe_latent_size is not None
        chosen_NS, scores_NS = mixer.route(x_ND, WHOLE)
        gates_NS = mixer.gates(scores_NS)
        outputs = mixer.run_experts(x_ND, chosen_NS, WHOLE)
        written_NW = mixer.weigh(gates_NS, outputs)
        if has_latent:
            outputs = F.linear(outputs, mixer.fc2_latent_proj.weight)
        added_NS = outputs.norm(dim=-1).double() * gates_NS.double()
        added_X = added_NS.new_zeros(len(mixer.experts)).index_add_(0, chosen_NS.flatten(), added_NS.flatten())

        x_latent = F.linear(x_ND, mixer.fc1_latent_proj.weight) if has_latent else x_ND
        sums, shared = [added_X], mixer.shared_experts
        read_W = x_latent.new_zeros(x_latent.shape[-1], dtype=torch.float64)
        for index, expert in enumerate(mixer.experts):
            assert isinstance(expert, _Expert)
            is_its_NS = chosen_NS == index
            rows_RW, gates_R1 = x_latent[is_its_NS.any(-1)], gates_NS[is_its_NS].unsqueeze(1)
            sums.append(of_neurons(expert, rows_RW, gates_R1))
            read_W += (rows_RW * gates_R1).abs().sum(0, dtype=torch.float64) * expert.up_proj.weight.double().norm(
                dim=0
            )
        sums.append(of_neurons(shared, x_ND, gates_NS.new_ones(len(x_ND), 1)))
        if has_latent:
            norms_W = mixer.fc2_latent_proj.weight.double().norm(dim=0)
            sums += [read_W, written_NW.abs().sum(0, dtype=torch.float64) * norms_W]
        return torch.cat([part.double() for part in sums])

    def order(self, model: ModelConfig, scores: Tensor, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Experts by what they add to all tokens together, inside their group.

        Latent channel i by its share in sum_i |z_i| ||W_:,i||, for z what experts read and W their up projections, and
        its share for z what they write and W the projection back: a subnet that drops it loses both.
        """
        experts, width, channels = model.n_routed_experts, model.full_sizes("expert_ffn")[0], model.moe_latent_size or 0
        sizes = [experts, experts * width, model.moe_shared_expert_intermediate_size, channels, channels]
        added_X, neurons, shared_F, read_W, written_W = scores.split(sizes)
        orders = {
            "experts": descending(added_X, model.n_group),
            "expert_ffn": torch.stack([descending(of_expert) for of_expert in neurons.view(experts, width)]),
            "shared_ffn": descending(shared_F),
        }
        if channels:
            orders["latent"] = descending(read_W / read_W.sum() + written_W / written_W.sum())
        return orders

    # Cost

    def idle_params(self, model: ModelConfig, shape: LayerShape) -> int:
        """The experts that a token does not choose."""
        return (shape.experts - shape.top_k) * 2 * shape.width * _channels(shape)

    def serving_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        """Everything at once, from above: the router's scores, the sorted rows, an expert's neurons, all outputs."""
        chosen, channels = shape.top_k, _channels(shape)
        router = FLOAT32_BYTES * (shape.hidden + 4 * shape.experts) + INDEX_BYTES * 4 * chosen
        rows = chosen * channels * (5 * serving.width + FLOAT32_BYTES) + channels * (serving.width + FLOAT32_BYTES)
        neurons = (2 * shape.width + shape.shared_ffn + 3 * shape.hidden) * serving.width
        return serving.rows * (router + rows + neurons)

    def saved_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """The router's input, weights and scores; the rows and outputs of the chosen experts; all neurons."""
        chosen, channels = shape.top_k, _channels(shape)
        router = FLOAT32_BYTES * (shape.hidden + 2 * shape.experts + 4 * chosen) + INDEX_BYTES * 4 * chosen
        by_token = 4 if step.masked and shape.latent else 2
        rows = chosen * channels * (step.width + FLOAT32_BYTES) + channels * by_token * step.width
        neurons = (3 if step.masked else 2) * step.width * (chosen * shape.width + shape.shared_ffn)
        return router + rows + neurons

    def gradient_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """The gradients of the outputs, rows and neurons, and of the router's scores."""
        chosen, channels = shape.top_k, _channels(shape)
        rows = chosen * channels * (4 * step.width + FLOAT32_BYTES)
        neurons = 2 * step.width * (chosen * shape.width + shape.shared_ffn)
        return rows + neurons + FLOAT32_BYTES * (2 * shape.experts + shape.hidden)

    def flops(self, model: ModelConfig, shape: LayerShape, tokens: int, *, last_projection: bool) -> Flops:
        latent, routed = 2 * shape.hidden * shape.latent, shape.top_k * 2 * shape.width * _channels(shape)
        shared = (2 if last_projection else 1) * shape.hidden * shape.shared_ffn
        return Flops(projections=2 * tokens * (shape.hidden * shape.experts + latent + routed + shared))
