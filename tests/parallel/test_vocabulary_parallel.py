"""A lookup by hand in a pipeline's `shard_map` is the plain one, its gradient too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.vocabulary_parallel import lookup

TABLE = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)


def _in_pipeline(tokens, sizes):
    """Rows, and the table's gradient for a weighted sum of them, in each of two stages."""

    def stage(table, tokens):
        def total(table):
            rows = lookup(table, tokens)
            return (rows * WEIGHT).sum(), rows

        gradient, rows = jax.grad(total, has_aux=True)(table)
        return rows[None], gradient[None]

    with jax.set_mesh(make_mesh({"pipe": 2, **sizes})):
        run = jax.shard_map(
            stage, in_specs=(P(), P()), out_specs=P("pipe"), axis_names={"pipe"}, check_vma=False
        )
        return jax.device_get(jax.jit(run)(TABLE, tokens))


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}, {"context": 2, "expert": 2}]
)
def test_rows_and_gradient_are_those_of_a_plain_lookup(sizes):
    tokens = np.random.default_rng(2).integers(0, 12, (4, 6)).astype(np.int32)
    rows, gradients = _in_pipeline(tokens, sizes)
    want = np.zeros_like(TABLE)
    np.add.at(want, tokens, WEIGHT)
    for stage in range(2):
        np.testing.assert_array_equal(rows[stage], TABLE[tokens])
        np.testing.assert_allclose(gradients[stage], want, rtol=1e-6, atol=1e-6)


def test_an_id_outside_the_vocabulary_gives_nan():
    tokens = np.zeros((4, 6), np.int32)
    tokens[0, 0] = 12
    rows, _ = _in_pipeline(tokens, {"fsdp": 2, "tensor": 2})
    assert np.isnan(rows[:, 0, 0]).all()
    assert np.isfinite(rows[:, 0, 1:]).all() and np.isfinite(rows[:, 1:]).all()
    assert np.isnan(lookup(jnp.asarray(TABLE), jnp.asarray(tokens))[0, 0]).all()
