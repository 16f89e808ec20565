"""The rules of the data group."""

import dataclasses

import pytest

from dsjax.config import DataConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 1}, r"data\.sequence_length=1 must be at least 2"),
        ({"fim_rate": 1.5}, r"data\.fim_rate=1\.5 must lie between 0 and 1"),
        ({"seed": -1}, r"data\.seed=-1 must not be negative"),
        ({"heldout_fraction": 0.0}, r"heldout_fraction=0\.0 must lie strictly between"),
        ({"files": "a,b", "weights": (1.0, 0.0)}, r"data\.weights=1\.0,0\.0 must all be above 0"),
        ({"files": "a", "weights": (float("inf"),)}, r"data\.weights=inf must all be above 0"),
        ({"weights": (1.0, 2.0)}, r"data\.weights are of the globs of data\.files, which is empty"),
    ],
)
def test_data_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)


def test_groups_are_frozen():
    for group in [DataConfig()]:
        field = dataclasses.fields(group)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, field, 1)
