"""Floating numbers as the integers of their bits: each number of a type, and parts of arrays."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsjax.model.layers import Embedding
from dsjax.precision.float_bits import FloatBits, integers_of
from dsjax.precision.policy import Policy

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


def every(dtype: np.dtype) -> np.ndarray:
    """All numbers of a type, NaN and infinities among them."""
    integers = integers_of(dtype)
    assert integers
    return np.arange(2 ** (8 * dtype.itemsize)).astype(integers).view(dtype)


def held(numbers: np.ndarray) -> FloatBits:
    integers = integers_of(numbers.dtype)
    assert integers
    return FloatBits(jnp.asarray(numbers.view(integers)), numbers.dtype)


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
@pytest.mark.parametrize("wide", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_each_number_is_widened_to_itself(dtype, wide):
    numbers = every(dtype)
    got = np.asarray(jax.jit(lambda w: w.astype(wide))(held(numbers)))
    want = numbers.astype(np.float32)
    tiny = (want != 0) & (np.abs(want) < np.finfo(np.float32).tiny)  # a CPU takes them for zeros
    assert got.dtype == wide
    np.testing.assert_array_equal(got.astype(np.float32)[~tiny], want[~tiny])
    finite = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got)[finite], np.signbit(want)[finite])


def test_only_narrow_floats_have_integers():
    for dtype in (np.float32, np.int8, ml_dtypes.int4):
        assert integers_of(dtype) is None


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
def test_parts_and_transposes_are_those_of_the_numbers(dtype):
    numbers = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(dtype)
    w = held(numbers)
    for own, want in ((w[1], numbers[1]), (w[1].T, numbers[1].T), (w[1:, 2], numbers[1:, 2])):
        assert (own.shape, own.ndim, own.dtype) == (want.shape, want.ndim, dtype)
        np.testing.assert_array_equal(own.astype(jnp.float32), want.astype(np.float32))
    np.testing.assert_array_equal(jnp.asarray(w), numbers)


def test_an_embedding_in_bits_gives_its_rows_and_nan_outside():
    table = np.random.default_rng(0).normal(size=(7, 4)).astype(BF16)
    embedding = Embedding(7, 4, 0.02, Policy(jnp.bfloat16))
    embedding.weight = embedding.weight.copy(held(table))
    ids = jnp.array([[0, 6, 7]])
    got = np.asarray(embedding(ids)).astype(np.float32)
    np.testing.assert_array_equal(got[0, :2], table[[0, 6]].astype(np.float32))
    assert np.isnan(got[0, 2]).all()
