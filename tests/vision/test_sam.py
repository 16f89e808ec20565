"""SAM's tower against float64 arithmetic, one query after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config.vision import SamConfig
from dsjax.model.parameters import shardings
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from dsjax.vision.sam import Attention, Layer, Sam
from tests.closeness import F32, LOGITS, assert_close
from tests.vision.test_convolution import noise
from tests.vision.test_projector import oracle_gelu, oracle_linear, random_values
from tests.vision.test_siglip import oracle_norm

POLICY = Policy(jnp.float32)
# 5 patches a side, which windows of 3 do not divide
CONFIG = SamConfig(
    image_size=20, patch_size=4, dim=16, n_layers=2, n_heads=2, inter_dim=24, window=3,
    global_layers=(1,), out_channels=8,
)  # fmt: skip


def oracle_attention(attention, x):
    """One square of patches [Y, X, D]."""
    Y, X, D = x.shape
    H = D // attention.n_heads
    tables = [np.asarray(t[...], np.float64) for t in (attention.rel_pos_h, attention.rel_pos_w)]
    q, k, v = (
        (x @ np.asarray(w, np.float64) + np.asarray(b)).reshape(Y, X, -1, H)
        for w, b in zip(attention.wqkv[...], attention.bqkv[...], strict=True)
    )
    out = np.zeros((Y, X, attention.n_heads, H))
    for y in range(Y):
        for x_ in range(X):
            for n in range(attention.n_heads):
                query = q[y, x_, n]
                scores = k[:, :, n] @ query / np.sqrt(H)
                for row in range(Y):
                    scores[row] += query @ tables[0][y - row + Y - 1]
                for column in range(X):
                    scores[:, column] += query @ tables[1][x_ - column + X - 1]
                weights = np.exp(scores - scores.max())
                out[y, x_, n] = np.einsum("yx,yxh->h", weights / weights.sum(), v[:, :, n])
    return oracle_linear(attention.proj, out.reshape(Y, X, D))


def test_attention_equals_oracle():
    attention, x = random_values(Attention(CONFIG, 3, POLICY)), noise(2, 3, 3, 16)
    want = np.stack([oracle_attention(attention, each) for each in x])
    assert_close(jax.jit(attention)(jnp.asarray(x, jnp.float32)), want, F32)


@pytest.mark.parametrize("window", [3, 0])
def test_layer_equals_oracle(window):
    layer, x = random_values(Layer(CONFIG, window, POLICY)), noise(1, 5, 5, 16)
    normed = oracle_norm(layer.norm1, x[0], 1e-6)
    if window:
        filled = np.zeros((6, 6, 16))
        filled[:5, :5] = normed
        attended = np.zeros_like(filled)
        for y in (0, 3):
            for x_ in (0, 3):
                inside = (slice(y, y + 3), slice(x_, x_ + 3))
                attended[inside] = oracle_attention(layer.attn, filled[inside])
        y_ = x[0] + attended[:5, :5]
    else:
        y_ = x[0] + oracle_attention(layer.attn, normed)
    hidden = oracle_gelu(oracle_linear(layer.lin1, oracle_norm(layer.norm2, y_, 1e-6)))
    want = y_ + oracle_linear(layer.lin2, hidden)
    assert_close(jax.jit(layer)(jnp.asarray(x, jnp.float32)), want[None], F32)


def test_the_first_global_layer_is_added_times_alpha():
    pixels = noise(1, 20, 20, 3).astype(np.float32)
    sam = random_values(Sam(CONFIG, 3, POLICY))
    run = jax.jit(lambda sam, pixels: sam(pixels))

    def with_alpha(value):
        other = jax.tree.map(lambda leaf: leaf, sam)
        other.alpha[...] = jnp.full(1, value)
        return np.asarray(run(other, pixels), np.float64)

    none, one, two = (with_alpha(value) for value in (0.0, 1.0, 2.0))
    assert none.shape == (1, 9, 32) and np.abs(one - none).max() > 0.1
    assert_close(two, none + 2 * (one - none), LOGITS)
    # Layers after it change what it is added to alone.
    deeper = dataclasses.replace(CONFIG, n_layers=3)
    assert len(Sam(deeper, 3, POLICY).layers) == 3


def test_sharded_equals_one_device():
    sam = random_values(Sam(CONFIG, 3, POLICY))
    pixels = noise(2, 20, 20, 3).astype(np.float32)
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, n_devices=4)
    run = jax.jit(lambda sam, pixels: sam(pixels))
    wanted = run(sam, pixels)
    placed = jax.device_put(sam, shardings(sam, mesh))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda sam, pixels: sam(pixels))(placed, pixels)
    assert_close(got, wanted, LOGITS)
