"""int4 numbers of two rows in a byte."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsjax.precision.fp8 import BlockScaled
from dsjax.precision.nibbles import Nibbles, packed


def test_all_pairs_of_numbers_come_back():
    pairs = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8))).reshape(2, 256)
    values = np.stack([pairs, pairs[:, ::-1]]).reshape(1, 4, 256).astype(ml_dtypes.int4)
    codes = packed(values)
    assert (codes.dtype, codes.shape) == (np.int8, (1, 2, 256))
    w = Nibbles(jnp.asarray(codes))
    assert (w.shape, w.ndim, w.dtype) == (values.shape, 3, values.dtype)
    np.testing.assert_array_equal(w.astype(jnp.float32), values.astype(np.float32))
    even, odd = w[0].even_odd
    np.testing.assert_array_equal(even, values[0, 0::2].astype(np.int8))
    np.testing.assert_array_equal(odd, values[0, 1::2].astype(np.int8))


def test_scaled_blocks_of_nibbles_are_those_of_int4():
    rng = np.random.default_rng(0)
    values = rng.integers(-8, 8, (2, 16, 5)).astype(ml_dtypes.int4)
    scales = jnp.asarray(rng.normal(size=(2, 2, 5)), jnp.bfloat16)
    plain = BlockScaled(jnp.asarray(values), scales, (8, 1))
    codes: jax.Array = jnp.asarray(packed(values))
    own = BlockScaled(Nibbles(codes), scales, (8, 1))  # pyright: ignore[reportArgumentType]
    assert own.shape == plain.shape
    for a, b in ((own, plain), (own[1], plain[1])):
        np.testing.assert_array_equal(a.dequantize(), b.dequantize())
