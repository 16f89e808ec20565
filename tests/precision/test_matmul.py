"""The three products of a linear layer: values, gradients and types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.precision.matmul import float32_matmul, grouped_linear, linear, vocabulary_logits
from dsjax.precision.policy import Policy
from tests.closeness import BF16, F32, assert_close

SIZES = [7, 0, 33]


def _operands():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(SIZES), 24)).astype(np.float32)
    w = rng.normal(size=(len(SIZES), 24, 16)).astype(np.float32)
    dy = rng.normal(size=(sum(SIZES), 16)).astype(np.float32)
    return x, w, dy


def _products(function, x, w, dy):
    y, backward = jax.vjp(function, jnp.asarray(x), jnp.asarray(w))
    return y, *backward(jnp.asarray(dy, y.dtype))


@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_linear_products_equal_float64(compute, level):
    x, w, dy = _operands()
    y, dx, dw = _products(lambda x, w: linear(x, w, Policy(compute)), x, w[0], dy)
    assert y.dtype == compute
    # A weight gradient rounded to bfloat16 would lose what many micro-batches add up.
    assert dx.dtype == dw.dtype == jnp.float32
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    assert_close(y, x @ w[0], level, "forward")
    assert_close(dx, dy @ w[0].T, level, "input gradient")
    assert_close(dw, x.T @ dy, level, "weight gradient")


@pytest.mark.parametrize(("compute", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_grouped_linear_products_equal_float64(compute, level):
    x, w, dy = _operands()
    sizes = jnp.asarray(SIZES, jnp.int32)
    y, dx, dw = _products(lambda x, w: grouped_linear(x, w, sizes, Policy(compute)), x, w, dy)
    assert y.dtype == compute and dx.dtype == dw.dtype == jnp.float32
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    groups = np.repeat(np.arange(len(SIZES)), SIZES)
    assert_close(y, np.einsum("ad,adf->af", x, w[groups]), level, "forward")
    assert_close(dx, np.einsum("af,adf->ad", dy, w[groups]), level, "input gradient")
    want = np.stack([x[groups == e].T @ dy[groups == e] for e in range(len(SIZES))])
    assert_close(dw, want, level, "weight gradient")


def test_bfloat16_weight_gradient_keeps_what_rounding_would_lose():
    """Many small rows: adding them up in bfloat16 stalls, in float32 it does not."""
    x, dy = np.ones((4096, 8), np.float32), np.full((4096, 8), 1e-3, np.float32)
    policy = Policy(jnp.bfloat16)
    *_, dw = _products(lambda x, w: linear(x, w, policy), x, np.ones((8, 8), np.float32), dy)
    want = 4096 * float(jnp.bfloat16(1e-3))
    np.testing.assert_allclose(dw, want, rtol=1e-5)


def test_logits_and_router_products_are_float32():
    x, w, _ = _operands()
    x16 = jnp.asarray(x, jnp.bfloat16)
    assert vocabulary_logits(x16, jnp.asarray(w[0]), Policy(jnp.bfloat16)).dtype == jnp.float32
    product = float32_matmul(x16, jnp.asarray(w[0]))
    assert_close(
        product, np.asarray(x16, np.float64) @ w[0].astype(np.float64), F32, "router product"
    )
