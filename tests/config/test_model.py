"""Every rule of a model's shape, and the sizes that follow from it."""

import dataclasses

import pytest

from dsjax.config import Config, ModelConfig
from dsjax.config.finetuning import FineTuning

DENSE = {
    "vocab_size": 64,
    "dim": 16,
    "n_layers": 2,
    "n_dense_layers": 2,
    "n_heads": 2,
    "inter_dim": 32,
    "attention": "gqa",
}
LATENT = {
    "attention": "mla",
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
MOE = {
    "n_dense_layers": 1,
    "n_routed_experts": 8,
    "n_activated_experts": 2,
    "moe_inter_dim": 8,
    "n_expert_groups": 4,
    "n_limited_groups": 2,
}


def dense(**changes):
    return ModelConfig(**(DENSE | changes))


def moe(**changes):
    return ModelConfig(**(DENSE | MOE | changes))


INDEXER = {"q_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 4, "index_topk": 3}


def sparse(**changes):
    return ModelConfig(**(DENSE | LATENT | INDEXER | changes))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (
            sparse,
            {"index_topk": 0},
            r"model\.index_n_heads, model\.index_head_dim, model\.index_topk above 0, not 2, 4, 0; "
            "set all three, or all to 0",
        ),
        (sparse, {"index_n_heads": 0}, r"above 0, not 0, 4, 3"),
        (sparse, {"index_topk": -1}, r"model\.index_topk=-1 must not be negative"),
        (sparse, {"q_lora_rank": 0}, r"model\.q_lora_rank above 0, not mla and 0"),
        (sparse, {"attention": "gqa"}, r"needs model\.attention=mla and .* not gqa and 8"),
        (
            sparse,
            {"index_head_dim": 1},
            r"model\.index_head_dim=1 has no room for the model\.qk_rope_head_dim=2 channels",
        ),
        (dense, {"vocab_size": 0}, r"model\.vocab_size=0 must be greater than 0"),
        (dense, {"init_std": 0.0}, r"model\.init_std=0\.0 must be greater than 0"),
        (dense, {"n_mtp": -1}, r"model\.n_mtp=-1 must not be negative"),
        (dense, {"attention": "mla"}, r"model\.kv_lora_rank=0 must be greater than 0"),
        (dense, {"n_heads": 3}, r"model\.dim=16 does not divide by model\.n_heads=3; set model\.h"),
        (dense, {"n_heads": 4, "n_kv_heads": 3}, r"n_heads=4 does not divide by model\.n_kv_heads"),
        (dense, {"head_dim": 3}, r"so a head's width \(model\.head_dim\) must be even, not 3"),
        (sparse, {"qk_rope_head_dim": 3}, r"so model\.qk_rope_head_dim must be even, not 3"),
        (
            dense,
            {"beta_slow": 40.0},
            r"model\.beta_slow=40\.0 exceeds model\.beta_fast=32\.0",
        ),
        (
            dense,
            {"rope_scaling": "llama3", "low_freq_factor": 4.5},
            r"model\.low_freq_factor=4\.5 exceeds model\.high_freq_factor=4\.0",
        ),
        (dense, {"n_dense_layers": 3}, r"model\.n_dense_layers=3 exceeds model\.n_layers=2"),
        (dense, {"n_dense_layers": 1}, r"so all layers are dense: set model\.n_dense_layers=2"),
        (moe, {"moe_inter_dim": 0}, r"model\.moe_inter_dim=0 must be greater than 0"),
        (moe, {"n_expert_groups": 3}, r"n_routed_experts=8 does not divide into .*groups=3 equal"),
        (moe, {"n_limited_groups": 5}, r"n_limited_groups=5 exceeds model\.n_expert_groups=4"),
        (moe, {"n_activated_experts": 9}, r"activated_experts=9 exceeds model\.n_routed_experts=8"),
        (
            moe,
            {"n_activated_experts": 5},
            r"n_activated_experts=5 exceeds the 4 experts of 2 groups of 2; raise model\.n_limited",
        ),
        (
            moe,
            {"n_expert_groups": 8},
            r"model\.group_score=top2 needs at least two experts per group",
        ),
    ],
)
def test_model_refuses(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_sizes_of_latent_attention():
    model = dense(**LATENT)
    assert (model.qk_head_dim, model.value_head_dim, model.rope_dim) == (6, 4, 2)


def nsa(**changes):
    return dense(**({"attention": "nsa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nsa_stride": 0}, r"model\.nsa_stride=0 must be greater than 0"),
        ({"nsa_length": 40}, r"nsa_length=40 does not divide by model\.nsa_stride=16"),
        ({"nsa_block": 24}, r"nsa_block=24 does not divide by model\.nsa_stride=16"),
        ({"nsa_count": 2}, r"nsa_count=2 leaves no room for the first block and the two nearest"),
        ({"qkv_bias": True}, r"neither biases nor norms .*qkv_bias=True .*set both to False"),
    ],
)
def test_native_sparse_attention_refuses(changes, message):
    nsa()
    with pytest.raises(ValueError, match=message):
        nsa(**changes)


