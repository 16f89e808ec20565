"""Shapes of the published models; what a shape does not name has `ModelConfig`'s default.

from dsjax.config.shapes import V3
config = Config(name="short", model=dataclasses.replace(V3, n_layers=8), ...)
"""

from dataclasses import replace

from dsjax.config.model import ModelConfig

# DeepSeek LLM (arXiv:2401.02954), table 2: dense.
LLM_7B = ModelConfig(
    vocab_size=102400, dim=4096, n_layers=30, n_dense_layers=30, inter_dim=11008,
    attention="gqa", n_heads=32, n_kv_heads=32, head_dim=128,
)  # fmt: skip
LLM_67B = replace(
    LLM_7B, dim=8192, n_layers=95, n_dense_layers=95, inter_dim=22016, n_heads=64, n_kv_heads=8
)

# DeepSeekMoE (arXiv:2401.06066), table 7. The 2B and the 145B were not released: the width of their
# experts is inferred, 1/4 and 1/8 of a standard feed-forward of 2.75 * dim.
MOE_16B = replace(
    LLM_7B, dim=2048, n_layers=28, n_dense_layers=1, inter_dim=10944, n_heads=16, n_kv_heads=16,
    n_routed_experts=64, n_shared_experts=2, n_activated_experts=6, moe_inter_dim=1408,
    score_func="softmax", group_score="max",
)  # fmt: skip
# There is no dense layer, so inter_dim is not used; the 8K vocabulary is taken as 8,192.
MOE_2B = replace(
    MOE_16B, vocab_size=8192, dim=1280, n_layers=9, n_dense_layers=0, inter_dim=3520, n_heads=10,
    n_kv_heads=10, max_seq_len=2048,
    n_routed_experts=63, n_shared_experts=1, n_activated_experts=7, moe_inter_dim=880,
)  # fmt: skip
# The dense first layer is as wide as the 16 experts that a token uses.
MOE_145B = replace(
    MOE_16B, dim=4096, n_layers=62, inter_dim=22528, n_heads=32, n_kv_heads=32,
    n_routed_experts=128, n_shared_experts=4, n_activated_experts=12,
)  # fmt: skip

# DeepSeek-V2 (arXiv:2405.04434), section 3.1.2. The published configs disagree about YaRN: those of
# V2 carry mscale = mscale_all_dim = 0.707, those of Coder-V2 and V2.5 (same shape) 1.0.
V2 = ModelConfig(
    vocab_size=102400, dim=5120, n_layers=60, n_dense_layers=1, inter_dim=12288, n_heads=128,
    q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    max_seq_len=163840, rope_scaling="yarn", rope_factor=40.0, mscale=0.707, mscale_all_dim=0.707,
    n_routed_experts=160, n_shared_experts=2, n_activated_experts=6, moe_inter_dim=1536,
    n_expert_groups=8, n_limited_groups=3, score_func="softmax", group_score="max",
    route_scale=16.0,
)  # fmt: skip
# Appendix B: no query latent and no groups; the weights of the chosen experts are not scaled.
V2_LITE = replace(
    V2, dim=2048, n_layers=27, inter_dim=10944, n_heads=16, q_lora_rank=0,
    n_routed_experts=64, moe_inter_dim=1408, n_expert_groups=1, n_limited_groups=1, route_scale=1.0,
)  # fmt: skip

# DeepSeek-V3 (arXiv:2412.19437), section 4.2, and R1.
V3 = replace(
    V2, vocab_size=129280, dim=7168, n_layers=61, n_dense_layers=3, inter_dim=18432,
    mscale=1.0, mscale_all_dim=1.0,
    n_routed_experts=256, n_shared_experts=1, n_activated_experts=8, moe_inter_dim=2048,
    n_limited_groups=4, score_func="sigmoid", group_score="top2", router_bias=True, norm_topk=True,
    route_scale=2.5, n_mtp=1,
)  # fmt: skip

# DeepSeek-V3.2 (arXiv:2512.02556) and V3.2-Exp: V3.1 with an indexer.
V3_2 = replace(V3, index_n_heads=64, index_head_dim=128, index_topk=2048)

# NSA (arXiv:2502.11089), section 4.1. Not released: the vocabulary, the widths of experts and of
# the dense layer (8 experts) are inferred from 27B parameters in all.
NSA_27B = replace(
    MOE_16B, dim=2560, n_layers=30, inter_dim=11776, attention="nsa", n_heads=64, n_kv_heads=4,
    head_dim=192, v_head_dim=128, max_seq_len=8192,
    n_routed_experts=72, n_shared_experts=2, n_activated_experts=6, moe_inter_dim=1472,
)  # fmt: skip

# Qwen2.5 as DeepSeek-R1-Distill-Qwen has it: biases on queries, keys and values. The two smallest
# are Qwen2.5-Math, with a norm epsilon and a rope theta of their own; the 1.5B's head is untied,
# unlike its base model's.
QWEN_1P5B = ModelConfig(
    vocab_size=151936, dim=1536, n_layers=28, n_dense_layers=28, inter_dim=8960, init_std=0.02,
    max_seq_len=131072, attention="gqa", n_heads=12, n_kv_heads=2, head_dim=128, qkv_bias=True,
)  # fmt: skip
QWEN_7B = replace(QWEN_1P5B, vocab_size=152064, dim=3584, inter_dim=18944, n_heads=28, n_kv_heads=4)
QWEN_14B = replace(
    QWEN_7B, dim=5120, n_layers=48, n_dense_layers=48, inter_dim=13824, n_heads=40, n_kv_heads=8,
    norm_eps=1e-5, rope_theta=1e6,
)  # fmt: skip
QWEN_32B = replace(QWEN_14B, n_layers=64, n_dense_layers=64, inter_dim=27648)

# Qwen3 as DeepSeek-R1-0528-Qwen3-8B has it: norms of queries and keys, no biases, and YaRN with all
# of its temperature on cos and sin.
QWEN3_8B = ModelConfig(
    vocab_size=151936, dim=4096, n_layers=36, n_dense_layers=36, inter_dim=12288, init_std=0.02,
    max_seq_len=131072, attention="gqa", n_heads=32, n_kv_heads=8, head_dim=128, qk_norm=True,
    rope_theta=1e6, rope_scaling="yarn", rope_factor=4.0, original_seq_len=32768,
    mscale_all_dim=0.0,
)  # fmt: skip

# Llama 3.1 and 3.3 as DeepSeek-R1-Distill-Llama has them.
LLAMA_8B = ModelConfig(
    vocab_size=128256, dim=4096, n_layers=32, n_dense_layers=32, inter_dim=14336, norm_eps=1e-5,
    init_std=0.02, max_seq_len=131072, attention="gqa", n_heads=32, n_kv_heads=8, head_dim=128,
    rope_theta=500000.0, rope_scaling="llama3", rope_factor=8.0, original_seq_len=8192,
)  # fmt: skip
LLAMA_70B = replace(LLAMA_8B, dim=8192, n_layers=80, n_dense_layers=80, inter_dim=28672, n_heads=64)
