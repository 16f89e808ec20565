"""Sets of ids survive their packing, and are what their words say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model import token_sets


@pytest.mark.parametrize("size", [1, 31, 32, 33, 100])
def test_sets_survive_packing(size):
    members = np.random.default_rng(size).random((3, 2, size)) < 0.3
    words = jax.jit(token_sets.pack)(members)
    assert words.dtype == jnp.uint32 and words.shape == (3, 2, token_sets.n_words(size))
    np.testing.assert_array_equal(token_sets.unpack(words, size), members)


def test_id_is_a_bit_of_its_word():
    members = np.zeros(70, bool)
    members[[0, 31, 33, 69]] = True
    np.testing.assert_array_equal(token_sets.pack(members), [1 | 1 << 31, 1 << 1, 1 << 5])
    everything = jnp.full(3, token_sets.EVERYTHING, jnp.uint32)
    assert token_sets.unpack(everything, 70).all()
