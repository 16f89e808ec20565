"""DeepSeek-V3.2 and V3.2-Exp: V3 with an indexer in every layer, the MTP layer's included.

FP8 checkpoints have scales that are powers of two. Of the indexer's matrices `wq_b` and `wk` are in
FP8, `weights_proj` is not; its norm is float32. An indexer in some layers only is refused.

transformers also writes what follows from other fields: `layer_types`, `mlp_layer_types`, and as
`head_dim` the width that rope turns.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dsjax.checkpoint.families.deepseek_v3 import DEEPSEEK_V3
from dsjax.checkpoint.families.family import Rule, mla_rules
from dsjax.checkpoint.families.table import MAX_LISTED, Values, field, fixed
from dsjax.config import ModelConfig


def _indexed(values: Values) -> list[str]:
    return ["indexed_attention"] * min(values["n_layers"], MAX_LISTED)


def _feed_forwards(values: Values) -> list[str]:
    layers = min(values["n_layers"], MAX_LISTED)
    dense = min(values["n_dense_layers"], layers)
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def _rules(model: ModelConfig) -> list[Rule]:
    """Returns the rules for multi-head latent attention with an indexer."""
    heads, width, name = model.index_n_heads, model.index_head_dim, "self_attn.indexer."

    def path(*last: str) -> tuple[str, ...]:
        return ("attn", "indexer", *last)

    kept: dict[str, Any] = {"keep_float32": True}
    return [
        *mla_rules(model),
        Rule(f"{name}wq_b.weight", path("wq_b"), (heads * width, model.q_lora_rank)),
        Rule(f"{name}wk.weight", path("wk"), (width, model.dim)),
        Rule(f"{name}k_norm.weight", path("k_norm", "weight"), (width,), **kept),
        Rule(f"{name}k_norm.bias", path("k_norm", "bias"), (width,), **kept),
        Rule(f"{name}weights_proj.weight", path("weights_proj"), (heads, model.dim), plain=True),
    ]


DEEPSEEK_V32 = dataclasses.replace(
    DEEPSEEK_V3,
    name="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    rows=(
        *DEEPSEEK_V3.rows,
        field("index_n_heads", "index_n_heads"),
        field("index_head_dim", "index_head_dim"),
        field("index_topk", "index_topk"),
        fixed("layer_types", _indexed, written=False),
        fixed("mlp_layer_types", _feed_forwards, written=False),
    ),
    attention=_rules,
    indexer=True,
    scale="pow2",
)
