"""The planned memory of training is the memory of training: states, saved activations and the loss, byte by byte.

Live bytes are counted on the CPU. The fused kernels are stood in for by functions that save what they save (fused.py).
The step of nano-12b at its real shapes is in test_traced.py.
"""

import dataclasses
from typing import Any

import pytest
import torch
from fused import FUSED
from live_bytes import LiveBytes
from torch import Tensor
from torch.utils._pytree import tree_leaves

from elastic_core import model as model_module
from elastic_core.budget import Dtype
from elastic_core.cost import ParamsCost, shapes
from elastic_core.geometry import ATTENTION, MAMBA, Axes, ModelConfig
from elastic_core.layers import ssm, tiles
from elastic_core.layers.kernels import TORCH
from elastic_core.layers.mamba import gated_norm_bytes
from elastic_core.model import ElasticNemotronH
from elastic_core.planning.memory import (
    MicroStep,
    activation_bytes,
    host_bytes,
    layer_at_work,
    loss_bytes,
    saved_bytes,
    training_memory,
)
from elastic_core.recipe import Distillation, Optimizer, Stage
from elastic_core.router import ElasticModel, Router
from elastic_core.subnet import Masks, Subnet, full_subnet
from elastic_core.training.losses import distillation_loss
from elastic_core.training.parallel import recompute_layers
from elastic_core.training.train import make_optimizer

CONFIG = ModelConfig(
    hybrid_override_pattern="M-M*-",
    hidden_size=384,
    intermediate_size=1000,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=16,
    mamba_head_dim=64,
    ssm_state_size=32,
    n_groups=8,
    vocab_size=4096,
    chunk_size=64,
)
TOKENS = 512

# Sums over vocabulary or hidden size, one value a token, and weights of one value a channel, are not planned for.
UNPLANNED = 0.01
# What is planned from above is not far above.
MOST_OF = 0.6


