"""The tower against float64 arithmetic, one patch and one head after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.vision import SiglipConfig
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.siglip import Siglip
from tests.closeness import F32, LOGITS, assert_close, relative_l2
from tests.vision.test_projector import oracle_gelu, oracle_linear, random_values

# 9 pixels hold two patches of 4 and one pixel that is not seen.
CONFIG = SiglipConfig(image_size=9, patch_size=4, dim=16, n_layers=2, n_heads=2, inter_dim=24)


def pixels(n=2, config=CONFIG):
    size = config.image_size
    return np.random.default_rng(1).uniform(-1, 1, (n, size, size, 3)).astype(np.float32)


def oracle_norm(norm, x, eps):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
    return scaled * np.asarray(norm.weight[...]) + np.asarray(norm.bias[...])


def oracle(tower, pixels, gelu=oracle_gelu):
    config = tower.config
    P, heads = config.patch_size, config.n_heads
    weight, positions = (np.asarray(v[...], np.float64) for v in (tower.patch, tower.positions))
    pictures = []
    for picture in pixels.astype(np.float64):
        x = np.stack(
            [
                np.einsum("yxc,yxcd->d", picture[y : y + P, x : x + P], weight)
                for y in range(0, config.grid * P, P)
                for x in range(0, config.grid * P, P)
            ]
        )
        x = x + np.asarray(tower.patch_bias[...]) + positions
        for index in range(config.n_layers):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], tower.layers)
            normed = oracle_norm(layer.norm1, x, config.norm_eps)
            q, k, v = (
                normed @ np.asarray(w, np.float64) + np.asarray(b)
                for w, b in zip(layer.attn.wqkv[...], layer.attn.bqkv[...], strict=True)
            )
            parts = []
            for one in zip(*(np.split(each, heads, axis=1) for each in (q, k, v)), strict=True):
                scores = one[0] @ one[1].T / np.sqrt(one[0].shape[1])
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                parts.append(weights / weights.sum(-1, keepdims=True) @ one[2])
            x = x + oracle_linear(layer.attn.proj, np.concatenate(parts, axis=1))
            normed = oracle_norm(layer.norm2, x, config.norm_eps)
            x = x + oracle_linear(layer.fc2, gelu(oracle_linear(layer.fc1, normed)))
        pictures.append(oracle_norm(tower.norm, x, config.norm_eps))
    return np.stack(pictures)


@pytest.fixture(scope="module")
def tower():
    return random_values(Siglip(CONFIG, Policy(jnp.float32)))


def test_tower_equals_oracle(tower):
    assert_close(jax.jit(tower)(pixels()), oracle(tower, pixels()), F32)


def test_oracle_tells_gelus_apart(tower):
    """What the bound above can see: the other GELU is outside it."""
    tanh = lambda x: np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32)), np.float64)  # noqa: E731
    want = oracle(tower, pixels())
    assert relative_l2(oracle(tower, pixels(), tanh), want) > 2 * F32.bound


def test_pixels_that_fill_no_patch_change_nothing(tower):
    seen, other = pixels(), pixels()
    other[:, 8:], other[:, :, 8:] = 5.0, 5.0
    run = jax.jit(tower)
    np.testing.assert_array_equal(run(seen), run(other))


def test_a_pooling_head_is_not_read():
    config = dataclasses.replace(CONFIG, pool=True)
    tower = random_values(Siglip(config, Policy(jnp.float32)))
    assert_close(jax.jit(tower)(pixels()), oracle(tower, pixels()), F32)


def test_sharded_equals_one_device(tower):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, n_devices=8)
    placed = jax.device_put(tower, shardings(tower, mesh))
    wanted = jax.jit(tower)(pixels(4))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda tower, pixels: tower(pixels))(placed, pixels(4))
    assert_close(got, wanted, LOGITS)
