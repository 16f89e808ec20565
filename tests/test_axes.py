"""One spelling of the mesh axes serves config, commands, meshes and the sharding table."""

import dataclasses

import jax

from dsjax.axes import AXES, CHECKPOINT_AXES
from dsjax.config import MeshConfig
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import AXIS_TABLE


def test_every_axis_is_a_key_of_the_config_and_an_axis_of_the_mesh():
    fields = {field.name for field in dataclasses.fields(MeshConfig)}
    assert fields == {*AXES, "schedule", "microbatches"}
    assert tuple(MeshConfig().sizes) == AXES == make_mesh({"data": -1}).axis_names
    assert make_mesh({"tensor": 2, "data": -1}).shape["data"] == jax.device_count() // 2


def test_tables_use_known_axes():
    assert {axis for axes in AXIS_TABLE.values() for axis in axes} <= set(AXES)
    assert CHECKPOINT_AXES == ("data", "fsdp", "expert", "context", "tensor")
