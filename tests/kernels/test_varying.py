import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsjax.kernels.varying import varies_over, vary_as
from dsjax.parallel.mesh import make_mesh


def test_nothing_varies_outside_shard_map():
    x = jnp.ones(3)
    assert varies_over(x) == frozenset() and vary_as(x, x) is x


def test_zeros_vary_as_the_others_and_their_gradient_is_summed():
    def local(w, x, y):
        marked = vary_as(w, x, y)
        assert varies_over(w) == frozenset() and varies_over(marked) == {"data", "fsdp"}
        return (marked * x * y).sum()[None]

    sharded = jax.shard_map(
        local,
        mesh=make_mesh({"data": 2, "fsdp": 4}),
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("fsdp")),
        out_specs=PartitionSpec(("data", "fsdp")),
    )
    total = jax.grad(lambda w, x, y: sharded(w, x, y).sum())(
        jnp.float32(2), jnp.arange(2.0), jnp.arange(4.0)
    )
    assert total == 1 * 6
