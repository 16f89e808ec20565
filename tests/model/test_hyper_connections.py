"""Residual streams: the doubly stochastic matrix, and a layer's connection against loops."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.model.hyper_connections import (
    HyperConnection,
    HyperHead,
    Mix,
    collapse,
    expand,
    sinkhorn,
)
from tests.closeness import F32, assert_close
from tests.model.compressed import COMPRESSED, drawn

X, D = COMPRESSED.hc_mult, COMPRESSED.dim
STREAMS = np.random.default_rng(1).normal(size=(2, 3, X, D)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numbers(streams_XD, fn):
    flat = streams_XD.reshape(-1).astype(np.float64)
    return flat / np.sqrt(np.mean(flat**2) + COMPRESSED.norm_eps) @ np.asarray(fn, np.float64)


@pytest.mark.parametrize("size", [2, 4])
def test_rows_and_columns_sum_to_one_in_the_limit(size):
    positive = np.random.default_rng(0).uniform(0.1, 1.0, (1, 1, size, size)).astype(np.float32)
    made = sinkhorn(jnp.asarray(positive), 60, 1e-9)
    np.testing.assert_allclose(made.sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(made.sum(axis=-2), 1.0, rtol=1e-5)


def test_columns_are_divided_first_and_last():
    positive = np.random.default_rng(0).uniform(0.1, 1.0, (3, 3))
    want = positive / (positive.sum(axis=0) + 0.1)
    want = want / (want.sum(axis=1, keepdims=True) + 0.1)
    want = want / (want.sum(axis=0) + 0.1)
    got = sinkhorn(jnp.asarray(positive[None, None], jnp.float32), 2, 0.1)
    assert_close(got[0, 0], want, F32)


def test_one_stream_of_weight_one_is_the_plain_residual():
    x, y = (jnp.asarray(STREAMS[:, :, :1]), jnp.asarray(STREAMS[:, :, 1]))
    ones = jnp.ones((2, 3, 1))
    np.testing.assert_array_equal(collapse(x, ones), x[:, :, 0])
    added = expand(x, y, Mix(ones, ones, ones[..., None]))
    np.testing.assert_array_equal(added[:, :, 0], x[:, :, 0] + y)


def test_connection_equals_the_equations_token_by_token():
    config = dataclasses.replace(COMPRESSED, hc_eps=0.01)
    connection = drawn(HyperConnection(config))
    x_BTD, mix = connection(jnp.asarray(STREAMS))
    added = expand(jnp.asarray(STREAMS), x_BTD + 1, mix)
    base, scale = np.asarray(connection.base[...]), np.asarray(connection.scale[...])
    for place in np.ndindex(2, 3):
        streams = STREAMS[place].astype(np.float64)
        found = numbers(streams, connection.fn[...])
        into = sigmoid(found[:X] * scale[0] + base[:X]) + 0.01
        out = 2 * sigmoid(found[X : 2 * X] * scale[1] + base[X : 2 * X])
        logits = (found[2 * X :] * scale[2] + base[2 * X :]).reshape(X, X)
        across = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) + 0.01
        across /= across.sum(axis=0) + 0.01
        for _ in range(config.hc_sinkhorn_iters - 1):
            across /= across.sum(axis=1, keepdims=True) + 0.01
            across /= across.sum(axis=0) + 0.01
        x = sum(into[i] * streams[i] for i in range(X))
        assert_close(x_BTD[place], x, F32)
        for to in range(X):
            mixed = sum(across[i, to] * streams[i] for i in range(X))
            assert_close(added[place][to], mixed + out[to] * (x + 1), F32, "stream")


def test_head_sums_the_streams_by_weight():
    head = drawn(HyperHead(COMPRESSED), 3)
    got = head(jnp.asarray(STREAMS))
    for place in np.ndindex(2, 3):
        found = numbers(STREAMS[place], head.fn[...])
        into = sigmoid(found * np.asarray(head.scale[...]) + np.asarray(head.base[...])) + 1e-6
        assert_close(got[place], into @ STREAMS[place], F32)


def test_weights_of_connections_are_float32():
    for module in (HyperConnection(COMPRESSED), HyperHead(COMPRESSED)):
        kinds = {type(v).__name__ for v in (module.fn, module.base, module.scale)}
        assert kinds == {"Float32"}
