"""The FLOPs of the formula are the FLOPs that torch counts in real forward and backward passes, to the last one.

torch's FlopCounterMode counts matrix products and attention; it knows no products written in place and not the CPU's
attention, so that their formulas are given to it. It does not see the convolution, which is elementwise here.
"""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from elastic_core.geometry import ATTENTION, MAMBA, ModelConfig
from elastic_core.layers.kernels import TORCH
from elastic_core.model import ElasticNemotronH
from elastic_core.planning.flops import Flops, backward_flops, forward_flops, recomputed_flops
from elastic_core.subnet import Masks, Subnet, full_subnet
from elastic_core.training.losses import distillation_loss

TOKENS = 21  # chunks of 8, 8 and 5

aten = torch.ops.aten


def _attention_products(count: int) -> Any:
    """`count` products of T x T scores a head, none spared for being causal; queries or their gradient come first."""

    def flops(queries: Any, *_: Any, **__: Any) -> int:
        batch, heads, tokens, head_dim = queries
        return int(count * 2 * batch * heads * tokens**2 * head_dim)

    return flops


def _addmm(total: Any, left: Any, right: Any, **_: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


COUNTED_TOO = {
    aten.addmm_: _addmm,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_products(2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_products(5),
}


class Count:
    """What torch counts inside the block: `products` of matrices, and `attention`."""

    def __enter__(self) -> "Count":
        self._mode = FlopCounterMode(display=False, custom_mapping=COUNTED_TOO)
        self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._mode.__exit__(*exception)
        counts: Counter[bool] = Counter()
        for operation, flops in self._mode.get_flop_counts()["Global"].items():
            counts["attention" in str(operation)] += flops
        self.products, self.attention = counts[False], counts[True]


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> ElasticNemotronH:
    fresh = ElasticNemotronH(tiny_config)
    fresh.initialise(torch.Generator().manual_seed(0))
    return fresh


def subnets(config: ModelConfig) -> dict[str, Subnet]:
    full = full_subnet(config)
    return {
        "full": full,
        "narrow": dataclasses.replace(full, hidden=24, ffn=(16,) * len(full.ffn), mamba_head_dim=4),
        "shallow": dataclasses.replace(full, layers=(0, 1, 3, 6)),
        "by layer": dataclasses.replace(
            full, ffn=(40, 8, 24), mamba_heads=(12, 4, 8), attention_heads=(6, 2), layers=(0, 1, 2, 3, 4, 6, 7)
        ),
    }


NAMES = ["full", "narrow", "shallow", "by layer"]


def tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def not_causal(flops: Flops) -> int:
    """The attention FLOPs of all T^2 scores, from those of the T (T + 1) / 2 causal ones."""
    return 2 * TOKENS * flops.attention // (TOKENS + 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_pass_costs_what_torch_counts(name: str, model: ElasticNemotronH) -> None:
    subnet = subnets(model.config)[name]
    with Count() as counted, torch.no_grad():
        model.logits(model(tokens(model.config), subnet))
    flops = forward_flops(model.config, subnet, TOKENS)
    assert counted.products == flops.projections + flops.scan + flops.head
    assert counted.attention == not_causal(flops)


def idle_scan(config: ModelConfig, subnet: Subnet) -> int:
    """Backward products that the plain scan is spared: there is no state before the first chunk to give a gradient,
    and nothing reads the state after the last one."""
    state_products = 0
    for layer in subnet.layers:
        if config.hybrid_override_pattern[layer] == MAMBA:
            channels = subnet.mamba_heads[config.ordinal(layer)] * subnet.mamba_head_dim
            first, last = config.chunk_size, TOKENS % config.chunk_size
            state_products += 2 * channels * config.ssm_state_size * (first + 2 * last)
    return state_products


@pytest.mark.parametrize("name", NAMES)
def test_a_distillation_step_costs_what_torch_counts(name: str, model: ElasticNemotronH) -> None:
    config, subnet = model.config, subnets(model.config)[name]
    batch = tokens(config)
    with torch.no_grad():
        taught = model(batch, full_subnet(config)).flatten(0, 1)
    with Count() as counted:
        hidden = model(batch, subnet).flatten(0, 1)
        head = model.head_weight(subnet.hidden)
        loss = distillation_loss(
            hidden, head, taught, model.lm_head.weight.detach(), batch.flatten(), kl_weight=1.0, ce_weight=0.0
        )
        loss.total.backward()
    forward, backward = forward_flops(config, subnet, TOKENS), backward_flops(config, subnet, TOKENS)
    step = forward + backward
    teacher_logits = forward_flops(config, full_subnet(config), TOKENS).head
    spared = idle_scan(config, subnet)
    assert counted.products == step.projections + step.scan - spared + step.head + teacher_logits
    assert counted.attention == not_causal(forward) + not_causal(backward)


def masks(config: ModelConfig, subnet: Subnet) -> Masks:
    """Masks of ones over all of the full subnet."""
    queries = config.num_attention_heads // config.num_key_value_heads
    return Masks(
        hidden=torch.ones(subnet.hidden),
        ffn=tuple(torch.ones(width) for width in subnet.ffn),
        mamba_heads=(torch.ones(config.mamba_num_heads // config.n_groups),) * len(config.layers_of(MAMBA)),
        mamba_head_dim=torch.ones(config.mamba_head_dim),
        attention_heads=(torch.ones(queries),) * len(config.layers_of(ATTENTION)),
        layers=torch.ones(config.num_layers, requires_grad=True),
    )


@pytest.mark.parametrize(("name", "masked"), [*((name, False) for name in NAMES), ("full", True)])
def test_recomputation_adds_what_torch_counts(name: str, masked: bool, model: ElasticNemotronH) -> None:
    config, subnet = model.config, subnets(model.config)[name]
    weighing = masks(config, subnet) if masked else None

    def count(recompute: bool) -> Count:
        with Count() as counted:
            x = model.embeddings(tokens(config))[..., : subnet.hidden]
            for layer in subnet.layers:
                arguments = (x, subnet, weighing, None, TORCH)
                run = model.layers[layer]
                x = checkpoint(run, *arguments, use_reentrant=False) if recompute else run(*arguments)
            x.sum().backward()
        return counted

    plain, again = count(False), count(True)
    flops = recomputed_flops(config, subnet, TOKENS, masked=masked)
    assert again.products - plain.products == flops.projections + flops.scan
    assert again.attention - plain.attention == not_causal(flops)
