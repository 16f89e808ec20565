import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsjax.kernels.varying import agreed, varies_over, vary_as
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


def test_what_is_equal_on_some_axes_is_said_to_be():
    """All take the first one's value, so that they stay equal even where rounding would differ."""

    def local(x):
        assert varies_over(x) == {"data", "fsdp", "context"}
        same = agreed(x, {"fsdp", "context"})
        assert varies_over(same) == {"data"} and agreed(same, ()) is same
        return same

    x = jnp.arange(8.0)
    sharded = jax.shard_map(
        local,
        mesh=make_mesh({"data": 2, "fsdp": 2, "context": 2}),
        in_specs=PartitionSpec(("data", "fsdp", "context")),
        out_specs=PartitionSpec("data"),
    )
    assert sharded(x).tolist() == [0.0, 4.0]
