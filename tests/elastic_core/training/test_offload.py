"""A step whose layer inputs wait on the host is the step whose inputs stay, bit for bit."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Optimizer, Stage
from elastic_core.subnet import full_subnet
from elastic_core.training import offload
from elastic_core.training.parallel import recompute_layers

CONFIG = ModelConfig(
    hybrid_override_pattern="M-M*-",
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    vocab_size=64,
    chunk_size=8,
)


def step(keeps: str) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of two micro-steps in float64."""
    model = ElasticNemotronH(CONFIG)
    model.initialise(torch.Generator().manual_seed(0))
    model = model.double()
    if keeps != "all":
        recompute_layers(model, offload=keeps == "nothing")
    losses = []
    for seed in range(2):
        tokens_BT = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(seed))
        loss = model.logits(model(tokens_BT, full_subnet(CONFIG))).square().mean()
        loss.backward()
        losses.append(loss.detach())
    gradients = [weight.grad for weight in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return torch.stack(losses), [gradient for gradient in gradients if gradient is not None]


def test_offloaded_inputs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, room_for = [], offload.empty_on_host

    def counted(like: Tensor) -> Tensor:
        moved.append(like.shape)
        return room_for(like)

    monkeypatch.setattr(offload, "empty_on_host", counted)
    kept, recomputed, offloaded = map(step, ("all", "inputs", "nothing"))
    assert moved == 2 * CONFIG.num_layers * [(2, 24, CONFIG.hidden_size)]
    for other in (kept, recomputed):
        assert torch.equal(offloaded[0], other[0])
        assert all(map(torch.equal, offloaded[1], other[1]))


def test_a_forward_pass_without_a_backward_pass_leaves_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms, room_for = [], offload.empty_on_host

    def remembered(like: Tensor) -> Tensor:
        room = room_for(like)
        rooms.append(weakref.ref(room.untyped_storage()))
        return room

    monkeypatch.setattr(offload, "empty_on_host", remembered)
    model = ElasticNemotronH(CONFIG)
    recompute_layers(model, offload=True)
    hidden_BTD = model(torch.zeros(1, 8, dtype=torch.long), full_subnet(CONFIG))
    assert any(room() is not None for room in rooms)
    del hidden_BTD
    gc.collect()
    assert not any(room() is not None for room in rooms)


def test_offloading_without_recomputation_is_refused() -> None:
    with pytest.raises(ValueError, match="set recompute=true too"):
        Stage(
            name="s",
            sequence_length=8,
            batch_size=1,
            steps=1,
            budgets={"l": 1.0},
            optimizer=Optimizer(learning_rate=1e-3),
            offload=True,
        )
