import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.vision import VqConfig
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.vq import Attention, GroupNorm, Residual, Vq, unit
from tests.closeness import LOGITS, assert_close
from tests.vision.test_convolution import noise, oracle_conv
from tests.vision.test_projector import random_values

POLICY = Policy(jnp.float32)
CONFIG = VqConfig(
    n_codes=40, code_dim=4, latent_channels=8, channels=32, multipliers=(1, 2), n_blocks=1
)


def oracle_norm(norm, x):
    B, Y, X, C = x.shape
    groups = x.reshape(B, Y, X, 32, C // 32)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    std = np.sqrt(groups.var(axis=(1, 2, 4), keepdims=True) + 1e-6)
    normed = ((groups - mean) / std).reshape(x.shape)
    return normed * np.asarray(norm.weight[...]) + np.asarray(norm.bias[...])


def silu(x):
    return x / (1 + np.exp(-x))


def test_groups_are_neighbouring_channels():
    norm, x = random_values(GroupNorm(64)), noise(2, 3, 3, 64) + np.arange(64)
    assert_close(norm(jnp.asarray(x, jnp.float32)), oracle_norm(norm, x), LOGITS)


@pytest.mark.parametrize("width", [32, 64])
def test_residual_equals_oracle(width):
    block, x = random_values(Residual(32, width, POLICY)), noise(1, 4, 4, 32)
    y = oracle_conv(block.conv1, silu(oracle_norm(block.norm1, x)))
    y = oracle_conv(block.conv2, silu(oracle_norm(block.norm2, y)))
    shortcut = x if width == 32 else oracle_conv(block.nin_shortcut, x)
    assert_close(block(jnp.asarray(x, jnp.float32)), shortcut + y, LOGITS)


def test_attention_equals_oracle():
    block, x = random_values(Attention(32, POLICY)), noise(1, 3, 3, 32)
    normed = oracle_norm(block.norm, x)
    q, k, v = (oracle_conv(c, normed).reshape(9, 32) for c in (block.q, block.k, block.v))
    scores = q @ k.T / np.sqrt(32)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended = (weights / weights.sum(-1, keepdims=True) @ v).reshape(1, 3, 3, 32)
    want = x + oracle_conv(block.proj_out, attended)
    assert_close(block(jnp.asarray(x, jnp.float32)), want, LOGITS)


@pytest.fixture(scope="module")
def vq():
    return random_values(Vq(CONFIG, POLICY))


def test_codes_are_the_nearest_by_angle(vq):
    """Lengths differ by far more than directions, so that neither side's may be left as it is."""
    lengths = np.exp(noise(40, 1, seed=3) * 2)
    vq = jax.tree.map(lambda leaf: leaf, vq)
    vq.codebook[...] = jnp.asarray(noise(40, 4, seed=2) * lengths, jnp.float32)
    pixels = noise(1, 8, 8, 3).clip(-1, 1).astype(np.float32)
    latents = np.asarray(vq.quant_conv(vq.encoder(pixels)), np.float64).reshape(-1, 4)
    entries = np.asarray(vq.codebook[...], np.float64)
    cosines = latents @ entries.T / np.linalg.norm(entries, axis=1)
    got = np.asarray(jax.jit(vq.encode)(pixels))
    assert got.shape == (1, 4, 4) and got.dtype == np.int32
    np.testing.assert_array_equal(got.reshape(-1), cosines.argmax(-1))
    euclidean = ((latents[:, None] - entries[None]) ** 2).sum(-1).argmin(-1)
    assert (euclidean != cosines.argmax(-1)).any()


def test_decoding_reads_directions_alone(vq):
    codes = np.arange(16, dtype=np.int32).reshape(1, 4, 4)
    run = jax.jit(lambda vq, codes: vq.decode(codes))
    want = run(vq, codes)
    assert want.shape == (1, 8, 8, 3) and want.dtype == jnp.float32
    longer = jax.tree.map(lambda leaf: leaf, vq)
    longer.codebook[...] = vq.codebook[...] * 7
    assert_close(run(longer, codes), want, LOGITS)


def test_unit_of_nothing_is_nothing():
    got = unit(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(got, np.zeros((2, 3)))


def test_sharded_equals_one_device(vq):
    mesh = make_mesh({"data": 4, "tensor": 2}, n_devices=8)
    codes = np.random.default_rng(0).integers(0, 40, (4, 4, 4)).astype(np.int32)
    wanted = jax.jit(vq.decode)(codes)
    placed = jax.device_put(vq, shardings(vq, mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda vq, codes: vq.decode(codes))(placed, codes)
    assert_close(got, wanted, LOGITS)
