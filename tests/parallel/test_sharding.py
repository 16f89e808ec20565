import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dsjax.parallel.mesh import AXES, make_mesh
from dsjax.parallel.sharding import AXIS_TABLE, constrain, partition_spec, parts

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def test_partition_spec_looks_the_axes_up():
    spec = partition_spec(("layers", "embed", "heads"), (3, 8, 6), make_mesh(MESH), "wq")
    assert spec == PartitionSpec(None, ("fsdp",), ("tensor",))


def test_axes_of_size_one_leave_no_trace():
    spec = partition_spec(("embed", "heads"), (7, 5), make_mesh({"data": 8}), "wq")
    assert spec == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (
            ("embed", "heads"),
            (8, 5),
            r"attn\.wq: dimension heads=5 of shape \(8, 5\) does not divide over mesh\.tensor=2",
        ),
        (("embed", "head"), (8, 4), r"attn\.wq: unknown logical axis 'head'; known: layers, embed"),
        (("embed", "embed"), (8, 4), r"attn\.wq: mesh axis .*fsdp.* is used twice"),
        (("embed",), (8, 4), r"attn\.wq: 1 logical axes"),
    ],
)
def test_partition_spec_rejects(axes, shape, message):
    with pytest.raises(ValueError, match=message):
        partition_spec(axes, shape, make_mesh(MESH), "attn.wq")


def test_parts_multiply_the_axes_of_a_dimension():
    mesh = make_mesh({"data": 2, "fsdp": 2, "expert": 2})
    found = [parts(axis, mesh) for axis in ("batch", "embed", "experts", "heads", "width")]
    assert found == [8, 4, 2, 1, 1]


def test_table_names_real_mesh_axes():
    assert {axis for axes in AXIS_TABLE.values() for axis in axes} <= set(AXES)


def test_constrain_splits_under_a_mesh_and_is_nothing_without():
    x = jnp.zeros((8, 4, 2))
    assert constrain(x, "batch", "length", "width") is x
    with jax.set_mesh(make_mesh(MESH)):
        placed = jax.jit(lambda x: constrain(x, "batch", "length", "width"))(x)
    assert placed.sharding.shard_shape(x.shape) == (2, 4, 2)
