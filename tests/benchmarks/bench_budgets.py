"""A small budget's training step and decoding beside the full one's: cost follows the budget (C3).

pytest -m benchmark -s tests/benchmarks/bench_budgets.py

The alternative is masks at full width, as in NVIDIA's Megatron elastification: the same submodel, for the price of the
full one. A step is forward, chunked loss, backward and AdamW.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from itertools import islice

import pytest
import torch
from bench import BOUND, interleaved, record
from nano import NANO3_139M, NANO_97M
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from elastic_core.files.slicing import slice_weights, target_config
from elastic_core.generate import decode
from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import Masks, Subnet, full_subnet
from elastic_core.training.curriculum import generator
from elastic_core.training.losses import distillation_loss

TOKENS = 1024
NEW_TOKENS = 16
# Allowed above the ratio of FLOPs: AdamW passes over all weights, those of experts that a token leaves out included.
OVERHEAD = 0.08
OVERHEAD_WITH_EXPERTS = 0.10
SAME_FUNCTION = 1e-3  # float32, summed in another order over 16 layers


def fresh(config: ModelConfig) -> ElasticNemotronH:
    made = ElasticNemotronH(config)
    made.initialise(generator(0))
    return made


@pytest.fixture(scope="module")
def model() -> ElasticNemotronH:
    return fresh(NANO_97M)


@pytest.fixture(scope="module")
def tokens_BT() -> Tensor:
    return torch.randint(NANO_97M.vocab_size, (1, TOKENS + 1), generator=generator(1))


def small_subnet(config: ModelConfig) -> Subnet:
    """In the proportions of Nano's 6B."""
    full = full_subnet(config)
    return dataclasses.replace(
        full,
        hidden=768,
        ffn=(2048,) * len(full.ffn),
        mamba_heads=(24,) * len(full.mamba_heads),
        attention_heads=(12,) * len(full.attention_heads),
        expert_ffn=(256,) * len(full.expert_ffn),
        experts=full.experts * 3 // 4,
        shared_ffn=full.shared_ffn // 2,
    )


