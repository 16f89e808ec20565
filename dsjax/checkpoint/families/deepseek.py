"""DeepSeekMoE 16B: Llama's attention; experts chosen by softmax, without groups or scaling."""

from __future__ import annotations

from dsjax.checkpoint.families.family import (
    EQUAL_HEADS,
    EXPERTS,
    GQA,
    GQA_NEUTRAL,
    SOFTMAX,
    TEXT,
    Family,
    gqa_rules,
)
from dsjax.checkpoint.families.table import field, fixed

DEEPSEEK = Family(
    name="deepseek",
    architecture="DeepseekForCausalLM",
    constants={"attention": "gqa", **SOFTMAX},
    rows=(
        *TEXT,
        *GQA,
        EQUAL_HEADS,
        fixed("attention_bias", False),
        fixed("mlp_bias", False, written=False),
        *EXPERTS,
        fixed("scoring_func", "softmax", ours="score_func"),
        field("norm_topk_prob", "norm_topk"),
        fixed("routed_scaling_factor", 1.0, ours="route_scale"),
        fixed("topk_method", "greedy", written=False),
    ),
    attention=gqa_rules,
    neutral=GQA_NEUTRAL,
)
