import dataclasses
import json
import pathlib

import pytest

from dsjax.checkpoint import names
from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.hf_config import family_of, from_hf, to_hf, weight_block
from dsjax.config import ModelConfig
from dsjax.settings import load_config
from tests.checkpoint.broken_rules import changed, refused
from tests.golden.cases import CASES, DEEPSEEK_MOE, LLAMA, ORACLE_CASES, QWEN2, V2, V2_LITE, V3
from tests.model.tiny import TINY
from tests.vision import toy

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
            {"rope_scaling": YARN | {"factor": 1, "attention_factor": 1.2}},
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


@pytest.mark.parametrize("case", [*CASES, *ORACLE_CASES])
def test_broken_rules_name_the_fields_of_the_file(case):
    config = (CASES | ORACLE_CASES)[case].config
    assert {"hidden_size", "num_attention_heads", "vocab_size"} <= refused(config)


@pytest.mark.parametrize(
    ("config", "change", "message", "remedy"),
    [
        (
            V3, {"n_routed_experts": 0},
            r"experts=0, so all layers are dense: set config\.json\.first_k_dense_replace=3",
            {"first_k_dense_replace": 3},
        ),
        (
            V3, {"num_experts_per_tok": 7, "topk_group": 1},
            r"json\.num_experts_per_tok=7 exceeds .* raise config\.json\.topk_group",
            {"topk_group": 4},
        ),
        (
            V3 | rope_parameters(V3) | {"rope_scaling": None}, {"rope_parameters.beta_slow": 40.0},
            r"json\.rope_parameters\.beta_slow=40\.0 exceeds config\.json\.rope_parameters\.beta_f",
            {"rope_parameters.beta_fast": 50.0},
        ),
        (
            DEEPSEEK_MOE, {"num_attention_heads": 3, "num_key_value_heads": 3},
            r"json\.hidden_size=64 does not divide by config\.json\.num_attention_heads=3",
            {"hidden_size": 96},
        ),
    ],
)  # fmt: skip
def test_broken_rule_has_a_remedy(config, change, message, remedy):
    for key, value in change.items():
        config = changed(config, key, value)
    with pytest.raises(ValueError, match=f"{message}.*--override FIELD=VALUE"):
        from_hf(config)
    for key, value in remedy.items():
        config = changed(config, key, value)
    from_hf(config)


JANUS = to_hf(toy.LANGUAGE, "janus", vision=toy.VISION)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("value", ["int8", "auto", 16, ["bfloat16"], {"text": "bfloat16"}])
def test_dtype_that_no_weights_have_is_refused(name, value):
    message = rf"config\.json\.{name}=.* is not one of float32, bfloat16, float16.*--override"
    with pytest.raises(ValueError, match=message):
        from_hf(V3 | {name: value})
    section = JANUS["text_config"] | {name: value}
    with pytest.raises(ValueError, match=rf"text_config\.{name}=.* is not one of float32"):
        from_hf(JANUS | {"text_config": section})
    for usual in ("float32", "torch.bfloat16", None):
        assert from_hf(V3 | {name: usual}) == from_hf(V3)


def test_all_problems_are_named_together():
    with pytest.raises(ValueError) as failure:
        from_hf(V3 | {"hidden_act": "gelu", "kv_lora_rank": None, "surprise": 1})
    assert all(part in str(failure.value) for part in ("hidden_act", "kv_lora_rank", "surprise"))


@pytest.mark.parametrize("model_type", ["deepseek_v9", None])
def test_unknown_family_is_refused(model_type):
    with pytest.raises(
        ValueError, match=f"model_type={model_type!r} is not supported, only deepseek, deepseek_v2"
    ):
        family_of({"model_type": model_type})


@pytest.mark.parametrize("size", [-1, 2**31, 2**63])
def test_integers_are_bounded(size):
    with pytest.raises(ValueError, match=rf"hidden_size={size} is not between 0 and 2,147,483,647"):
        from_hf(V3 | {"hidden_size": size})


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 2**30}, {"n_routed_experts": 2**30}, {"num_mtp_layers": 10**6}],
)
def test_number_of_tensors_is_bounded(change):
    with pytest.raises(ValueError, match=r"describes more than 1,000,000 tensors"):
        from_hf(V3 | change)


