"""The U-ViTs against float64 arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.vision import FlowConfig
from dsjax.model.parameters import initialize
from dsjax.precision.policy import Policy
from dsjax.vision.uvit import (
    ConvNext,
    ResponseNorm,
    TimeEmbedding,
    UvitDecoder,
    UvitEncoder,
    frequencies,
    unfold,
)
from tests.closeness import F32, LOGITS, assert_close, relative_l2
from tests.vision.test_autoencoder import silu
from tests.vision.test_convolution import noise, oracle_conv, oracle_depthwise
from tests.vision.test_projector import oracle_gelu, oracle_linear, random_values

POLICY, DIM, EPS = Policy(jnp.float32), 12, 1e-6
CONFIG = FlowConfig(latent_channels=3, channels=8, encoder_blocks=2, decoder_blocks=1)
TIMES = np.array([0.0, 0.3, 29 / 30])


def float32(array):
    return jnp.asarray(array, jnp.float32)


def weight(variable):
    return np.asarray(variable[...], np.float64)


def oracle_waves(times, width):
    rates = 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    angles = 1000 * times[:, None] * rates
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def oracle_rms(norm, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight(norm.weight)


def oracle_response(norm, x):
    size = np.sqrt((x**2).sum(axis=(1, 2), keepdims=True))
    share = size / (size.mean(-1, keepdims=True) + 1e-6)
    return x * (weight(norm.weight) * share + 1) + weight(norm.bias)


def oracle_block(block, x, time):
    y = oracle_linear(block.widen, oracle_rms(block.norm, oracle_depthwise(block.depthwise, x)))
    y = x + oracle_linear(block.narrow, oracle_response(block.response, oracle_gelu(y)))
    scale, shift = np.split(oracle_linear(block.modulate, silu(time)), 2, axis=1)
    return y * (1 + scale[:, None, None]) + shift[:, None, None]


def oracle_unfold(x):
    """Channel c of place (i, j) of a square is number 4 c + 2 i + j."""
    B, Y, X, C = x.shape
    out = np.zeros((B, 2 * Y, 2 * X, C // 4))
    for i in range(2):
        for j in range(2):
            out[:, i::2, j::2] = x[..., 2 * i + j :: 4]
    return out


def test_waves_are_cosines_then_sines():
    got = frequencies(float32(TIMES), 16)
    assert_close(got, oracle_waves(np.float32(TIMES).astype(np.float64), 16), LOGITS)
    np.testing.assert_array_equal(got[0], [1] * 8 + [0] * 8)


def test_time_embedding_equals_oracle():
    embedding = random_values(TimeEmbedding(16, DIM, POLICY))
    waves = oracle_waves(TIMES, 16)
    want = oracle_linear(embedding.linear_2, silu(oracle_linear(embedding.linear_1, waves)))
    assert_close(embedding(float32(TIMES)), want, LOGITS)


def test_response_norm_compares_channels_over_the_picture():
    norm, x = random_values(ResponseNorm(6)), noise(2, 3, 4, 6) * np.arange(1, 7)
    assert_close(norm(float32(x)), oracle_response(norm, x), F32)
    at_first = initialize(ResponseNorm(6), jax.random.key(0))
    np.testing.assert_array_equal(at_first(float32(x)), float32(x))


@pytest.fixture(scope="module")
def time():
    return noise(2, DIM, seed=5)


def test_block_equals_oracle(time):
    block, x = random_values(ConvNext(8, DIM, EPS, POLICY)), noise(2, 4, 3, 8)
    want = oracle_block(block, x, time)
    assert_close(jax.jit(block)(float32(x), float32(time)), want, F32)
    # What the bound can see: shift before scale.
    modulation = oracle_linear(block.modulate, silu(time))
    block.modulate.weight[...] = jnp.roll(block.modulate.weight[...], 8, axis=1)
    block.modulate.bias[...] = jnp.roll(block.modulate.bias[...], 8)
    assert relative_l2(block(float32(x), float32(time)), want) > 0.1 < abs(modulation).mean()


def test_encoder_equals_oracle(time):
    encoder, x = random_values(UvitEncoder(CONFIG, DIM, POLICY)), noise(2, 6, 8, 3)
    want = oracle_conv(encoder.conv_in, x, stride=2, padding=(0, 0))
    for block in encoder.blocks:
        want = oracle_block(block, want, time)
    got = jax.jit(encoder)(float32(x), float32(time))
    assert got.shape == (2, 3, 4, 8)
    assert_close(got, want, F32)


def test_decoder_equals_oracle(time):
    decoder = random_values(UvitDecoder(CONFIG, DIM, POLICY))
    x, skip = noise(2, 3, 4, 8), noise(2, 3, 4, 8, seed=2)
    want = np.concatenate([oracle_rms(decoder.norm_in, x), skip], axis=-1)
    for block in decoder.blocks:
        want = oracle_block(block, want, time)
    want = oracle_unfold(oracle_conv(decoder.conv_out, oracle_rms(decoder.norm_out, want)))
    got = jax.jit(decoder)(float32(x), float32(skip), float32(time))
    assert got.shape == (2, 6, 8, 3)
    assert_close(got, want, F32)


def test_channels_unfold_as_rows_and_columns():
    x = np.arange(2 * 12, dtype=np.float32).reshape(1, 1, 2, 12)
    np.testing.assert_array_equal(unfold(jnp.asarray(x)), oracle_unfold(x))


def test_a_channel_that_is_silent_everywhere_has_a_gradient():
    """As torch's: a norm of zeros has no slope."""
    norm, x = random_values(ResponseNorm(3)), noise(2, 4, 4, 3)
    x[0, :, :, 1] = 0
    found = jax.grad(lambda x: norm(x).sum())(float32(x))
    assert np.isfinite(found).all() and np.ptp(np.asarray(found[0, :, :, 1])) == 0
    got = np.asarray(norm(float32(x)))
    assert_close(got, oracle_response(norm, x), F32)
