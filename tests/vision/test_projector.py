import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.parameters import declarations, initialize
from dsjax.precision.policy import Policy
from dsjax.vision.projector import CodeHead, HybridProjector, Linear, Projector, gelu, unfold
from tests.closeness import F32, assert_close

POLICY = Policy(jnp.float32)


def random_values(module, seed=0):
    """The module with every parameter random, biases too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, jnp.float32), module
    )


def oracle_gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def oracle_linear(layer, x):
    return x @ np.asarray(layer.weight[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def test_gelu_is_exact_unless_asked():
    x = np.linspace(-4, 4, 101)
    assert_close(gelu(jnp.asarray(x, jnp.float32)), oracle_gelu(x), F32)
    tanh = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert_close(gelu(jnp.asarray(x, jnp.float32), exact=False), tanh, F32)


@pytest.mark.parametrize("depth", [1, 3])
def test_projector_equals_oracle(depth):
    projector = random_values(Projector(6, 10, depth, POLICY))
    x = np.random.default_rng(1).normal(size=(2, 3, 6))
    want = x
    for place, layer in enumerate(projector.layers):
        want = oracle_linear(layer, oracle_gelu(want) if place else want)
    assert_close(projector(jnp.asarray(x, jnp.float32)), want, F32)


def test_head_equals_oracle_and_is_float32():
    head = random_values(CodeHead(6, 8, 10, POLICY))
    x = np.random.default_rng(1).normal(size=(3, 6))
    want = oracle_linear(head.vision_head, oracle_gelu(oracle_linear(head.project, x)))
    got = head(jnp.asarray(x, jnp.float32))
    assert got.dtype == jnp.float32
    assert_close(got, want, F32)


def test_biases_begin_as_zeros():
    layer = initialize(Linear(("embed", "ffn"), (4, 6), POLICY), jax.random.key(0))
    assert {each.path: each.shape for each in declarations(layer)} == {
        "weight": (4, 6), "bias": (6,),
    }  # fmt: skip
    assert not np.asarray(layer.bias[...]).any() and np.asarray(layer.weight[...]).any()


def test_the_high_tower_gives_the_first_half():
    projector = random_values(HybridProjector(6, 8, 10, POLICY))
    rng = np.random.default_rng(1)
    low, high = rng.normal(size=(2, 6)), rng.normal(size=(2, 8))
    halves = oracle_linear(projector.high, high), oracle_linear(projector.low, low)
    want = oracle_linear(projector.out, oracle_gelu(np.concatenate(halves, axis=1)))
    got = projector(*(jnp.asarray(each, jnp.float32) for each in (low, high)))
    assert_close(got, want, F32)


@pytest.mark.parametrize(("grid", "size"), [(5, 2), (4, 2), (5, 3)])
def test_squares_of_patches_are_joined_channel_by_channel(grid, size):
    """Zeros stand right of the last column and below the last row."""
    x = np.random.default_rng(1).normal(size=(2, grid * grid, 3)).astype(np.float32)
    side = -(-grid // size)
    want = np.zeros((2, side * side, 3 * size * size), np.float32)
    for row in range(grid):
        for column in range(grid):
            square = row // size * side + column // size
            within = row % size * size + column % size
            want[:, square, within :: size * size] = x[:, row * grid + column]
    np.testing.assert_array_equal(unfold(jnp.asarray(x), size), want)