def test_layer_types_need_one_entry_a_layer():
    full = ["full_attention"]
    assert from_hf(QWEN2 | {"layer_types": full * 3}) == from_hf(QWEN2)
    with pytest.raises(ValueError, match=r"layer_types=\['full_attention'\] is not supported"):
        from_hf(QWEN2 | {"layer_types": full})


FP8 = PUBLISHED["v3_671b"]["quantization_config"]


def test_weight_block_is_read_from_the_config():
    assert weight_block(V3) is None and weight_block(V3 | {"quantization_config": None}) is None
    for more in ({}, {"activation_scheme": "dynamic"}, {"scale_fmt": "ue8m0"}):
        assert weight_block({"quantization_config": FP8 | more}) == (128, 128)
    assert weight_block({"quantization_config": FP8 | {"weight_block_size": [64, 32]}}) == (64, 32)
    by_transformers = {
        "quant_method": "fp8", "modules_to_not_convert": None, "modules_to_convert": None,
        "activation_scheme": "dynamic", "weight_block_size": [128, 128], "dequantize": False,
        "scale_fmt": "float", "expert_dtype": "fp8",
    }  # fmt: skip
    assert weight_block({"quantization_config": by_transformers}) == (128, 128)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method='bitsandbytes' is"),
        ({"quant_method": "gptq", "bits": 4}, r"quant_method='gptq' is not supported, only 'fp8'"),
        ({"quant_method": "awq"}, r"quant_method='awq'"),
        ({"quant_method": "compressed-tensors"}, r"quant_method='compressed-tensors'"),
        ({"quant_method": "fp8"}, r"quantization_config lacks weight_block_size"),
        (FP8 | {"fmt": "e5m2"}, r"fmt='e5m2' is not supported, only 'e4m3'"),
        (FP8 | {"activation_scheme": "static"}, r"activation_scheme='static' is not supported"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size=\[128\] is not two integers"),
        (FP8 | {"weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\] is not two"),
        (FP8 | {"weight_block_size": [128, 1.5]}, r"weight_block_size=\[128, 1\.5\] is not two"),
        (FP8 | {"weight_block_size": 128}, r"weight_block_size=128 is not two integers"),
        (FP8 | {"kv_cache_quant_algo": "x"}, r"has kv_cache_quant_algo, unknown here"),
        ("fp8", r"quantization_config='fp8' is not an object"),
    ],
)  # fmt: skip
def test_other_quantization_is_refused_by_name(quantization, message):
    with pytest.raises(ValueError, match=message):
        weight_block({"quantization_config": quantization})


# Post-training configs have no model of their own, NSA has no published family.
TRAINED = sorted(path.stem for path in CONFIGS.glob("*.py") if "tools/train.py" in path.read_text())
NSA = [name for name in TRAINED if name.startswith("nsa")]
SHIPPED = [name for name in TRAINED if name not in NSA]


def without_init(config: ModelConfig) -> ModelConfig:
    """Only the spread of initial values is not read back: see the module."""
    return dataclasses.replace(config, init_std=1.0)


@pytest.mark.parametrize("name", [*SHIPPED, "TINY"])
def test_written_config_reads_back(name):
    ours = TINY if name == "TINY" else load_config(CONFIGS / f"{name}.py").model
    family = family_for(ours)
    written = json.loads(json.dumps(to_hf(ours, family)))
    assert family_of(written) == family
    assert without_init(from_hf(written)) == without_init(ours)
    assert written["initializer_range"] == ours.init_std


@pytest.mark.parametrize("name", NSA)
def test_native_sparse_attention_has_no_family(name):
    ours = load_config(CONFIGS / f"{name}.py").model
    with pytest.raises(ValueError, match=r"attention=nsa.*nor has any other, so it stays here"):
        next(names.tensors(ours, family_for(ours)))


@pytest.mark.parametrize("case", [*CASES, *ORACLE_CASES])
def test_written_config_is_that_of_the_family(case):
    published = (CASES | ORACLE_CASES)[case].config
    ours = from_hf(published)
    assert family_for(ours) == family_of(published)
    written = to_hf(ours, family_for(ours))
    assert from_hf(written) == ours
    for name in ("architectures", "topk_method", "scoring_func", "q_lora_rank", "rope_theta"):
        assert written.get(name) == published.get(name), name


