"""Fields of config.json as the releases carry them, and what tools leave behind when they save."""

from __future__ import annotations

from typing import Any

_V3_CODE = {
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
_FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128],
}  # fmt: skip
_YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": _V3_CODE, "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": _FP8, "rms_norm_eps": 1e-06, "rope_scaling": _YARN,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
_V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001,
    "bos_token_id": 100000, "eos_token_id": 100001, "ep_size": 1, "first_k_dense_replace": 1,
    "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
    "intermediate_size": 12288, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v2", "moe_intermediate_size": 1536, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 160, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 128, "num_experts_per_tok": 6, "num_hidden_layers": 60,
    "num_key_value_heads": 128, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000,
    "routed_scaling_factor": 16.0, "scoring_func": "softmax", "seq_aux": True,
    "tie_word_embeddings": False, "topk_group": 3, "topk_method": "group_limited_greedy",
    "torch_dtype": "bfloat16", "transformers_version": "4.39.3", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 100000, "eos_token_id": 100001,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 30, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "vocab_size": 102400,
}  # fmt: skip
_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
    "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 21,
    "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.44.0",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

RELEASES: dict[str, dict[str, Any]] = {
    "v3": _V3,
    "v3.1": _V3 | {"quantization_config": _FP8 | {"scale_fmt": "ue8m0"}},
    "v3.2": _V3
    | {
        "architectures": ["DeepseekV32ForCausalLM"], "auto_map": None, "index_head_dim": 128,
        "index_n_heads": 64, "index_topk": 2048, "model_type": "deepseek_v32",
        "quantization_config": _FP8 | {"scale_fmt": "ue8m0"}, "transformers_version": "4.44.2",
    },
    "moonlight": _V3
    | {
        "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
        "hidden_size": 2048, "intermediate_size": 11264, "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0,
        "q_lora_rank": None, "quantization_config": None, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 50000.0, "routed_scaling_factor": 2.446,
        "topk_group": 1, "vocab_size": 163840,
    },
    "kimi_k2": _V3
    | {
        "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
        "max_position_embeddings": 131072, "model_type": "kimi_k2", "n_group": 1,
        "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
        "rope_scaling": _YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
        "topk_group": 1, "transformers_version": "4.48.3", "vocab_size": 163840,
    },
    "v2": _V2,
    "v2_lite": _V2
    | {
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "n_group": 1, "n_routed_experts": 64, "num_attention_heads": 16, "num_hidden_layers": 27,
        "num_key_value_heads": 16, "q_lora_rank": None, "routed_scaling_factor": 1.0,
        "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "topk_group": 1,
        "topk_method": "greedy",
    },
    "moe_16b": {
        "architectures": ["DeepseekForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "bos_token_id": 100000,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
        "eos_token_id": 100001, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
        "max_position_embeddings": 4096, "model_type": "deepseek", "moe_intermediate_size": 1408,
        "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 2,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 28, "num_key_value_heads": 16, "pretraining_tp": 1,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000,
        "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True,
        "vocab_size": 102400,
    },
    "llm_7b": _LLAMA,
    "coder_33b": _LLAMA
    | {
        "bos_token_id": 32013, "eos_token_id": 32014, "hidden_size": 7168,
        "intermediate_size": 19200, "max_position_embeddings": 16384, "num_attention_heads": 56,
        "num_hidden_layers": 62, "num_key_value_heads": 8, "rope_theta": 100000,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "vocab_size": 32256,
    },
    "r1_distill_llama_8b": _LLAMA
    | {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
        "eos_token_id": 128001, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
        "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
    },
    "r1_distill_qwen_1p5b": _QWEN2,
    "r1_distill_qwen_7b": _QWEN2
    | {
        "hidden_size": 3584, "intermediate_size": 18944, "max_window_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "r1_0528_qwen3_8b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
        "max_position_embeddings": 131072, "max_window_layers": 36, "model_type": "qwen3",
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attn_factor": 0.8782488562869419, "factor": 4.0,
            "original_max_position_embeddings": 32768, "rope_type": "yarn",
        },
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip

# Left in config.json by transformers 4.4x and 5.x, unsloth, axolotl, LLaMA-Factory, PEFT merges and
# transformers.js; none of it changes what the model computes.
LEFT_BEHIND: dict[str, Any] = {
    "_attn_implementation_autoset": True, "_attn_implementation": "sdpa", "_commit_hash": "0f1e2d",
    "_experts_implementation": "grouped_mm", "_flash_attn_2_enabled": True,
    "_name_or_path": "unsloth/DeepSeek-R1-Distill-Qwen-1.5B", "add_cross_attention": False,
    "bad_words_ids": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "dtype": "bfloat16", "finetuning_task": None, "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
    "keys_to_ignore_at_inference": ["past_key_values"], "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0, "max_length": 20, "model_max_length": 4096, "num_beams": 1,
    "output_attentions": False, "output_hidden_states": False, "output_router_logits": False,
    "pad_token_id": 151654, "problem_type": None, "pruned_heads": {}, "repetition_penalty": 1.0,
    "return_dict": True, "router_aux_loss_coef": 0.001, "sep_token_id": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False,
    "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50, "top_p": 1.0,
    "torchscript": False, "transformers.js_config": {"dtype": "q4"},
    "transformers_version": "5.24.0", "typical_p": 1.0, "unsloth_fixed": True,
    "unsloth_version": "2025.3.19", "use_bfloat16": False, "use_cache": False,
    "use_mrope": False, "use_qk_norm": False, "mlp_only_layers": [], "some_future_switch": False,
}  # fmt: skip


def of_family(name: str) -> list[str]:
    """The releases of a family, to parametrize a test with."""
    return [release for release, config in RELEASES.items() if config["model_type"] == name]
