"""A family with experts that is small enough to train in a test."""

from elastic_core.budget import Budget
from elastic_core.geometry import Axes, ModelConfig

CONFIG = ModelConfig(
    hybrid_override_pattern="ME*EM",
    hidden_size=24,
    intermediate_size=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    mamba_num_heads=8,
    mamba_head_dim=4,
    ssm_state_size=4,
    n_groups=2,
    vocab_size=40,
    chunk_size=8,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=20,
    moe_latent_size=16,
    routed_scaling_factor=2.5,
)
AXES = Axes(
    hidden=(24, 16),
    mamba_heads=(8, 4),
    attention_heads=(4, 2),
    depth=(5, 4),
    expert_ffn=(24, 16, 8),
    experts=(6, 4),
    shared_ffn=(20, 12),
    top_k=(2, 1),
    latent=(16, 8),
)
BUDGETS = (Budget(name="l"), Budget(name="m", params=12000), Budget(name="s", params=8000))
RANKING = (0, 2, 1, 4, 3)