def test_written_rope_has_both_names_of_its_kind():
    written = to_hf(from_hf(V3), "deepseek_v3")["rope_scaling"]
    assert written.pop("rope_type") == "yarn"
    assert written == V3["rope_scaling"]
    without = {name: value for name, value in V3["rope_scaling"].items() if "mscale" not in name}
    written = to_hf(from_hf(V3 | {"rope_scaling": without}), "deepseek_v3")["rope_scaling"]
    assert {"mscale", "mscale_all_dim"}.isdisjoint(written)


def test_written_config_names_the_dtypes():
    written = to_hf(TINY, "deepseek_v3", dtype="float32")
    assert written["torch_dtype"] == "float32" and "quantization_config" not in written
    written = to_hf(TINY, "deepseek_v3", block=(128, 64))
    assert written["torch_dtype"] == "bfloat16" and weight_block(written) == (128, 64)


def test_fields_out_of_use_do_not_matter():
    ours = dataclasses.replace(
        TINY, n_kv_heads=2, head_dim=7, mscale=0.5, rope_factor=3.0, low_freq_factor=2.0
    )
    assert to_hf(ours, "deepseek_v3") == to_hf(TINY, "deepseek_v3")
    dense = ModelConfig(
        vocab_size=9, dim=8, n_layers=2, n_dense_layers=2, n_heads=2, inter_dim=8, attention="gqa",
        kv_lora_rank=3, route_scale=9.0, score_func="softmax", mtp_after_final_norm=False,
    )  # fmt: skip
    back = from_hf(to_hf(dense, "llama"))
    assert (back.n_kv_heads, back.head_dim) == (2, 4)
    mla = dataclasses.replace(TINY, n_dense_layers=3, n_routed_experts=0, n_mtp=0, norm_topk=True)
    for family in ("deepseek_v2", "deepseek_v3"):
        assert from_hf(to_hf(mla, family)).n_routed_experts == 0


GQA = ModelConfig(
    vocab_size=9, dim=8, n_layers=2, n_dense_layers=2, n_heads=2, inter_dim=8, attention="gqa"
)


@pytest.mark.parametrize(
    ("config", "family", "change", "message"),
    [
        (TINY, "deepseek_v3", {"mtp_after_final_norm": False}, r"cannot say model\.mtp_after_fin"),
        (TINY, "deepseek_v3", {"score_func": "softmax"}, r"scoring_func='softmax' is not supp"),
        (TINY, "deepseek_v3", {"group_score": "max"}, r"group_score='max' \(it reads as 'top2'\)"),
        (TINY, "deepseek_v3", {"router_bias": False}, r"model\.router_bias=False"),
        (TINY, "deepseek_v2", {"score_func": "softmax"}, r"norm_topk_prob=True is not supported"),
        (TINY, "llama", {}, r"cannot say .*model\.attention='mla' \(it reads as 'gq"),
        (GQA, "llama", {"qkv_bias": True}, r"cannot say model\.qkv_bias=True"),
        (GQA, "qwen2", {}, r"cannot say model\.qkv_bias=False"),
        (GQA, "qwen3", {}, r"cannot say model\.qk_norm=False"),
        (GQA, "llama", {"qk_norm": True}, r"cannot say model\.qk_norm=True"),
        (GQA, "deepseek", {"head_dim": 6}, r"cannot say model\.head_dim=6 \(it reads as 4\)"),
        (
            GQA, "llama", {"rope_scaling": "yarn"},
            r"mscale and mscale_all_dim are read by the MLA families only",
        ),
        (
            TINY, "deepseek_v3", {"rope_scaling": "yarn", "mscale_all_dim": 0.0, "mscale": 0.7},
            r"family deepseek_v3 cannot hold this model: .*only one of mscale and mscale_all_dim",
        ),
    ],
)  # fmt: skip
def test_model_that_a_family_cannot_describe_is_refused(config, family, change, message):
    with pytest.raises(ValueError, match=message):
        to_hf(dataclasses.replace(config, **change), family)


def test_head_of_another_width_is_written():
    ours = dataclasses.replace(GQA, head_dim=6, n_kv_heads=1)
    assert from_hf(to_hf(ours, "llama")) == ours
    assert "head_dim" not in to_hf(GQA, "llama")
