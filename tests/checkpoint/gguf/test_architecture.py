"""Models that llama.cpp computes otherwise are refused by name, and keys are read back."""

import dataclasses

import numpy as np
import pytest

from dsjax.checkpoint.gguf import architecture, layout
from dsjax.checkpoint.hf_config import from_hf
from tests.checkpoint.families.published import RELEASES
from tests.checkpoint.gguf.files import ARCHITECTURES, case_of
from tests.model.compressed import COMPRESSED


def model_of(name, **changes):
    return dataclasses.replace(from_hf(case_of(name).config), **changes)


def read_back(model, **changes):
    arch = architecture.arch_of(model)
    keys = {f"{arch}.{name}": field.value for name, field in architecture.write(model).items()}
    keys |= {"general.architecture": arch} | changes
    tensors = {"output.weight"} if not model.tie_embed else set()
    tensors |= {"blk.1.exp_probs_b.bias"} if model.router_bias else set()
    divisors = layout.rope_divisors(model) if model.rope_scaling == "llama3" else None
    return architecture.read(keys, frozenset(tensors), divisors, "m.gguf")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_model_is_read_back(name):
    model = model_of(name)
    found, arch = read_back(model)
    assert arch == ARCHITECTURES[name]
    same = {"init_std": found.init_std, "head_dim": found.head_dim}
    if not model.n_routed_experts:  # the router's settings have no effect
        same |= {"score_func": "sigmoid", "group_score": "top2"}
    assert found == dataclasses.replace(model, **same)


@pytest.mark.parametrize("name", RELEASES)
def test_releases_are_told_apart(name):
    model = from_hf(RELEASES[name])
    refused = {"v2": "group_score=max", "kimi_k2": "beta_fast=1", "v3.2": "index_topk=2048"}
    if name in refused:
        with pytest.raises(ValueError, match=refused[name]):
            architecture.check(model, name)
    else:
        architecture.check(model, name)
        read_back(model)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("v3", {"n_layers": 27}, "n_layers=27: it takes any model of 26 or 27"),
        ("v2_lite", {"n_layers": 25}, "q_lora_rank=0 with n_layers=25: it reads queries"),
        ("v3", {"norm_eps": 1e-4}, "norm_eps=0.0001"),
        ("v3", {"mscale": 0.707}, "mscale=0.707 and mscale_all_dim=1"),
        ("v3", {"mscale_all_dim": 0.0}, "mscale=1 and mscale_all_dim=0"),
        ("v3", {"beta_fast": 16.0}, "beta_fast=16"),
        ("v3", {"rope_scaling": "linear"}, "rope_scaling=linear"),
        ("v3", {"group_score": "max"}, "group_score=max with n_expert_groups=8"),
        ("v3", {"n_shared_experts": 0}, "n_shared_experts=0"),
        ("deepseek_moe", {"norm_topk": True}, "norm_topk=True: it knows False only"),
        ("deepseek_moe", {"score_func": "sigmoid"}, "score_func=sigmoid"),
        ("qwen2", {"head_dim": 24}, "head_dim=24"),
        ("qwen2", {"rope_scaling": "llama3"}, "llama3: it is known for llama only"),
        ("llama", {"attention": "nsa"}, "model.attention=nsa: it has no such attention"),
        ("qwen3", {"qkv_bias": True}, "model.qkv_bias with qk_norm"),
        ("deepseek_moe", {"qk_norm": True}, "model.qk_norm with routed experts"),
    ],
)
def test_other_models_are_refused(name, changes, message):
    architecture.check(model_of(name), "m")  # the case itself is not
    with pytest.raises(ValueError, match=message) as caught:
        architecture.check(model_of(name, **changes), "m")
    assert "Run it here" in str(caught.value)


def test_keeping_all_groups_is_no_rule():
    model = model_of("v3", n_limited_groups=8, group_score="max")
    architecture.check(model, "m")
    assert "expert_group_count" not in architecture.write(model)


def test_mtp_that_llama_cpp_cannot_use_is_named():
    assert architecture.mtp_problem(model_of("v3")) is None
    assert architecture.mtp_problem(model_of("v3_mtp")) is None
    before = model_of("v3_mtp", mtp_after_final_norm=False)
    assert "before the final norm" in (architecture.mtp_problem(before) or "")
    direct = model_of("v3_mtp", q_lora_rank=0)
    assert "query latent" in (architecture.mtp_problem(direct) or "")


def test_factor_on_cos_and_sin_is_read_back():
    model = model_of("llama", rope_scaling="yarn", rope_factor=4.0, mscale=2.5, mscale_all_dim=0.0)
    architecture.check(model, "m")
    found, _ = read_back(model)
    assert found.mscale == pytest.approx(2.5, rel=1e-5) and found.mscale_all_dim == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture='mamba'; only deepseek2"),
        ({"qwen2.block_count": None}, "block_count"),
        ({"qwen2.embedding_length": "wide"}, "embedding_length=wide is not a whole number"),
        ({"qwen2.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon=nan"),
        ({"qwen2.rope.scaling.type": "longrope"}, "rope.scaling.type='longrope'"),
        ({"qwen2.attention.head_count_kv": 3}, "describes no model"),
        ({"qwen2.expert_count": 8}, "experts are known for deepseek only"),
    ],
)
def test_bad_keys_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read_back(model_of("qwen2"), **changes)


@pytest.mark.parametrize(
    ("factor", "low", "high", "length", "dim"),
    [(8.0, 1.0, 4.0, 8192, 128), (32.0, 1.0, 4.0, 8192, 64), (8.0, 2.0, 8.0, 16384, 128)],
)
def test_llama3_scaling_is_recovered(factor, low, high, length, dim):
    scaling = {"rope_scaling": "llama3", "rope_factor": factor, "original_seq_len": length}
    factors = {"low_freq_factor": low, "high_freq_factor": high}
    model = model_of("llama", head_dim=dim, **scaling, **factors)
    divisors = layout.rope_divisors(model)
    found = architecture.llama3_settings(divisors, model.rope_theta)
    assert found is not None and found["original_seq_len"] == length / low
    again = layout.rope_divisors(dataclasses.replace(model, **found))
    np.testing.assert_allclose(again, divisors, rtol=1e-6)


def test_other_divisors_are_not_llama3s():
    assert architecture.llama3_settings(np.linspace(1, 3, 32, dtype=np.float32), 1e4) is None
    assert architecture.llama3_settings(np.ones(32, np.float32), 1e4) is None
    assert architecture.llama3_settings(np.full(32, np.nan, np.float32), 1e4) is None


def test_attention_that_llama_cpp_has_not_is_refused():
    with pytest.raises(ValueError, match=r"model\.attention=compressed: it has no such attention"):
        architecture.check(COMPRESSED, "v4")
