"""The exact geometries of NVIDIA's Nemotron Nano 12B, 9B and 30B-A3B, and small ones in their proportions."""

import dataclasses

from elastic_core.geometry import ModelConfig

NANO_12B = ModelConfig(
    hybrid_override_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    hidden_size=5120,
    intermediate_size=20480,
    num_attention_heads=40,
    num_key_value_heads=8,
    head_dim=128,
    mamba_num_heads=128,
    mamba_head_dim=80,
    ssm_state_size=128,
    n_groups=8,
    vocab_size=131072,
)
NANO_9B = dataclasses.replace(
    NANO_12B,
    hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    hidden_size=4480,
    intermediate_size=15680,
)
NANO_4B_PATTERN = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"  # of Nemotron 3 Nano 4B, made from NANO_9B
NANO_30B = ModelConfig(
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688,
    intermediate_size=1856,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    vocab_size=131072,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
)

# Their proportions at hidden sizes that two CPU cores can train.
NANO_97M = ModelConfig(
    hybrid_override_pattern="M-M-M*-M-",
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    mamba_num_heads=32,
    mamba_head_dim=64,
    ssm_state_size=64,
    n_groups=4,
    vocab_size=16384,
    chunk_size=64,
)
NANO3_139M = dataclasses.replace(
    NANO_97M,
    hybrid_override_pattern=NANO_97M.hybrid_override_pattern.replace("-", "E"),
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
    moe_shared_expert_intermediate_size=1024,
)
