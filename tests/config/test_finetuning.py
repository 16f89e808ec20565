"""Rules of fine-tuning, alone and against the checkpoint's shape."""

import dataclasses

import pytest

from dsjax.config.finetuning import EsftConfig, FineTuning, SftConfig
from tests.config.test_pretraining import MOE, model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sequence_length": 1}, r"sft\.sequence_length=1 must be at least 2"),
        ({"epochs": -1.0}, r"sft\.epochs=-1\.0 must not be negative"),
        ({"heldout_fraction": 1.0}, r"sft\.heldout_fraction=1\.0 must lie in \[0, 1\)"),
    ],
)
def test_rows_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SftConfig(**values)


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_esft_threshold_is_a_share(threshold):
    with pytest.raises(ValueError, match=rf"esft\.threshold={threshold} must lie in \(0, 1\]"):
        EsftConfig(threshold=threshold)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"sft": SftConfig(sequence_length=8192)},
            r"sft\.sequence_length=8192 exceeds the checkpoint's max_seq_len=4096; lower it",
        ),
        ({"sft": SftConfig(mtp="on")}, r"sft\.mtp=on, and the checkpoint has no MTP modules"),
        (
            {"esft": EsftConfig(score="gate")},
            r"esft\.score=gate chooses experts, and the checkpoint",
        ),
        (
            {"sft": SftConfig(mtp="on", sequence_length=2), "model": model(n_mtp=1)},
            r"sft\.sequence_length=2 leaves nothing to predict for 1 MTP modules",
        ),
    ],
)
def test_what_the_checkpoint_cannot_do_is_refused(groups, message):
    shape = groups.pop("model", model())
    bare = FineTuning(name="example", **groups)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(bare, model=shape)


def test_checkpoint_with_experts_can_specialize_them():
    config = FineTuning(name="example", model=model(**MOE), esft=EsftConfig(score="token"))
    assert config.shape.n_moe_layers == 1


def test_routers_are_left_alone_unless_asked():
    train = FineTuning(name="example").train
    assert train.bias_update_speed == train.sequence_balance == 0
