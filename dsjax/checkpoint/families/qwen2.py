"""Qwen2: the R1 distillations based on Qwen2.5. Queries, keys and values have biases, which
config.json does not mention.
"""

from __future__ import annotations

from dsjax.checkpoint.families.family import GQA, GQA_NEUTRAL, HEAD_DIM, TEXT, Family, gqa_rules
from dsjax.checkpoint.families.table import fixed

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    constants={"attention": "gqa", "qkv_bias": True},
    rows=(
        *TEXT,
        *GQA,
        HEAD_DIM,
        fixed("use_sliding_window", False),
        # This switch would add a fourth bias, on the output projection.
        fixed("attention_bias", False, written=False),
        fixed("mlp_bias", False, written=False),
    ),
    attention=gqa_rules,
    neutral=GQA_NEUTRAL,
)
