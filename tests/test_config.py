"""Every rule of a config, and the sizes that follow from one."""

import dataclasses

import pytest

from dsjax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    TrainConfig,
)

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


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (dense, {"vocab_size": 0}, r"model\.vocab_size=0 must be greater than 0"),
        (dense, {"init_std": 0.0}, r"model\.init_std=0\.0 must be greater than 0"),
        (dense, {"n_mtp": -1}, r"model\.n_mtp=-1 must not be negative"),
        (dense, {"attention": "mla"}, r"model\.kv_lora_rank=0 must be greater than 0"),
        (dense, {"n_heads": 3}, r"model\.dim=16 does not divide by model\.n_heads=3; set model\.h"),
        (dense, {"n_heads": 4, "n_kv_heads": 3}, r"n_heads=4 does not divide by model\.n_kv_heads"),
        (dense, {"head_dim": 3}, r"rope rotates pairs, so its head dim must be even, not 3"),
        (
            dense,
            {"beta_slow": 40.0},
            r"model\.beta_slow=40\.0 must be below model\.beta_fast=32\.0",
        ),
        (
            dense,
            {"rope_scaling": "llama3", "low_freq_factor": 4.0},
            r"model\.low_freq_factor=4\.0 must be below model\.high_freq_factor=4\.0",
        ),
        (dense, {"n_dense_layers": 3}, r"model\.n_dense_layers=3 exceeds model\.n_layers=2"),
        (dense, {"n_dense_layers": 1}, r"so all layers are dense: set model\.n_dense_layers=2"),
        (moe, {"moe_inter_dim": 0}, r"model\.moe_inter_dim=0 must be greater than 0"),
        (moe, {"n_expert_groups": 3}, r"n_routed_experts=8 does not divide into .*groups=3 equal"),
        (moe, {"n_limited_groups": 5}, r"n_limited_groups=5 exceeds model\.n_expert_groups=4"),
        (
            moe,
            {"n_activated_experts": 5},
            r"n_activated_experts=5 exceeds the 4 experts of 2 groups of 2; raise model\.n_limited",
        ),
        (
            moe,
            {"n_expert_groups": 8},
            r"model\.group_score=top2 needs at least two experts a group",
        ),
    ],
)
def test_model_refuses(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DataConfig, {"sequence_length": 1}, r"data\.sequence_length=1 must be at least 2"),
        (DataConfig, {"fim_rate": 1.5}, r"data\.fim_rate=1\.5 must lie between 0 and 1"),
        (DataConfig, {"seed": -1}, r"data\.seed=-1 must not be negative"),
        (DataConfig, {"heldout_fraction": 0.0}, r"heldout_fraction=0\.0 must lie strictly between"),
        (TrainConfig, {"steps": 0}, r"train\.steps=0 must be greater than 0"),
        (TrainConfig, {"eval_every": -1}, r"train\.eval_every=-1 must not be negative"),
        (TrainConfig, {"mtp_switch": 2.0}, r"train\.mtp_switch=2\.0 must lie between 0 and 1"),
        (
            TrainConfig,
            {"batch_size": 8, "micro_batch_size": 3},
            r"train\.batch_size=8 does not divide into micro-batches of train\.micro_batch_size=3",
        ),
        (
            TrainConfig,
            {"batch_size": 8, "micro_batch_size": 4, "batch_size_start": 2},
            r"train\.batch_size_start=2 does not divide into micro-batches",
        ),
        (
            TrainConfig,
            {"batch_size": 8, "micro_batch_size": 4, "batch_size_start": 12},
            r"train\.batch_size_start=12 exceeds train\.batch_size=8",
        ),
        (
            TrainConfig,
            {"batch_size": 8, "batch_size_start": 4},
            r"a batch ramp grows by whole micro-batches: set train\.micro_batch_size",
        ),
        (OptimConfig, {"learning_rate": 0.0}, r"optim\.learning_rate=0\.0 must be greater than 0"),
        (OptimConfig, {"beta2": 1.0}, r"optim\.beta2=1\.0 must lie in \[0, 1\)"),
        (
            OptimConfig,
            {"decay_points": (0.9, 0.5, 1.0)},
            r"optim\.decay_points=\(0\.9, 0\.5, 1\.0\) must ascend between 0 and 1",
        ),
        (
            OptimConfig,
            {"decay_ratios": (0.1, -0.1)},
            r"optim\.decay_ratios=.* must not be negative",
        ),
        (
            OptimConfig,
            {"decay_points": (0.5,)},
            r"schedule=v3 takes 3 optim\.decay_points and 2 optim\.decay_ratios, not 1 and 2",
        ),
        (
            OptimConfig,
            {"schedule": "multistep", "decay_points": (0.5,)},
            r"schedule=multistep takes 1 optim\.decay_points and 1 optim\.decay_ratios, not 1 and",
        ),
        (MeshConfig, {"fsdp": 0}, r"mesh\.fsdp=0 must be greater than 0, or -1 for what is left"),
        (MeshConfig, {"fsdp": -1}, r"only one mesh axis may be -1, not data and fsdp"),
    ],
)
def test_group_refuses(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"data": DataConfig(sequence_length=8192)},
            r"data\.sequence_length=8192 exceeds model\.max_seq_len=4096; lower the one or raise",
        ),
        (
            {"model": dense(n_mtp=1), "data": DataConfig(sequence_length=2)},
            r"data\.sequence_length=2 leaves nothing to predict for model\.n_mtp=1",
        ),
        (
            {"model": moe(), "train": TrainConfig(n_balance_devices=3)},
            r"model\.n_routed_experts=8 does not divide over train\.n_balance_devices=3",
        ),
    ],
)
def test_config_refuses_groups_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=message):
        Config(**({"name": "example", "model": dense()} | groups))


def test_constant_schedule_needs_no_decay():
    assert OptimConfig(schedule="constant", decay_points=(), decay_ratios=()).decay_points == ()


def test_sizes_of_latent_attention():
    model = dense(**LATENT)
    assert (model.qk_head_dim, model.value_head_dim, model.rope_dim) == (6, 4, 2)
    assert model.cache_values_per_token == 8 + 2


def test_sizes_of_grouped_attention():
    model = dense(n_heads=4, n_kv_heads=2)
    assert (model.qk_head_dim, model.value_head_dim, model.rope_dim) == (4, 4, 4)
    assert (model.kv_heads, model.cache_values_per_token) == (2, 2 * 2 * 4)
    assert dense().kv_heads == 2
    assert dense(head_dim=32).qk_head_dim == 32


def test_moe_layers_follow_the_dense_ones():
    assert (dense().n_moe_layers, moe().n_moe_layers) == (0, 1)


def test_configs_are_frozen():
    for group in (dense(), DataConfig(), TrainConfig(), OptimConfig(), PrecisionConfig()):
        field = dataclasses.fields(group)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, field, 1)
