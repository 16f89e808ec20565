"""The rules of the mesh group."""

import dataclasses

import pytest

from dsjax.config import MeshConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fsdp": 0}, r"mesh\.fsdp=0 must be greater than 0, or -1 for the rest"),
        ({"fsdp": -1}, r"only one mesh axis may be -1, not data and fsdp"),
    ],
)
def test_mesh_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        MeshConfig(**changes)


def test_groups_are_frozen():
    for group in [MeshConfig()]:
        field = dataclasses.fields(group)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(group, field, 1)
