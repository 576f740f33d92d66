"""Causal grouped-query attention without positional encoding; key and value heads are never pruned."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.geometry import ATTENTION, ModelConfig
from elastic_core.layers.kernels import Backend
from elastic_core.layers.kind import (
    FLOAT32_BYTES,
    Cache,
    Flops,
    Kind,
    LayerShape,
    Mixer,
    Padding,
    ServingStep,
    Training,
    descending,
)
from elastic_core.layers.packing import Packing
from elastic_core.layout import Kept, Layout, Run, grid, mask


def query_grid(model: ModelConfig) -> Run:
    """The query channels: [KV head, query in KV head, channel]."""
    groups = model.num_key_value_heads
    return grid(group=groups, attention_heads=model.num_attention_heads // groups, channel=model.head_dim)


class Attention(Mixer):
    """Grouped-query attention at any subnet."""

    residual = "o_proj.weight"

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.queries = query_grid(config)
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    @staticmethod
    def lay_out(model: ModelConfig, layer: int) -> dict[str, Layout]:
        hidden, query = (grid(hidden=model.hidden_size),), (query_grid(model),)
        keys = (grid(keys=model.num_key_value_heads * model.head_dim),)
        return {
            "q_proj.weight": Layout(query, hidden),
            "k_proj.weight": Layout(keys, hidden),
            "v_proj.weight": Layout(keys, hidden),
            "o_proj.weight": Layout(hidden, query),
        }

    def components(
        self,
        x_BTD: Tensor,
        weights: Mapping[str, Tensor],
        kept: Kept,
        soft: Mapping[str, Tensor] | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None,
    ) -> Tensor:
        def project(name: str) -> Tensor:
            heads: Tensor = F.linear(x_BTD, weights[name]).unflatten(-1, (-1, self.config.head_dim))
            return heads.transpose(1, 2)

        q_BQTE, k_BKTE, v_BKTE = map(project, ("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        if cache is not None:
            if self.layer in cache.keys:
                k_BKTE = torch.cat([cache.keys[self.layer], k_BKTE], dim=2)
                v_BKTE = torch.cat([cache.values[self.layer], v_BKTE], dim=2)
            cache.keys[self.layer], cache.values[self.layer] = k_BKTE, v_BKTE
        if packing is not None:
            y_BQTE = _attend_in_documents(q_BQTE, k_BKTE, v_BKTE, packing)
        else:
            tokens, seen = q_BQTE.shape[2], k_BKTE.shape[2]
            sees = _sees(tokens, seen, cache.padding if cache else None, x_BTD.device)
            y_BQTE = F.scaled_dot_product_attention(
                q_BQTE, k_BKTE, v_BKTE, attn_mask=sees, is_causal=sees is None and tokens == seen, enable_gqa=True
            )
        y = y_BQTE.transpose(1, 2).flatten(-2)
        if soft is not None:
            y = y * mask(self.queries, kept, soft).to(y.dtype)
        return y


def _sees(tokens: int, seen: int, padding: Padding | None, device: torch.device) -> Tensor | None:
    """Which of the tokens seen so far each of the last `tokens` sees, (T, S), or (B, 1, T, S) behind padding.

    None where no mask has to be in memory: in a first piece, and for a single token, which sees all. Padding sees
    itself alone, so that its values, which nobody reads, are numbers.
    """
    if padding is None and tokens in (1, seen):
        return None
    causal_TS = torch.ones(tokens, seen, dtype=torch.bool, device=device).tril(seen - tokens)
    if padding is None:
        return causal_TS
    at_S = torch.arange(seen, device=device)
    own_TS = at_S == at_S[-tokens:, None]
    return (causal_TS & ((at_S >= padding.first_B[:, None, None]) | own_TS)).unsqueeze(1)


def _attend_in_documents(q_BQTE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, packing: Packing) -> Tensor:
    """Causal attention of each document by itself.

    A mask of T x T values would not fit at long lengths, and pairs of tokens of two documents cost nothing here. Each
    document is exactly what it is alone, on every device and in every type.
    """
    outputs: list[list[Tensor]] = [[] for _ in q_BQTE]
    for row, first, end in packing.spans:
        q_1QTE, k_1KTE, v_1KTE = (t[row : row + 1, :, first:end] for t in (q_BQTE, k_BKTE, v_BKTE))
        y_1QTE = F.scaled_dot_product_attention(q_1QTE, k_1KTE, v_1KTE, is_causal=True, enable_gqa=True)
        outputs[row].append(y_1QTE)
    return torch.cat([torch.cat(of_row, dim=2) for of_row in outputs])


class AttentionKind(Kind):
    """What an attention layer answers."""

    letter, mixer = ATTENTION, Attention

    def width(self, model: ModelConfig) -> tuple[str, object]:
        return "attention heads", model.num_attention_heads

    def activations(self, mixer: Mixer, normed_BTD: Tensor, *, signed: bool) -> Tensor:
        """Query head: the norm of its query."""
        assert isinstance(mixer, Attention)
        queries = F.linear(normed_BTD, mixer.q_proj.weight).unflatten(-1, (-1, mixer.config.head_dim))
        norms_Q: Tensor = queries.norm(dim=-1).sum((0, 1))
        return norms_Q

    def order(self, model: ModelConfig, scores: Tensor, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """Heads inside their group, by the norm of their channels' scores."""
        heads_Q = scores.view(model.num_attention_heads, -1).norm(dim=1)
        return {"attention_heads": descending(heads_Q, model.num_key_value_heads)}

    def cache_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        """Keys and values."""
        return 2 * serving.batch * serving.context * model.num_key_value_heads * model.head_dim * serving.width

    def serving_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        """queries + max(the cache copied by torch.cat, two copies of the mask, mask + queries' and layer's output)."""
        later = min(serving.tokens, serving.context - serving.tokens)  # the most that are read after a full piece
        mask = later * serving.context if later > 1 else 0
        queries = serving.rows * shape.width * model.head_dim * serving.width
        output = queries + serving.rows * shape.hidden * serving.width
        return queries + max(self.cache_bytes(model, shape, serving) if later else 0, 2 * mask, mask + output)

    def saved_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """Queries, keys, values, output, the logarithm of each head's normaliser; the output masked."""
        queries, keys = shape.width * model.head_dim, model.num_key_value_heads * model.head_dim
        return step.width * ((3 if step.masked else 2) * queries + 2 * keys) + FLOAT32_BYTES * shape.width

    def gradient_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """The gradients of the output and the projections, each also laid out anew; those of the queries in float32."""
        queries, keys = shape.width * model.head_dim, model.num_key_value_heads * model.head_dim
        return step.width * 4 * (queries + keys) + FLOAT32_BYTES * queries

    def flops(self, model: ModelConfig, shape: LayerShape, tokens: int, *, last_projection: bool) -> Flops:
        queries, keys = shape.width * model.head_dim, model.num_key_value_heads * model.head_dim
        widths = queries + 2 * keys + (queries if last_projection else 0)
        return Flops(
            projections=2 * tokens * shape.hidden * widths,
            attention=2 * 2 * queries * (tokens * (tokens + 1) // 2),
        )
