"""The rules of the train, optim and precision groups."""

import dataclasses

import pytest

from dsjax.config import OptimConfig, PrecisionConfig, TrainConfig


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
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
    ],
)
def test_group_refuses(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_constant_schedule_needs_no_decay():
    assert OptimConfig(schedule="constant", decay_points=(), decay_ratios=()).decay_points == ()


def test_groups_are_frozen():
    for group in (TrainConfig(), OptimConfig(), PrecisionConfig()):
        field = dataclasses.fields(group)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, field, 1)
