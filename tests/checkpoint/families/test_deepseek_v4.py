"""DeepSeek-V4: its config.json in its several forms, its tensors under both sets of names, and a
round trip through files.
"""

import dataclasses
import re

import numpy as np
import pytest

from dsjax.checkpoint import families, names
from dsjax.checkpoint.families.deepseek_v4 import DEEPSEEK_V4
from dsjax.checkpoint.hf_config import from_hf, to_hf
from dsjax.checkpoint.hf_folder import open_hf
from dsjax.checkpoint.load import load, open_checkpoint
from tests.checkpoint import conversions
from tests.checkpoint.broken_rules import changed, refused
from tests.checkpoint.hf_files import write
from tests.golden.checkpoint import normal_like

YARN = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32,
        "beta_slow": 1}  # fmt: skip
KINDS = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
CONFIG = {
    "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "vocab_size": 40,
    "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "qk_rope_head_dim": 8,
    "q_lora_rank": 24, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
    "layer_types": KINDS, "num_hash_layers": 1, "sliding_window": 8, "o_groups": 2,
    "compress_rates": {KINDS[1]: 4, KINDS[2]: 8}, "o_lora_rank": 8, "index_n_heads": 4,
    "index_head_dim": 16, "index_topk": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "compress_rope_theta": 160000, "rope_scaling": YARN,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
# As transformers writes the same.
SAVED = {
    **{key: value for key, value in CONFIG.items() if key != "num_hash_layers"},
    "mlp_layer_types": ["hash_moe", "moe", "moe"],
    "partial_rotary_factor": 0.5,
    "router_jitter_noise": 0.0,
    "rope_scaling": None,
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5},
        "compress": {**YARN, "rope_type": "yarn", "rope_theta": 160000, "attention_factor": 1.0,
                     "partial_rotary_factor": 0.5},
    },
}  # fmt: skip
MODEL = from_hf(CONFIG)


def tensors():
    """A checkpoint under DeepSeek's names."""
    found = {}
    for row in names.tensors(MODEL, "deepseek_v4"):
        if row.integer:
            first = np.arange(row.shape[0])[:, None]
            found[row.name] = (first + np.arange(row.shape[1])).astype(np.int64) % 4
        else:
            found[row.name] = normal_like(5, row.name, row.shape, 0.2)
    return found


def as_transformers_writes(name):
    if name == "head.weight":
        return name
    name = name.replace("hc_head_", "hc_head.hc_").replace(".attn.kv_norm.", ".attn.norm.")
    return "model." + {"embed.weight": "embed_tokens.weight"}.get(name, name)


def test_config_reads_in_both_forms_and_writes_back():
    assert from_hf(SAVED) == MODEL
    assert from_hf(to_hf(MODEL, "deepseek_v4")) == dataclasses.replace(MODEL)
    assert MODEL.layer_types == ("window", "sparse", "heavy") and MODEL.hash_layers == (0,)
    assert families.family_for(MODEL) == "deepseek_v4"
    assert MODEL.rope_theta == 1e4 and MODEL.compress_rope_theta == 1.6e5


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"layer_types": None, "compress_ratios": [0, 128, 4, 0]}, ("window", "heavy", "sparse")),
        ({"layer_types": None}, ("heavy", "heavy", "heavy")),
        ({"layer_types": None, "num_hidden_layers": 5}, ("heavy",) * 3 + ("sparse", "heavy")),
    ],
)
def test_kinds_of_layers_are_said_in_several_ways(changes, fields):
    assert from_hf(CONFIG | changes).layer_types == fields


def test_older_names_of_rates_and_hashed_layers_are_read():
    model = from_hf(
        CONFIG
        | {"compress_rates": None, "compress_rate_csa": 2, "compress_rate_hca": 16}
        | {"mlp_layer_types": ["moe", "hash_moe", "moe"]}
    )
    assert (model.sparse_ratio, model.heavy_ratio, model.hash_layers) == (2, 16, (1,))
    usual = {key: CONFIG[key] for key in CONFIG if key not in ("compress_rates", "num_hash_layers")}
    model = from_hf(usual | {"num_hidden_layers": 3})
    assert (model.sparse_ratio, model.heavy_ratio, model.hash_layers) == (4, 128, (0, 1, 2))