def full_masks(subnet: Subnet) -> Masks:
    """Masks of ones over the full subnet, which ask for gradients as the router's do."""

    def ones(size: int) -> Tensor:
        return torch.ones(size, requires_grad=True)

    queries = CONFIG.num_attention_heads // CONFIG.num_key_value_heads
    return Masks(
        hidden=ones(subnet.hidden),
        ffn=tuple(ones(width) for width in subnet.ffn),
        mamba_heads=tuple(ones(CONFIG.mamba_num_heads // CONFIG.n_groups) for _ in CONFIG.layers_of(MAMBA)),
        mamba_head_dim=ones(CONFIG.mamba_head_dim),
        attention_heads=tuple(ones(queries) for _ in CONFIG.layers_of(ATTENTION)),
        layers=ones(CONFIG.num_layers),
    )


def mask_tensors(masks: Masks | None) -> list[Tensor]:
    leaves = [] if masks is None else tree_leaves([getattr(masks, f.name) for f in dataclasses.fields(masks)])
    return [leaf for leaf in leaves if leaf is not None]  # of experts, which this model has not


def micro_step(subnet: Subnet, **changes: Any) -> MicroStep:
    return dataclasses.replace(
        MicroStep(
            subnet=subnet,
            masked=False,
            sequences=1,
            sequence_length=TOKENS,
            recompute=False,
            distillation=Distillation(),
            dtype="bfloat16",
        ),
        **changes,
    )


def random_tokens() -> Tensor:
    return torch.randint(0, CONFIG.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def student() -> ElasticNemotronH:
    fresh = ElasticNemotronH(CONFIG)
    fresh.initialise(torch.Generator().manual_seed(0))
    return fresh


FULL = full_subnet(CONFIG)
SMALL = dataclasses.replace(FULL, hidden=256, ffn=(512, 640), mamba_heads=(8, 16), mamba_head_dim=48, layers=(0, 1, 3))
BFLOAT16 = [(FULL, False), (SMALL, False), (FULL, True)]


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize(
    ("subnet", "masked", "dtype"),
    [(FULL, False, "float32"), (FULL, True, "float32"), *((s, m, "bfloat16") for s, m in BFLOAT16)],
)
def test_activations_are_what_the_forward_pass_leaves(
    subnet: Subnet, masked: bool, dtype: Dtype, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "select_backend", lambda *_: FUSED)
    step = micro_step(subnet, masked=masked, recompute=recompute, dtype=dtype)
    elastic = student()
    if recompute:
        recompute_layers(elastic)
    masks = full_masks(subnet) if masked else None
    tokens_BT = random_tokens()
    counted = LiveBytes([*elastic.parameters(), tokens_BT, *mask_tensors(masks)])
    with counted, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden_BTD = elastic(tokens_BT, subnet, masks)
        live = counted.live
    # A norm that nothing masks also keeps its normalised values on the CPU, where it is not fused.
    norms = 0 if masked else 1 if recompute else subnet.depth + 1
    not_fused = norms * hidden_BTD.nbytes * 4 // step.width
    # Autocast keeps its copies of whole weights; copies of parts are made again with the layer.
    copies = 0 if recompute and subnet != FULL else training_memory(CONFIG, step, gpus=1).gathered
    assert live == pytest.approx(activation_bytes(CONFIG, step) + copies + not_fused, rel=UNPLANNED)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("layer", [1, 3], ids=["ffn", "attention"])
def test_a_layers_backward_pass_needs_no_more_than_planned(layer: int, recompute: bool) -> None:
    step = micro_step(dataclasses.replace(FULL, layers=(layer,)), masked=True, recompute=recompute)
    elastic, masks = student(), full_masks(FULL)
    if recompute:
        recompute_layers(elastic)
    for weight in elastic.parameters():
        weight.grad = torch.zeros_like(weight)
    x_BTD = torch.randn(1, TOKENS, CONFIG.hidden_size).bfloat16().requires_grad_()
    weights = list(elastic.parameters())
    with LiveBytes([*weights, *(w.grad for w in weights), x_BTD, *mask_tensors(masks)]) as counted:
        with torch.autocast("cpu", torch.bfloat16):
            y_BTD = elastic.layers[layer](x_BTD, FULL, masks, None, TORCH)
        y_BTD.backward(torch.ones_like(y_BTD))
    (shape,) = shapes(CONFIG, step.subnet)
    saved = 0 if recompute else saved_bytes(CONFIG, shape, step)
    copies = 2 * ParamsCost(model=CONFIG).layer(
        shape
    )  # autocast's of the weights; their gradients before they are added
    planned = saved + layer_at_work(CONFIG, step) + 2 * copies
    assert MOST_OF * planned < counted.peak <= planned


def test_a_masked_gated_norm_needs_no_more_than_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_VALUES", tiles.GPU_VALUES)
    channels, groups = CONFIG.mamba_size, CONFIG.n_groups
    y, gate = (torch.randn(1, TOKENS, channels).bfloat16().requires_grad_() for _ in range(2))
    weight, mask = (torch.ones(channels, requires_grad=True) for _ in range(2))
    with LiveBytes([y, gate, weight, mask]) as counted:
        normed = ssm.gated_rms_norm(y, gate, weight, groups, 1e-5, mask)
        saved = counted.live
        normed.backward(torch.ones_like(normed))
    step = micro_step(dataclasses.replace(FULL, layers=(0,)), masked=True)
    (shape,) = shapes(CONFIG, step.subnet)
    assert saved == pytest.approx(TOKENS * gated_norm_bytes(CONFIG, shape, step), rel=UNPLANNED)
    # Both are held here, where a layer gives them back.
    output_and_gradient = 2 * normed.nbytes
    assert counted.peak <= (1 + UNPLANNED) * (saved + layer_at_work(CONFIG, step) + output_and_gradient)


@pytest.mark.parametrize(
    ("kl_weight", "ce_weight", "temperature"), [(1.0, 0.0, 1.0), (1.0, 0.5, 2.0), (1.0, 0.0, 2.0), (0.0, 1.0, 1.0)]
)
@pytest.mark.parametrize(
    ("vocab_size", "hidden", "tokens"),
    [(16384, 64, 2500), (2048, 512, 1024)],
    ids=["several chunks", "one chunk"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_holds_what_is_planned(
    vocab_size: int, hidden: int, tokens: int, kl_weight: float, ce_weight: float, temperature: float, dtype: Dtype
) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=vocab_size, hidden_size=hidden)
    task = Distillation(kl_weight=kl_weight, ce_weight=ce_weight, temperature=temperature)
    step = micro_step(full_subnet(config), distillation=task, dtype=dtype, sequence_length=tokens)
    computed = torch.float32 if dtype == "float32" else torch.bfloat16
    student_TD = torch.randn(tokens, hidden).to(computed).requires_grad_()
    head_VD = torch.randn(vocab_size, hidden).requires_grad_()
    taught = [torch.randn(rows, hidden).to(computed) if kl_weight else None for rows in (tokens, vocab_size)]
    targets_T = torch.zeros(tokens, dtype=torch.long)
    given = [tensor for tensor in (student_TD, head_VD, *taught, targets_T) if tensor is not None]
    with LiveBytes(given) as counted, torch.autocast("cpu", computed, enabled=dtype == "bfloat16"):
        distillation_loss(
            student_TD,
            head_VD,
            *taught,
            targets_T,
            kl_weight=kl_weight,
            ce_weight=ce_weight,
            temperature=temperature,
            learned=tokens,
        )
    inputs = student_TD.nbytes + (taught[0].nbytes if taught[0] is not None else 0)
    assert counted.peak + inputs == pytest.approx(loss_bytes(config, step), rel=UNPLANNED)


def test_states_are_counted_to_the_byte() -> None:
    axes = Axes(hidden=(384, 256), ffn=(1000, 500), per_layer=("ffn",)).bind(CONFIG)
    router = Router(ElasticModel(CONFIG, axes, tuple(range(CONFIG.num_layers))), 3, 16)
    elastic = student()
    stage = Stage(
        name="s", sequence_length=8, batch_size=1, steps=1, budgets={"l": 1.0}, optimizer=Optimizer(learning_rate=1e-3)
    )
    optimizer = make_optimizer(elastic, router, stage)
    parameters = [*elastic.parameters(), *router.parameters()]
    for weight in parameters:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moments = [optimizer.state[weight][name] for weight in parameters for name in ("exp_avg", "exp_avg_sq")]
    sizes = {"parameters": parameters, "gradients": [weight.grad for weight in parameters], "optimizer": moments}
    router_params = sum(weight.numel() for weight in router.parameters())
    planned = training_memory(CONFIG, micro_step(FULL), gpus=1, router_params=router_params)
    assert {name: sum(t.nbytes for t in tensors) for name, tensors in sizes.items()} == {
        name: getattr(planned, name) for name in sizes
    }
    assert planned.teacher == sum(weight.to(torch.bfloat16).nbytes for weight in elastic.parameters())


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_states_are_shared_out_and_activations_are_not(gpus: int) -> None:
    one, many = (training_memory(CONFIG, micro_step(FULL), gpus=n) for n in (1, gpus))
    for name in ("parameters", "gradients", "optimizer", "teacher"):
        assert getattr(many, name) == pytest.approx(getattr(one, name) / gpus, rel=UNPLANNED)
    assert many.activations == one.activations


def test_a_total_is_the_sum_of_its_parts() -> None:
    memory = training_memory(CONFIG, micro_step(FULL), gpus=4)
    assert memory.total == sum(getattr(memory, field.name) for field in dataclasses.fields(memory))


def test_pinned_blocks_are_powers_of_two_and_none_serves_another_size() -> None:
    """As torch's CachingHostAllocator rounds them, and finds a freed one by its rounded size."""
    whole = full_subnet(CONFIG)
    narrow = dataclasses.replace(whole, hidden=whole.hidden // 2)
    shallow = dataclasses.replace(whole, layers=whole.layers[:-1])
    offloaded = {"recompute": True, "offload": True, "sequence_length": 24}
    steps = [micro_step(subnet, **offloaded) for subnet in (whole, narrow, shallow)]
    block = 32 * 1024
    assert block // 2 < 24 * 2 * CONFIG.hidden_size < block
    assert host_bytes(steps[:1]) == host_bytes([steps[0], steps[2]]) == whole.depth * block
    assert host_bytes(steps) == whole.depth * (block + block // 2)
    assert host_bytes([micro_step(whole)]) == 0
