"""What GPUs would send one another with experts of their own is what goes to the experts and comes back, counted."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from experts import CONFIG
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from elastic_core.layers.kernels import TORCH
from elastic_core.layers.moe import Mixture
from elastic_core.model import ElasticNemotronH
from elastic_core.planning.memory import MicroStep
from elastic_core.planning.traffic import expert_parallel_traffic
from elastic_core.recipe import Distillation
from elastic_core.subnet import full_subnet

SEQUENCES, TOKENS = 2, 13
FULL = full_subnet(CONFIG)
SUBNETS = {
    "full": FULL,
    "narrow": replace(FULL, latent=8, top_k=1, hidden=16),
    "shallow": replace(FULL, layers=(0, 1, 2, 4)),
}


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("name", SUBNETS)
def test_tokens_go_to_all_experts_that_they_chose_and_back(
    name: str, recompute: bool, latent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, subnet = CONFIG, SUBNETS[name]
    if not latent:
        config, subnet = replace(CONFIG, moe_latent_size=None), replace(subnet, latent=0)
    moved = []
    run_experts = Mixture.run_experts

    def counted(self: Mixture, *arguments: Any, **options: Any) -> Tensor:
        outputs = run_experts(self, *arguments, **options)  # as large as what goes in
        moved.append(2 * outputs.numel())
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: moved.append(2 * gradient.numel()))
        return outputs

    monkeypatch.setattr(Mixture, "run_experts", counted)
    model = ElasticNemotronH(config)
    model.initialise(torch.Generator().manual_seed(0))
    batch = torch.randint(0, config.vocab_size, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(batch, full_subnet(config))  # the teacher
    x = model.embeddings(batch)[..., : subnet.hidden]
    for layer in subnet.layers:
        arguments, run = (x, subnet, None, None, TORCH), model.layers[layer]
        x = checkpoint(run, *arguments, use_reentrant=False) if recompute else run(*arguments)
    x.sum().backward()
    step = MicroStep(
        subnet=subnet,
        masked=False,
        sequences=SEQUENCES,
        sequence_length=TOKENS,
        recompute=recompute,
        distillation=Distillation(),
        dtype="bfloat16",
    )
    assert expert_parallel_traffic(config, step) == 2 * sum(moved)
