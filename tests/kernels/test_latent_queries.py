"""What surrounds attention to latents in two kernels, interpreted, against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.few_rows import Norm
from dsjax.kernels.latent_queries import fits, head_values, latent_queries
from dsjax.model import rope
from dsjax.model.layers import rms_norm
from tests.closeness import BF16, EXACT, F32, assert_close
from tests.golden.ours import QUICK
from tests.kernels.hopper import INTERPRETED

L, N, H, W, C, R, S = 3, 4, 16, 32, 128, 16, 8
LEVELS = {jnp.float32: F32, jnp.bfloat16: BF16}
EPS = 0.5
both_types = pytest.mark.parametrize("dtype", LEVELS, ids=lambda dtype: dtype.__name__)


def arrays(seed, dtype, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


# Fewer rows than heads, and more, so that a head writes several.
@pytest.mark.parametrize("n_rows", [1, 6])
@both_types
def test_queries_and_entries(n_rows, dtype):
    q, kv, w, weight, latents, keys = arrays(
        n_rows, dtype, (n_rows, N * (H + R)), (n_rows, C + R), (L, C, N * (H + W)), (L, C),
        (L, n_rows, 1, S, C), (L, n_rows, 1, S, R),
    )  # fmt: skip
    angles = jnp.linspace(0, 3, n_rows * R // 2, dtype=jnp.float32).reshape(n_rows, 1, R // 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    positions = jnp.asarray([5, 0, 7, 3, 1, 6][:n_rows], jnp.int32)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def interpreted(layer, weight, *cached):
        norm, turned = Norm(weight, EPS), (cos[:, 0], sin[:, 0])
        return latent_queries(
            q, kv, turned, positions, w, norm, cached, layer, n_heads=N, interpret=INTERPRETED
        )

    got = interpreted(jnp.int32(1), weight, latents, keys)
    q32, kv32, w32 = (each.astype(jnp.float32) for each in (q, kv, w[1]))
    q32 = q32.reshape(n_rows, 1, N, H + R)
    keys_of = w32.reshape(C, N, H + W)[..., :H]
    wanted = np.einsum("mnh,cnh->mnc", q32[:, 0, :, :H], keys_of)
    assert_close(got[0], wanted, LEVELS[dtype], "queries of latents")
    rotated = rope.rotate_pairs(q32[..., H:], cos, sin)[:, 0]
    assert_close(got[1], rotated, LEVELS[dtype], "rotated queries")
    own = np.arange(n_rows), 0, positions
    latent = rms_norm(kv32[:, :C], weight[1].astype(jnp.float32), EPS)
    assert_close(got[2][1][own], latent, LEVELS[dtype], "latents")
    key = rope.rotate_pairs(kv32[:, None, None, C:], cos, sin)[:, 0, 0]
    assert_close(got[3][1][own], key, LEVELS[dtype], "keys")
    for after, before in ((got[2], latents), (got[3], keys)):
        after = after.at[1, *own].set(before[1, *own])
        assert_close(after, before, EXACT, "the rest of the cache")


@pytest.mark.parametrize("n_rows", [1, 17])
@both_types
def test_values_of_heads(n_rows, dtype):
    latents, w = arrays(n_rows, dtype, (n_rows, N, C), (L, C, N * (H + 2 * W)))
    function = functools.partial(head_values, value_width=2 * W, interpret=INTERPRETED)
    got = jax.jit(function, compiler_options=QUICK)(latents, w, jnp.int32(2))
    values_of = w[2].astype(jnp.float32).reshape(C, N, H + 2 * W)[..., H:]
    wanted = np.einsum("mnc,cnw->mnw", latents.astype(jnp.float32), values_of)
    assert got.dtype == dtype
    assert_close(got, wanted.reshape(n_rows, -1), LEVELS[dtype], "values")


def test_widths_that_fit():
    assert fits(128, 128, 512, 64)
    assert not fits(96, 128, 512, 64)  # no power of two
    assert not fits(128, 16, 512, 64)  # no whole blocks
    assert not fits(128, 128, 64, 64)
    assert not fits(128, 128, 512, 8)
