"""Qwen3: DeepSeek-R1-0528-Qwen3-8B. Each head's query and key is normed before rope; no biases."""

from __future__ import annotations

from dsjax.checkpoint.families.family import GQA, GQA_NEUTRAL, TEXT, Family, gqa_rules
from dsjax.checkpoint.families.table import field, fixed

QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    constants={"attention": "gqa", "qk_norm": True},
    rows=(
        *TEXT,
        *GQA,
        # Loaders take an absent width for 128, not for hidden_size / num_attention_heads.
        field("head_dim", "head_dim", 128, value=lambda model: model.qk_head_dim),
        fixed("use_sliding_window", False),
        fixed("attention_bias", False),
        fixed("mlp_bias", False, written=False),
    ),
    attention=gqa_rules,
    neutral=GQA_NEUTRAL,
)
