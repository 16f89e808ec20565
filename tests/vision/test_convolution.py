import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.precision.policy import Policy
from dsjax.vision.convolution import Conv, Depthwise
from tests.closeness import F32, assert_close
from tests.vision.test_projector import random_values

POLICY = Policy(jnp.float32)


def noise(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape)


def oracle_conv(conv, x, stride=1, padding=None):
    """Convolution by the definition."""
    weight = np.asarray(conv.weight[...], np.float64)
    size = len(weight)
    x = np.pad(x, ((0, 0), *[padding or (size // 2, size // 2)] * 2, (0, 0)))
    rows = [
        [
            np.einsum("byxc,yxcd->bd", x[:, i : i + size, j : j + size], weight)
            for j in range(0, x.shape[2] - size + 1, stride)
        ]
        for i in range(0, x.shape[1] - size + 1, stride)
    ]
    bias = np.asarray(conv.bias[...]) if hasattr(conv, "bias") else 0.0
    return np.stack([np.stack(row, 1) for row in rows], 1) + bias


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [(1, 1, None), (3, 1, None), (3, 2, (0, 1)), (3, 2, (1, 1)), (2, 2, (0, 0))],
)
def test_convolution_equals_oracle(size, stride, padding):
    conv, x = random_values(Conv(size, 3, 5, POLICY)), noise(2, 6, 6, 3)
    got = conv(jnp.asarray(x, jnp.float32), stride=stride, padding=padding)
    assert got.shape[1:3] == (6 // stride, 6 // stride)
    assert_close(got, oracle_conv(conv, x, stride, padding), F32)


def test_a_convolution_may_have_no_bias():
    conv, x = random_values(Conv(3, 3, 5, POLICY, bias=False)), noise(1, 4, 4, 3)
    assert not hasattr(conv, "bias")
    assert_close(conv(jnp.asarray(x, jnp.float32)), oracle_conv(conv, x), F32)


def oracle_depthwise(conv, x):
    weight = np.asarray(conv.weight[...], np.float64)[:, :, 0]
    size, (_, Y, X, _) = len(weight), x.shape
    x = np.pad(x, ((0, 0), *[(size // 2, size // 2)] * 2, (0, 0)))
    shifted = [x[:, i : i + Y, j : j + X] * weight[i, j] for i in range(size) for j in range(size)]
    return sum(shifted) + np.asarray(conv.bias[...])


def test_depthwise_convolution_equals_oracle():
    conv, x = random_values(Depthwise(7, 5, POLICY)), noise(2, 4, 6, 5)
    assert_close(conv(jnp.asarray(x, jnp.float32)), oracle_depthwise(conv, x), F32)
