"""The reference checkpoints: small, and set to be hard.

600 tokens, far beyond the 64 that YaRN and Llama-3 scaling stretch; more expert groups than are
kept; router biases to +-2, in one case all negative; norm weights between 0.5 and 1.5; head widths
that all differ.
"""

from __future__ import annotations

import dataclasses
from typing import Any

LENGTH = 600
# Positions whose outputs are stored: the whole would be megabytes.
STORED = slice(LENGTH % 9, None, 9)


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint: its config.json as published and what its weights are drawn from."""

    config: dict[str, Any]
    seed: int
    bias: tuple[float, float] = (-2.0, 2.0)  # range of the router's biases


def _yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale_all_dim,
    }


_COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "max_position_embeddings": 2560,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_MLA = {
    "q_lora_rank": 48,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 32,
    "v_head_dim": 24,
}
_EXPERTS = {
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
}
V3 = {
    **_COMMON,
    **_MLA,
    **_EXPERTS,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "rope_scaling": _yarn(1.0, 1.0),
}
# Every query from position 96 on leaves keys out.
V32 = {
    **V3,
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_n_heads": 16,
    "index_head_dim": 48,
    "index_topk": 96,
}
V2 = {
    **_COMMON,
    **_MLA,
    **_EXPERTS,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "rope_scaling": _yarn(0.707, 0.707),
}
V2_LITE = {
    **V2,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
}
LLAMA = {
    **_COMMON,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
QWEN2 = {
    **{name: value for name, value in _COMMON.items() if name != "attention_bias"},
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "num_key_value_heads": 1,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 128,
}
# Heads of another width than hidden_size / num_attention_heads, and YaRN with a key that
# transformers passes over, as R1-0528-Qwen3-8B has it.
QWEN3 = {
    **_COMMON,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "num_key_value_heads": 2,
    "head_dim": 24,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "attn_factor": 0.83,
    },
}
# What transformers does not have is compared with the NumPy oracles: DeepSeekMoE, and multi-token
# prediction of any depth.
DEEPSEEK_MOE = {
    **_COMMON,
    "model_type": "deepseek",
    "architectures": ["DeepseekForCausalLM"],
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 24,
    "n_shared_experts": 2,
    "num_experts_per_tok": 5,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_scaling": None,
}
V3_MTP = {
    **V3,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 2,
}
V32_MTP = {
    **V3_MTP,
    **{name: value for name, value in V32.items() if name.startswith(("index", "model_", "arch"))},
    "num_nextn_predict_layers": 1,
    "index_topk": 24,
}

CASES = {
    "v3": Case(V3, seed=1),
    # Every biased score is negative, so a masked expert worth 0 would win; cos and sin are scaled
    # too; the norms' epsilon is not that of the latents'.
    "v3_negative_bias": Case(
        {
            **V3,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "rms_norm_eps": 1e-3,
            "rope_scaling": _yarn(1.0, 0.707),
        },
        seed=2,
        bias=(-2.0, -1.1),
    ),
    "v32": Case(V32, seed=10),
    "v2": Case(V2, seed=3),
    "v2_lite": Case(V2_LITE, seed=4),
    "llama": Case(LLAMA, seed=5),
    # DeepSeek Coder's linear scaling.
    "llama_linear": Case(
        {**LLAMA, "head_dim": 16, "rope_scaling": {"type": "linear", "factor": 4.0}}, seed=6
    ),
    "qwen2": Case(QWEN2, seed=7),
    "qwen3": Case(QWEN3, seed=10),
}
ORACLE_CASES = {
    "deepseek_moe": Case(DEEPSEEK_MOE, seed=8),
    "v3_mtp": Case(V3_MTP, seed=9),
    "v32_mtp": Case(V32_MTP, seed=11),
}
