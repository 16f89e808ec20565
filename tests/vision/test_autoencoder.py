import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.vision import VqConfig
from dsjax.model.parameters import declarations
from dsjax.precision.policy import Policy
from dsjax.vision.autoencoder import Attention, Decoder, Encoder, GroupNorm, Residual
from tests.closeness import LOGITS, assert_close
from tests.vision.test_convolution import noise, oracle_conv
from tests.vision.test_projector import random_values

POLICY = Policy(jnp.float32)
CONFIG = VqConfig(latent_channels=8, channels=32, multipliers=(1, 2), n_blocks=1)


def oracle_norm(norm, x):
    B, Y, X, C = x.shape
    groups = x.reshape(B, Y, X, norm.n_groups, C // norm.n_groups)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    std = np.sqrt(groups.var(axis=(1, 2, 4), keepdims=True) + 1e-6)
    normed = ((groups - mean) / std).reshape(x.shape)
    return normed * np.asarray(norm.weight[...]) + np.asarray(norm.bias[...])


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("n_groups", [32, 8])
def test_groups_are_neighbouring_channels(n_groups):
    norm, x = random_values(GroupNorm(64, n_groups)), noise(2, 3, 3, 64) + np.arange(64)
    assert norm.n_groups == n_groups
    assert_close(norm(jnp.asarray(x, jnp.float32)), oracle_norm(norm, x), LOGITS)


def oracle_residual(block, x):
    y = oracle_conv(block.conv1, silu(oracle_norm(block.norm1, x)))
    y = oracle_conv(block.conv2, silu(oracle_norm(block.norm2, y)))
    return y + (oracle_conv(block.nin_shortcut, x) if hasattr(block, "nin_shortcut") else x)


def oracle_attention(block, x):
    B, *_, C = x.shape
    normed = oracle_norm(block.norm, x)
    q, k, v = (oracle_conv(c, normed).reshape(B, -1, C) for c in (block.q, block.k, block.v))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(C)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    attended = weights / weights.sum(-1, keepdims=True) @ v
    return x + oracle_conv(block.proj_out, attended.reshape(x.shape))


@pytest.mark.parametrize("width", [32, 64])
def test_residual_equals_oracle(width):
    block, x = random_values(Residual(32, width, 32, POLICY)), noise(1, 4, 4, 32)
    assert hasattr(block, "nin_shortcut") == (width != 32)
    assert_close(block(jnp.asarray(x, jnp.float32)), oracle_residual(block, x), LOGITS)


def test_attention_equals_oracle():
    block, x = random_values(Attention(32, 32, POLICY)), noise(2, 3, 3, 32)
    assert_close(block(jnp.asarray(x, jnp.float32)), oracle_attention(block, x), LOGITS)


def test_the_coarsest_blocks_attend_if_asked():
    for attends, count in ((True, 3), (False, 1)):
        halves = (
            Encoder(CONFIG, 8, POLICY, attends=attends),
            Decoder(CONFIG, POLICY, attends=attends),
        )
        found = [
            {each.path for each in declarations(half) if ".q.weight" in each.path}
            for half in halves
        ]
        assert [len(each) for each in found] == [min(count, 2), count]


def oracle_middle(middle, x):
    x = oracle_attention(middle.attention, oracle_residual(middle.before, x))
    return oracle_residual(middle.after, x)


def oracle_ends(half, x):
    return oracle_conv(half.conv_out, silu(oracle_norm(half.norm_out, x)))


def oracle_encoder(encoder, x):
    """Without attention outside the middle."""
    x = oracle_conv(encoder.conv_in, x)
    for level in encoder.levels:
        for block in level.blocks:
            x = oracle_residual(block, x)
        if hasattr(level, "resample"):
            x = oracle_conv(level.resample, x, stride=2, padding=(0, 1))
    return oracle_ends(encoder, oracle_middle(encoder.middle, x))


def oracle_decoder(decoder, x):
    """Without attention outside the middle."""
    x = oracle_middle(decoder.middle, oracle_conv(decoder.conv_in, x))
    for level in decoder.levels:
        for block in level.blocks:
            x = oracle_residual(block, x)
        if hasattr(level, "resample"):
            x = oracle_conv(level.resample, x.repeat(2, axis=1).repeat(2, axis=2))
    return oracle_ends(decoder, x)


def test_halves_equal_oracles():
    encoder = small(random_values(Encoder(CONFIG, 6, POLICY, attends=False)))
    x = noise(1, 4, 4, 3)
    assert_close(encoder(jnp.asarray(x, jnp.float32)), oracle_encoder(encoder, x), LOGITS)
    decoder, x = small(random_values(Decoder(CONFIG, POLICY, attends=False))), noise(1, 2, 2, 8)
    assert_close(decoder(jnp.asarray(x, jnp.float32)), oracle_decoder(decoder, x), LOGITS)


def small(module):
    """Weights of convolutions by the number of their inputs, so that sizes stay about 1."""
    return jax.tree.map(
        lambda leaf: leaf * np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim == 4 else leaf, module
    )
