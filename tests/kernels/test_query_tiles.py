"""Queries in tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.query_tiles import fold_tiles, over_tiles

B, T = 2, 12
X = jnp.arange(B * T * 3, dtype=jnp.float32).reshape(B, T, 3)
PLACES = jnp.arange(T, dtype=jnp.int32)[None]


@pytest.mark.parametrize("most", [1, 4, 5, 12, 99])
@pytest.mark.parametrize("parts", [1, 3])
def test_tiles_come_back_in_order_and_with_gradients(most, parts):
    def twice(of_queries):
        x, places_1T = of_queries
        assert x.shape[1] <= most
        return {"x": x**2, "places": jnp.broadcast_to(places_1T, x.shape[:2])}

    def total(x):
        out = over_tiles(twice, (x, PLACES), most=most, parts=parts)
        return out["x"].sum(), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(X)
    np.testing.assert_array_equal(out["x"], X**2)
    np.testing.assert_array_equal(out["places"], np.broadcast_to(PLACES, (B, T)))
    np.testing.assert_array_equal(gradient, 2 * X)


def test_no_tile_holds_two_parts():
    def first(of_queries):
        return jnp.broadcast_to(of_queries[:, :1], of_queries.shape)

    firsts = np.asarray(over_tiles(first, PLACES, most=2, parts=4))[0].tolist()
    assert firsts == [0, 0, 2, 3, 3, 5, 6, 6, 8, 9, 9, 11]


@pytest.mark.parametrize("most", [1, 5, 12])
def test_filling_adds_nothing_to_a_carry(most):
    def add(total, x):
        return total + x.sum(axis=1), x

    total, out = fold_tiles(add, jnp.zeros((B, 3)), X, most=most)
    np.testing.assert_array_equal(out, X)
    np.testing.assert_array_equal(total, X.sum(axis=1))
