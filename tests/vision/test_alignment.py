"""The projection and the cosine against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.model.parameters import initialize
from dsjax.precision.policy import Policy
from dsjax.vision.alignment import Alignment, cosine


def test_three_layers_with_silu_between_them():
    rng = np.random.default_rng(0)
    declared = Alignment(8, 6, Policy(jnp.float32))
    filled = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
        initialize(declared, jax.random.key(0)),
    )
    states = rng.normal(size=(2, 5, 8))
    want = states
    for place, layer in enumerate(filled.layers):
        want = want / (1 + np.exp(-want)) if place else want
        weight, bias = (np.asarray(x[...], np.float64) for x in (layer.weight, layer.bias))
        want = want @ weight + bias
    got = filled(jnp.asarray(states, jnp.float32))
    assert got.shape == (2, 5, 6)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_cosine_is_of_directions_and_has_a_gradient_at_zero():
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 3, 7)), 100 * rng.normal(size=(2, 3, 7))
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    arrays = jnp.asarray(one, jnp.float32), jnp.asarray(other, jnp.float32)
    np.testing.assert_allclose(cosine(*arrays), (one * other).sum(-1) / lengths, rtol=1e-5)
    np.testing.assert_allclose(cosine(arrays[0], -3 * arrays[0]), -1.0, rtol=1e-6)
    gradient = jax.grad(lambda x: cosine(x, arrays[1]).sum())(jnp.zeros_like(arrays[0]))
    assert np.isfinite(gradient).all()