def one_hot_masks(subnet: Subnet) -> Masks:
    """The masks that make the full width compute `subnet`: the alternative's way."""

    def prefix(kept: int, width: int) -> Tensor:
        return (torch.arange(width) < kept).float()

    groups, kv_heads = NANO_97M.n_groups, NANO_97M.num_key_value_heads
    return Masks(
        hidden=prefix(subnet.hidden, NANO_97M.hidden_size),
        ffn=tuple(prefix(kept, full) for kept, full in zip(subnet.ffn, NANO_97M.ffn_sizes, strict=True)),
        mamba_heads=tuple(prefix(h // groups, NANO_97M.mamba_num_heads // groups) for h in subnet.mamba_heads),
        mamba_head_dim=prefix(subnet.mamba_head_dim, NANO_97M.mamba_head_dim),
        attention_heads=tuple(
            prefix(h // kv_heads, NANO_97M.num_attention_heads // kv_heads) for h in subnet.attention_heads
        ),
        layers=torch.ones(NANO_97M.num_layers),
    )


def loss_of(model: ElasticNemotronH, tokens_BT: Tensor, subnet: Subnet, masks: Masks | None = None) -> Tensor:
    hidden_BTD = model(tokens_BT[:, :-1], subnet, masks)
    head_VD = model.head_weight(subnet.hidden)
    targets_T = tokens_BT[:, 1:].flatten()
    return distillation_loss(
        hidden_BTD.flatten(0, 1), head_VD, None, None, targets_T, kl_weight=0.0, ce_weight=1.0
    ).total


def trainer(model: ElasticNemotronH, tokens_BT: Tensor) -> Callable[..., None]:
    """A training step of `model` at a subnet, under masks or not."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def step(subnet: Subnet, masks: Masks | None = None) -> None:
        loss_of(model, tokens_BT, subnet, masks).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def shape_of(model: ElasticNemotronH) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {TOKENS} tokens"


@pytest.mark.benchmark
def test_a_training_step_costs_what_its_budget_costs(model: ElasticNemotronH, tokens_BT: Tensor) -> None:
    full, small = full_subnet(NANO_97M), small_subnet(NANO_97M)
    step = trainer(model, tokens_BT)
    masks = one_hot_masks(small)
    with torch.no_grad():
        ours, theirs = loss_of(model, tokens_BT, small), loss_of(model, tokens_BT, full, masks)
    assert float(ours) == pytest.approx(float(theirs), abs=SAME_FUNCTION)

    share = flops(partial(step, small)) / flops(partial(step, full))
    seconds = interleaved({"s": partial(step, small), "l": partial(step, full), "masks": partial(step, full, masks)})
    record(
        benchmark="training step, s / l",
        shape=shape_of(model),
        unit="s",
        ours=seconds["s"],
        theirs=seconds["l"],
        alternative="full budget",
        target=f"at most FLOPs {share:.3f} + {OVERHEAD}",
    )
    record(
        benchmark="training step, masks at full width / l",
        shape=shape_of(model),
        unit="s",
        ours=seconds["masks"],
        theirs=seconds["l"],
        alternative="full budget",
        target="1.0: what masks cost at any budget",
    )


@pytest.mark.benchmark
def test_a_training_step_with_experts_costs_what_its_active_parameters_cost(tokens_BT: Tensor) -> None:
    model, full, small = fresh(NANO3_139M), full_subnet(NANO3_139M), small_subnet(NANO3_139M)
    step = trainer(model, tokens_BT)
    share = flops(partial(step, small)) / flops(partial(step, full))
    seconds = interleaved({"s": partial(step, small), "l": partial(step, full)})
    record(
        benchmark="training step with experts, s / l",
        shape=shape_of(model),
        unit="s",
        ours=seconds["s"],
        theirs=seconds["l"],
        alternative="full budget",
        target=f"at most FLOPs {share:.3f} + {OVERHEAD_WITH_EXPERTS}",
    )


@pytest.mark.benchmark
@pytest.mark.parametrize("batch", [1, 16])
def test_decoding_costs_what_its_budget_costs(batch: int, model: ElasticNemotronH, tokens_BT: Tensor) -> None:
    full, small = full_subnet(NANO_97M), small_subnet(NANO_97M)
    cut = ElasticNemotronH(target_config(NANO_97M, small))
    cut.load_state_dict(slice_weights(model.state_dict(), small, NANO_97M))
    prompt_BT = tokens_BT[:, :64].repeat(batch, 1)
    texts = {
        name: decode(whole, prompt_BT, subnet, max_new_tokens=10**6)
        for name, whole, subnet in (("s", model, small), ("cut", cut, full_subnet(cut.config)), ("l", model, full))
    }

    def write(name: str) -> list[Tensor]:
        return list(islice(texts[name], NEW_TOKENS))

    # These first tokens are those that also read the prompt.
    written = {name: torch.stack(write(name)) for name in texts}
    assert torch.equal(written["s"], written["cut"])
    share = flops(partial(write, "s")) / flops(partial(write, "l"))
    seconds = interleaved({name: partial(write, name) for name in texts})
    shape = f"batch {batch}, {NEW_TOKENS} tokens after {prompt_BT.shape[1]} and more"
    record(
        benchmark="decoding, s / l",
        shape=shape,
        unit="s",
        ours=seconds["s"],
        theirs=seconds["l"],
        alternative="full budget",
        target=f"at most FLOPs {share:.3f} + {OVERHEAD}",
    )
    record(
        benchmark="decoding at s",
        shape=shape,
        unit="s",
        ours=seconds["s"],
        theirs=seconds["cut"],
        alternative="the same submodel, cut out",
        target=BOUND,
    )
