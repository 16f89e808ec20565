"""Rows out of a stack of layers, against NumPy; and that nothing else as large is made."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.kernels import stacked_rows


def test_rows_of_each_head_are_read_and_the_stack_stays_as_it_lies():
    L, B, P, S, X = 3, 2, 2, 16, 5
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(L, B, P, S, X)).astype(np.float32)
    places = rng.integers(0, S, (B, P, 4, 3), dtype=np.int32)
    arguments = jnp.asarray(stack), jnp.int32(1), jnp.asarray(places)
    want = np.stack([[stack[1, b, p][places[b, p]] for p in range(P)] for b in range(B)])
    np.testing.assert_array_equal(stacked_rows.take(*arguments), want)
    # A copy in another order would be one of all layers and rows.
    steps = jax.make_jaxpr(stacked_rows.take)(*arguments).eqns
    assert all(made.aval.size < stack.size for step in steps for made in step.outvars)
