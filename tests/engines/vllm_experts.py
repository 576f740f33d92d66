"""What vLLM 0.32 lacks on a CPU to run Nemotron-H's experts: the product of experts that are not gated.

It refuses such layers there (`FusedMoEConfig`: is_act_and_mul=False is supported only for CUDA, XPU and ROCm), and its
CPU kernels know gated activations alone. Here the product is computed in PyTorch. All else stays vLLM's: how it reads
config.json and the weights of each expert, its router with groups, selection bias and scale, the shared expert.
"""

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

_checked = FusedMoEConfig.__post_init__


def lend_experts() -> list[str]:
    """From here on vLLM takes experts that are not gated; returns the refusals that it would have ended with."""
    refusals = []

    def unless_ungated(self):
        try:
            _checked(self)
        except NotImplementedError as error:
            if "is_act_and_mul" not in str(error):
                raise
            refusals.append(str(error))

    FusedMoEConfig.__post_init__ = unless_ungated
    CPUUnquantizedExperts._supports_no_act_and_mul = staticmethod(lambda: True)
    CPUUnquantizedExperts._supports_activation = staticmethod(lambda given: given == MoEActivation.RELU2_NO_MUL)
    CPUUnquantizedExperts._supports_grouped_gemm = classmethod(lambda cls, config: (True, None))
    CPUUnquantizedExperts.process_weights_after_loading = lambda self, layer: None  # it would pack for its own kernel
    CPUUnquantizedExperts.apply = _apply
    return refusals


def _apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, *rest, **named) -> None:
    """Sum over each token's chosen experts: weight x W2 relu(W1 x)^2."""
    output.zero_()
    for expert in topk_ids.unique().tolist():
        rows, places = torch.where(topk_ids == expert)
        inner = (hidden_states[rows] @ w1[expert].T).relu().square()
        output.index_add_(0, rows, (inner @ w2[expert].T) * topk_weights[rows, places, None].to(inner.dtype))