def test_yarn_scales_scores_only_if_the_file_says_so():
    assert (MODEL.mscale, MODEL.mscale_all_dim) == (0.0, 0.0)
    given = from_hf(CONFIG | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}})
    assert given == MODEL  # transformers passes them over
    scaled = from_hf(CONFIG | {"rope_scaling": YARN | {"attention_factor": 1.5}})
    assert scaled.mscale > 0
    assert from_hf(to_hf(scaled, "deepseek_v4")).mscale == pytest.approx(scaled.mscale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, r"layer_types=.* each of 3 layers one of slid"),
        ({"layer_types": KINDS[:2]}, r"layer_types=.* does not give each of 3 layers"),
        ({"layer_types": [[], {}, 3]}, r"layer_types=.* does not give each of 3 layers"),
        ({"compress_ratios": [0, 5, 4]}, r"compress_ratios=\[0, 5, 4\] does not"),
        ({"mlp_layer_types": ["dense"] * 3}, r"mlp_layer_types=.* one of hash_moe, moe"),
        ({"compress_rates": 4}, r"compress_rates=4 is not an object"),
        ({"compress_rates": {"other": 4}}, r"compress_rates has other, unknown here"),
        ({"expert_dtype": "fp4"}, r"expert_dtype='fp4' is not supported, only 'fp8'"),
        ({"n_shared_experts": 2}, r"n_shared_experts=2 is not supported, only 1"),
        ({"scoring_func": "softmax"}, r"scoring_func='softmax' is not supported, only 'sqrtsoft"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads=4 is not supported, only 1"),
        ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor=0\.25 of 16 channels is not qk"),
        ({"partial_rotary_factor": 1e308}, r"partial_rotary_factor times 16 exceeds 2,147"),
        (
            {"index_topk": 0},
            r"sparse layers, whose entries an indexer chooses: set config\.json\.in",
        ),
        ({"o_groups": 3}, r"num_attention_heads=4 does not divide into config\.json\.o_groups=3"),
        ({"sliding_window": 0}, r"json\.sliding_window=0 must be greater than 0"),
        ({"norm_topk_prob": False}, r"norm_topk_prob=False is not supported"),
        ({"attn_res_block_size": 2}, r"attn_res_block_size, unknown here"),
        ({"rope_scaling": "yarn"}, r"rope settings that are no object: 'yarn'"),
    ],
)
def test_config_that_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_hf(CONFIG | changes)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (CONFIG, "rope_theta", -2.0), (CONFIG, "compress_rope_theta", -2.0),
        (CONFIG, "rope_scaling.beta_slow", 99.0),
        (SAVED, "rope_parameters.main.rope_theta", -2.0),
        (SAVED, "rope_parameters.compress.rope_theta", -2.0),
        (SAVED, "rope_parameters.compress.beta_slow", 99.0),
        (CONFIG, f"compress_rates.{KINDS[2]}", 0), (CONFIG, "sliding_window", 0),
        (CONFIG | {"compress_rate_hca": 8}, "compress_rate_hca", 0),
    ],
)  # fmt: skip
def test_broken_rules_name_the_fields_of_the_file(config, key, value):
    with pytest.raises(ValueError, match=rf"config\.json\.{re.escape(key)}={value}[ ,;]"):
        from_hf(changed(config, key, value))


@pytest.mark.parametrize("config", [CONFIG, SAVED])
def test_broken_rules_name_no_field_of_ours(config):
    assert {"hidden_size", "o_groups", "sliding_window", "index_head_dim"} <= refused(config)


def test_every_kind_of_layer_has_the_published_tensors():
    found = {row.name: row for row in names.tensors(MODEL, "deepseek_v4")}
    shapes = {
        "layers.0.ffn.gate.tid2eid": (40, 2),
        "layers.0.attn.wo_a.weight": (16, 32),
        "layers.1.attn.compressor.ape": (4, 32),
        "layers.1.attn.indexer.compressor.wkv.weight": (32, 32),
        "layers.1.attn.indexer.weights_proj.weight": (4, 32),
        "layers.2.attn.compressor.ape": (8, 16),
        "layers.2.attn.attn_sink": (4,),
        "layers.2.ffn.gate.bias": (4,),
        "layers.2.ffn.experts.3.w2.weight": (32, 16),
        "layers.2.hc_ffn_fn": (24, 128),
        "hc_head_fn": (4, 128),
        "hc_head_scale": (1,),
    }
    assert {name: found[name].shape for name in shapes} == shapes
    assert "layers.0.ffn.gate.bias" not in found and "layers.0.attn.compressor.ape" not in found
    assert found["layers.1.attn.wq_b.weight"].quantized
    assert not found["layers.1.attn.compressor.wkv.weight"].quantized
    assert len({(row.path, row.slot) for row in found.values()}) == len(found)


def test_names_of_files_are_those_of_the_rules():
    assert DEEPSEEK_V4.canonical("mtp.0.attn.wq_a.weight") is None
    assert DEEPSEEK_V4.canonical("lm_head.weight") == "head.weight"
    for name in tensors():
        assert DEEPSEEK_V4.canonical(name) == name
        assert DEEPSEEK_V4.canonical(as_transformers_writes(name)) == name


def test_files_load_under_both_sets_of_names_and_convert_both_ways(tmp_path):
    published = tensors()
    theirs = {as_transformers_writes(name): value for name, value in published.items()}
    theirs["mtp.0.attn.wq_a.weight"] = np.zeros((2, 2), np.float32)
    one = load(write(tmp_path / "published", CONFIG, published), dtype="float32")
    two = load(write(tmp_path / "theirs", SAVED, theirs), dtype="float32")
    conversions.bring_in(tmp_path / "theirs", tmp_path / "ours", "keep")
    assert open_checkpoint(tmp_path / "ours").family == "deepseek_v4"
    three = load(tmp_path / "ours", dtype="float32")
    want = published["layers.0.ffn.gate.tid2eid"].T
    for model in (one, two, three):
        layers = model.moe_layers
        np.testing.assert_array_equal(layers.window_hash.tid2eid[...][0], want)
        ape = published["layers.2.attn.compressor.ape"].T
        np.testing.assert_array_equal(layers.heavy.attn.compressor.ape[...][0], ape)
    conversions.send_out(tmp_path / "ours", tmp_path / "back")
    back = open_hf(tmp_path / "back")
    assert {row.tensor.name for row in back.rows} == published.keys()
    for name, value in published.items():
        read = back.files.read(name)
        assert read.dtype == value.dtype and np.array_equal(read, value), name


def test_two_tensors_of_one_name_are_refused(tmp_path):
    twice = tensors() | {"model.norm.weight": np.ones(32, np.float32)}
    with pytest.raises(ValueError, match=r"two tensors for norm\.weight.*keep one"):
        open_hf(write(tmp_path / "twice", CONFIG, twice))


def test_table_must_be_of_integers(tmp_path):
    wrong = tensors()
    wrong["layers.0.ffn.gate.tid2eid"] = np.zeros((40, 2), np.float32)
    with pytest.raises(ValueError, match=r"tid2eid has dtype float32; it must be of integers"):
        open_hf(write(tmp_path / "wrong", CONFIG, wrong))
