import dataclasses
import pathlib

import pytest

from dsjax.checkpoint.hf_config import family_of, from_hf
from dsjax.settings import load_config
from tests.golden.cases import CASES, DEEPSEEK_MOE, LLAMA, QWEN2, V2, V2_LITE, V3

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
YARN = V3["rope_scaling"] | {"original_max_position_embeddings": 4096}
PUBLISHED = {
    "v3_671b": V3
    | {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "first_k_dense_replace": 3, "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "max_position_embeddings": 163840, "num_nextn_predict_layers": 1, "rope_scaling": YARN,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        "aux_loss_alpha": 0.001,
        "seq_aux": True, "ep_size": 1, "initializer_range": 0.02, "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
        "pretraining_tp": 1,
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128,
        128]},
    },
    "v2_lite": V2_LITE
    | {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64,
        "max_position_embeddings": 163840, "rope_scaling": YARN | {"mscale": 0.707,
        "mscale_all_dim": 0.707},
    },
    "v2_236b": V2
    | {
        "vocab_size": 102400, "hidden_size": 5120, "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 160, "max_position_embeddings": 163840,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "moe_16b": DEEPSEEK_MOE
    | {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6, "max_position_embeddings": 4096, "aux_loss_alpha": 0.001,
        "seq_aux": True,
    },
    "llm_67b": {name: value for name, value in LLAMA.items() if name != "head_dim"}
    | {
        "vocab_size": 102400, "hidden_size": 8192, "intermediate_size": 22016,
        "num_hidden_layers": 95,
        "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "rope_scaling": None, "tie_word_embeddings": False,
    },
    "r1_distill_llama_8b": LLAMA
    | {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072,
        "rope_scaling": LLAMA["rope_scaling"] | {"original_max_position_embeddings": 8192},
        "mlp_bias": False,
    },
    "r1_distill_qwen_7b": QWEN2
    | {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rope_theta": 10000,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "use_mrope": None, "sliding_window": 4096,
        "max_window_layers": 28,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_gives_ours(name):
    ours = load_config(CONFIGS / f"{name}.py").model
    # Initial values and the training length are the recipe's, not the checkpoint's.
    read = dataclasses.replace(
        from_hf(PUBLISHED[name]), init_std=ours.init_std, max_seq_len=ours.max_seq_len
    )
    assert read == ours


def rope_parameters(config):
    """The same config in the spelling that transformers 5 writes."""
    rope = dict(config["rope_scaling"] or {})
    kind = rope.pop("type", rope.pop("rope_type", "default"))
    plain = {
        name: value for name, value in config.items() if name not in ("rope_scaling", "rope_theta")
    }
    return plain | {
        "rope_parameters": rope | {"rope_type": kind, "rope_theta": config["rope_theta"]}
    }


@pytest.mark.parametrize("config", [V3, LLAMA, CASES["llama_linear"].config, DEEPSEEK_MOE])
def test_both_spellings_of_rope_read_the_same(config):
    assert from_hf(rope_parameters(config)) == from_hf(config)


def test_both_spellings_at_once_must_agree():
    both = V3 | {"rope_parameters": rope_parameters(V3)["rope_parameters"]}
    assert from_hf(both) == from_hf(V3)
    for change in ({"factor": 20}, {"rope_theta": 5000.0}):
        with pytest.raises(
            ValueError, match="gives its rope settings more than once, with different values"
        ):
            from_hf(both | {"rope_parameters": both["rope_parameters"] | change})


def test_rope_theta_is_read_from_either_place():
    assert from_hf(QWEN2).rope_theta == 1000000.0
    assert from_hf(rope_parameters(LLAMA)).rope_theta == 500000.0


def test_yarn_without_mscale_scales_cos_and_sin():
    rope = {name: value for name, value in V3["rope_scaling"].items() if "mscale" not in name}
    config = from_hf(V3 | {"rope_scaling": rope})
    assert (config.mscale, config.mscale_all_dim) == (1.0, 0.0)


def test_greedy_choice_does_not_read_groups():
    config = from_hf(V2 | {"topk_method": "greedy"})
    assert (config.n_expert_groups, config.n_limited_groups) == (1, 1)
    assert from_hf(V2).n_expert_groups == 8


def test_mtp_layers_have_two_spellings():
    assert from_hf(V3 | {"num_nextn_predict_layers": 1}).n_mtp == 1
    renamed = {name: value for name, value in V3.items() if name != "num_nextn_predict_layers"}
    assert from_hf(renamed | {"num_mtp_layers": 2}).n_mtp == 2
    assert from_hf(renamed).n_mtp == 0


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (V3, {"kv_lora_rank": None}, r"config\.json lacks kv_lora_rank"),
        (V3, {"hidden_size": "64"}, r"hidden_size='64' is not an integer"),
        (V3, {"norm_topk_prob": 1}, r"norm_topk_prob=1 is not true or false"),
        (V3, {"rms_norm_eps": float("nan")}, r"rms_norm_eps=nan is not finite"),
        (V3, {"hidden_act": "gelu"}, r"hidden_act='gelu' is not supported, only 'silu'"),
        (V3, {"attention_bias": True}, r"attention_bias=True is not supported, only False"),
        (V3, {"rope_interleave": False}, r"rope_interleave=False is not supported"),
        (V3, {"num_key_value_heads": 2}, r"num_key_value_heads=2 is not supported, only 4"),
        (
            V3,
            {"scoring_func": "softmax"},
            r"scoring_func='softmax' is not supported, only 'sigmoid'",
        ),
        (V3, {"topk_method": "greedy"}, r"topk_method='greedy' is not supported, only 'noaux_tc'"),
        (V3, {"moe_layer_freq": 2}, r"moe_layer_freq=2 is not supported"),
        (
            V3,
            {"index_topk": 2048, "swiglu_limit": 7.0},
            r"has index_topk, swiglu_limit, unknown here",
        ),
        (V2, {"norm_topk_prob": True}, r"norm_topk_prob=True is not supported, only False"),
        (
            V2,
            {"topk_method": "noaux_tc"},
            r"topk_method='noaux_tc' is not supported, only 'greedy' or 'group",
        ),
        (
            DEEPSEEK_MOE,
            {"routed_scaling_factor": 2.0},
            r"routed_scaling_factor=2.0 is not supported",
        ),
        (QWEN2, {"use_sliding_window": True}, r"use_sliding_window=True is not supported"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 3}, r"layer_types=.*is not supported"),
        (LLAMA, {"mlp_bias": True}, r"mlp_bias=True is not supported"),
        (V3, {"rope_scaling": "yarn"}, r"rope_scaling='yarn' is not an object"),
        (
            V3,
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            r"rope_type='dynamic' is not supported, only",
        ),
        (
            V3,
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            r"rope_scaling lacks original_max_position",
        ),
        (V3, {"rope_scaling": YARN | {"mscale": None}}, r"only one of mscale and mscale_all_dim"),
        (
            V3,
            {"rope_scaling": YARN | {"attention_factor": 1.2}},
            r"attention_factor=1.2 is not supported",
        ),
        (
            V3,
            {"rope_scaling": YARN | {"truncate": False}},
            r"truncate=False is not supported, only True",
        ),
        (
            V3,
            {"rope_scaling": YARN | {"long_factor": [1]}},
            r"rope_scaling has long_factor, unknown here",
        ),
        (
            LLAMA,
            {"rope_scaling": YARN},
            r"mscale and mscale_all_dim are read by the MLA families only",
        ),
    ],
)
def test_field_that_changes_the_mathematics_is_refused_by_name(config, change, message):
    with pytest.raises(ValueError, match=message):
        from_hf(config | change)


def test_all_problems_are_named_together():
    with pytest.raises(ValueError) as failure:
        from_hf(V3 | {"hidden_act": "gelu", "kv_lora_rank": None, "surprise": 1})
    assert all(part in str(failure.value) for part in ("hidden_act", "kv_lora_rank", "surprise"))


@pytest.mark.parametrize("model_type", ["deepseek_v32", None])
def test_unknown_family_is_refused(model_type):
    with pytest.raises(
        ValueError, match=f"model_type={model_type!r} is not supported, only deepseek, deepseek_v2"
    ):
        family_of({"model_type": model_type})
