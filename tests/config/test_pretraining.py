"""The rules that span the groups of a pre-training experiment."""

import pytest

from dsjax.config import Config, DataConfig, ModelConfig, TrainConfig


def model(**changes):
    shape = {
        "vocab_size": 64,
        "dim": 16,
        "n_layers": 2,
        "n_dense_layers": 2,
        "n_heads": 2,
        "inter_dim": 32,
        "attention": "gqa",
    }
    return ModelConfig(**(shape | changes))


MOE = {"n_dense_layers": 1, "n_routed_experts": 8, "n_activated_experts": 2, "moe_inter_dim": 8}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"data": DataConfig(sequence_length=8192)},
            r"data\.sequence_length=8192 exceeds model\.max_seq_len=4096; lower the one or raise",
        ),
        (
            {"model": model(n_mtp=1), "data": DataConfig(sequence_length=2)},
            r"data\.sequence_length=2 leaves nothing to predict for model\.n_mtp=1",
        ),
        (
            {"model": model(**MOE), "train": TrainConfig(n_balance_devices=3)},
            r"model\.n_routed_experts=8 does not divide over train\.n_balance_devices=3",
        ),
    ],
)
def test_config_refuses_groups_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=message):
        Config(**({"name": "example", "model": model()} | groups))
