"""The sigmoid loss against the paper's equation, one pair after the other in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.vision.sigmoid_loss import FIRST_BIAS, FIRST_LOG_SCALE, sigmoid_loss


def vectors(seed, n=5, dim=3):
    x = np.random.default_rng(seed).normal(size=(n, dim))
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


def oracle(pictures, texts, log_scale, bias):
    total = 0.0
    for i, picture in enumerate(np.asarray(pictures, np.float64)):
        for j, text in enumerate(np.asarray(texts, np.float64)):
            logit = math.exp(log_scale) * (picture @ text) + bias
            total -= math.log(1 / (1 + math.exp(-logit if i == j else logit)))
    return total / len(pictures)


@pytest.mark.parametrize(("log_scale", "bias"), [(0.5, 0.3), (math.log(10), -10.0)])
def test_loss_is_the_papers_sum_over_all_pairs(log_scale, bias):
    pictures, texts = vectors(0), vectors(1)
    found = jax.jit(sigmoid_loss)(pictures, texts, jnp.float32(log_scale), jnp.float32(bias))
    assert float(found.loss) == pytest.approx(oracle(pictures, texts, log_scale, bias), rel=1e-5)
    want = math.exp(log_scale) * pictures @ texts.T + bias
    np.testing.assert_allclose(found.logits_BB, want, rtol=1e-5, atol=1e-5)


def test_pairs_that_agree_cost_less_than_pairs_that_are_exchanged():
    same, exchanged = vectors(0), vectors(0)[::-1]
    first = jnp.float32(FIRST_LOG_SCALE), jnp.float32(FIRST_BIAS)
    agreeing, others = (sigmoid_loss(same, texts, *first).loss for texts in (same, exchanged))
    assert float(agreeing) < float(others)


def test_first_loss_is_that_of_the_right_pairs_which_nothing_believes_yet():
    """At right angles the wrong pairs cost nothing, as the bias is meant to make them."""
    pictures, texts = jnp.eye(6)[:3], jnp.eye(6)[3:]
    first = jnp.float32(FIRST_LOG_SCALE), jnp.float32(FIRST_BIAS)
    assert float(sigmoid_loss(pictures, texts, *first).loss) == pytest.approx(10, abs=1e-3)
