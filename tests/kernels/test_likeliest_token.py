"""The greatest logits of few rows in two kernels, interpreted, against all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.likeliest_token import fits, likeliest_token
from dsjax.kernels.target import HOPPER, Target
from dsjax.model.layers import rms_norm
from tests.golden.ours import QUICK
from tests.kernels.hopper import INTERPRETED

D, EPS = 64, 0.5  # not small beside the mean square


@functools.partial(jax.jit, static_argnames="multiprocessors", compiler_options=QUICK)
def interpreted(x, norm, head, multiprocessors=132):
    return likeliest_token(
        x, norm, head, eps=EPS, multiprocessors=multiprocessors, interpret=INTERPRETED
    )


def arrays(rows, vocabulary):
    rng = np.random.default_rng(rows)
    shapes = (rows, D), (D,), (D, vocabulary)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


# Blocks of 16 columns and of 64; as many as a power of two, and not; more rows than a matrix unit.
@pytest.mark.parametrize(
    ("rows", "vocabulary", "multiprocessors"), [(1, 256, 132), (17, 320, 132), (3, 320, 5)]
)
def test_ids_are_those_of_the_greatest_logits(rows, vocabulary, multiprocessors):
    x, norm, head = arrays(rows, vocabulary)
    got = interpreted(x, norm, head, multiprocessors)
    logits = np.asarray(rms_norm(x, norm, EPS), np.float64) @ np.asarray(head, np.float64)
    np.testing.assert_array_equal(got, logits.argmax(axis=1))
    assert got.dtype == jnp.int32


def test_norms_weight_decides_too():
    """Of two dimensions the smaller wins by its weight."""
    x = jnp.zeros((1, D)).at[0, :2].set(jnp.asarray([2.0, 1.0]))
    head = jnp.zeros((D, 32)).at[0, 20].set(1.0).at[1, 9].set(1.0)
    assert interpreted(x, jnp.ones(D), head).tolist() == [20]
    assert interpreted(x, jnp.ones(D).at[1].set(3.0), head).tolist() == [9]


@pytest.mark.parametrize("equal", [(5, 3), (40, 3), (40, 35)])
def test_of_equal_logits_the_lowest_id_is_taken(equal):
    """In one block of columns and in several."""
    x, head = jnp.ones((2, D)), jnp.full((D, 64), -1.0).at[:, jnp.asarray(equal)].set(1.0)
    assert interpreted(x, jnp.ones(D), head).tolist() == [min(equal)] * 2


def test_what_is_not_a_number_gives_an_id():
    x, norm, head = arrays(2, 64)
    assert interpreted(x.at[0].set(jnp.nan), norm, head)[0] == 0
    assert interpreted(x, norm, jnp.full_like(head, -jnp.inf) * 0).tolist() == [0, 0]
    assert (
        interpreted(jnp.ones((2, D)), jnp.ones(D), jnp.full((D, 64), -jnp.inf)).tolist() == [0] * 2
    )


def test_operands_that_fit():
    head = jnp.zeros((D, 48), jnp.bfloat16)
    assert fits(64, head, jnp.bfloat16, HOPPER)
    assert not fits(65, head, jnp.bfloat16, HOPPER)
    assert not fits(1, head[:, :40], jnp.bfloat16, HOPPER)  # no whole blocks of columns
    assert not fits(1, head, jnp.bfloat16, Target("gpu", (8, 0)))
    assert not fits(1, None, jnp.bfloat16, HOPPER)  # tied
    assert not fits(1, {"values": head}, jnp.bfloat16, HOPPER)  # small weights
