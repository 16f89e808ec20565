"""Llama: DeepSeek LLM, Coder and Math, and the R1 distillations based on Llama 3."""

from __future__ import annotations

from dsjax.checkpoint.families.family import GQA, GQA_NEUTRAL, HEAD_DIM, TEXT, Family, gqa_rules
from dsjax.checkpoint.families.table import fixed

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    constants={"attention": "gqa"},
    rows=(*TEXT, *GQA, HEAD_DIM, fixed("attention_bias", False), fixed("mlp_bias", False)),
    attention=gqa_rules,
    neutral=GQA_NEUTRAL,
)
