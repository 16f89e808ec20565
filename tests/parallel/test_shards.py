import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsjax.kernels.varying import vary_as
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import partition_spec, parts_here, split_axes
from dsjax.parallel.shards import on_shards


def _weighted_total(weight_X, x_BX, scale):
    """A function of parts: the total over all devices, and each one's rows with the weights."""
    total = jax.lax.psum((x_BX * weight_X[None]).sum(), split_axes("batch"))
    return x_BX * weight_X[None] * scale.astype(jnp.float32), total, jnp.int32(x_BX.shape[0])


def _call_on_shards(weight_X, x_BX, scale):
    def specs(mesh):
        rows = partition_spec(("batch", "width"), x_BX.shape, mesh, "x")
        return (PartitionSpec(), rows, PartitionSpec()), (rows, PartitionSpec(), PartitionSpec())

    return on_shards(_weighted_total, (weight_X, x_BX, scale), specs)


def _loss(weight_X, x_BX, scale):
    rows, total, _ = _call_on_shards(weight_X, x_BX, scale)
    return (rows**2).sum() + total * 3


def test_on_shards_is_a_plain_call_without_a_mesh_and_the_same_on_one():
    weight, x, scale = jnp.arange(3.0), jnp.arange(24.0).reshape(8, 3), jnp.int32(2)
    want = jax.grad(_loss, argnums=(0, 1))(weight, x, scale)
    assert _call_on_shards(weight, x, scale)[2] == 8
    with jax.set_mesh(make_mesh({"data": 2, "expert": 4})):
        assert parts_here("batch") == 8
        assert jax.jit(_call_on_shards)(weight, x, scale)[2] == 1
        got = jax.jit(jax.grad(_loss, argnums=(0, 1)))(weight, x, scale)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("checked", [True, False])
def test_on_shards_is_differentiable_inside_shard_map_over_another_axis(checked):
    """As in a pipeline's stage, which has weights of its own."""
    mesh = make_mesh({"pipe": 2, "data": 2, "expert": 2})
    weight, x, scale = jnp.arange(6.0).reshape(2, 3), jnp.arange(24.0).reshape(8, 3), jnp.int32(2)

    def stage(weight_1X, x_BX, scale):
        own_x_BX = vary_as(x_BX, weight_1X)  # else its gradient would be summed over the stages
        dweight, dx = jax.grad(_loss, argnums=(0, 1))(weight_1X[0], own_x_BX, scale)
        return dweight[None], dx[None]

    with jax.set_mesh(mesh):
        staged = jax.shard_map(
            stage,
            in_specs=(PartitionSpec("pipe"), PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec("pipe"),
            axis_names={"pipe"},
            check_vma=checked,
        )
        got = jax.jit(staged)(weight, x, scale)
    for rank in range(2):
        want = jax.grad(_loss, argnums=(0, 1))(weight[rank], x, scale)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_array_equal(g[rank], w)