def test_sizes_of_native_sparse_attention():
    assert (nsa().qk_head_dim, nsa().value_head_dim, nsa(v_head_dim=6).value_head_dim) == (8, 8, 6)
    assert nsa().rope_dim == 8


def compressed(**changes):
    shape = {
        "attention": "compressed", "n_dense_layers": 0, "n_heads": 4, "n_kv_heads": 1,
        "head_dim": 8, "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 8,
        "layer_types": ("sparse", "heavy"), "index_n_heads": 2, "index_head_dim": 8,
        "index_topk": 4, "n_routed_experts": 4, "n_activated_experts": 2, "moe_inter_dim": 8,
    }  # fmt: skip
    return dense(**(shape | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ("sparse",)}, r"layer_types names 1 layers, and model\.n_layers=2; name"),
        ({"window_size": 0}, r"model\.window_size=0 must be greater than 0"),
        (
            {"index_n_heads": 0, "index_head_dim": 0, "index_topk": 0},
            r"has sparse layers, whose entries an indexer chooses: set model\.index_n_heads",
        ),
        ({"qk_rope_head_dim": 16}, r"qk_rope_head_dim=16 exceeds model\.head_dim=8"),
        ({"index_head_dim": 2}, r"index_head_dim=2 has no room for"),
        ({"o_groups": 3}, r"n_heads=4 does not divide into model\.o_groups=3"),
        ({"hash_layers": (0, 2)}, r"hash_layers=\(0, 2\) must be different layers from 0 to 1"),
        ({"hash_layers": (1, 1)}, r"hash_layers=\(1, 1\) must be different"),
        ({"n_kv_heads": 2}, r"one key head, .* but model\.n_kv_heads=2.*set them to 1, 0 and 0"),
        ({"n_mtp": 1}, r"model\.n_mtp=1; set them to 1, 0 and 0"),
        ({"n_expert_groups": 2}, r"model\.n_expert_groups=2; set them to False, False and 1"),
        ({"swiglu_limit": -1.0}, r"model\.swiglu_limit=-1\.0 must not be negative"),
    ],
)
def test_compressed_attention_refuses(changes, message):
    compressed()
    with pytest.raises(ValueError, match=message):
        compressed(**changes)


def test_compressed_attention_is_not_trained():
    model = compressed()
    assert (model.qk_head_dim, model.value_head_dim, model.rope_dim) == (8, 8, 4)
    dense().check_trains()
    with pytest.raises(ValueError, match=r"compressed \(DeepSeek-V4\) is read, .* not trained"):
        model.check_trains()
    for root in (Config, FineTuning):
        with pytest.raises(ValueError, match=r"compressed \(DeepSeek-V4\) is read"):
            root(name="example", model=model)


def test_sizes_of_grouped_attention():
    model = dense(n_heads=4, n_kv_heads=2)
    assert (model.qk_head_dim, model.value_head_dim, model.rope_dim) == (4, 4, 4)
    assert model.kv_heads == 2
    assert dense().kv_heads == 2
    assert dense(head_dim=32).qk_head_dim == 32


def test_moe_layers_follow_the_dense_ones():
    assert (dense().n_moe_layers, moe().n_moe_layers) == (0, 1)


def test_groups_are_frozen():
    for group in (dense(), moe()):
        field = dataclasses.fields(group)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, field, 1)
