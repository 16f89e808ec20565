"""The rules of the mesh group."""

import dataclasses

import pytest

from dsjax.config import MeshConfig
from dsjax.config.mesh import RolloutMeshConfig


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


def test_rollout_mesh_is_that_of_training_unless_it_says_otherwise():
    assert RolloutMeshConfig().sizes is None
    sizes = RolloutMeshConfig(expert=-1, tensor=2).sizes
    assert sizes == {"data": 1, "fsdp": 1, "expert": -1, "tensor": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": -2}, r"rollout_mesh\.tensor=-2 must be 0 or more, or -1 for the rest"),
        ({"data": -1, "fsdp": -1}, r"only one axis of rollout_mesh may be -1, not data and fsdp"),
    ],
)
def test_rollout_mesh_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        RolloutMeshConfig(**changes)
