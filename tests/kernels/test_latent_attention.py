"""Attention to a cache of latents in one kernel, interpreted, against `cached_attention`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.cached_attention import Block, cached_attention
from dsjax.kernels.latent_attention import fits, latent_attention
from dsjax.kernels.target import HOPPER, Target
from tests.closeness import BF16, F32, assert_close
from tests.kernels.hopper import INTERPRETED

L, B, N, C, R, S = 3, 3, 32, 32, 16, 256
POSITIONS = [[200], [5], [255]]  # inside a block, in the first one, the last of all

interpreted = jax.jit(
    functools.partial(latent_attention, scale=0.2, interpret=INTERPRETED),
    static_argnames="multiprocessors",
)


def arrays(seed=0, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    shapes = (B, 1, N, C), (B, 1, N, R), (L, B, 1, S, C), (L, B, 1, S, R)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@jax.jit
def defined(q, q_rope, latents, keys, layer, positions_B1):
    """In float32."""
    q, q_rope, latents, keys = (x.astype(jnp.float32) for x in (q, q_rope, latents, keys))

    def read(start, size):
        latent, key = (
            jax.lax.dynamic_slice_in_dim(x[layer], start, size, 2) for x in (latents, keys)
        )
        return Block((latent, key), latent)

    cpu = Target("cpu")
    return cached_attention((q, q_rope), read, S, positions_B1, scale=0.2, target=cpu)


# Of 2 programs per multiprocessor: all of a row's blocks to one, two to one, one to each.
@pytest.mark.parametrize("multiprocessors", [1, 6, 132])
def test_attention_equals_that_of_any_cache(multiprocessors):
    operands = *arrays(), jnp.int32(1), jnp.asarray(POSITIONS, jnp.int32)
    got, want = interpreted(*operands, multiprocessors=multiprocessors), defined(*operands)
    assert got.out_BTNW.dtype == jnp.bfloat16
    assert_close(got.out_BTNW, want.out_BTNW, BF16, "values")
    assert_close(got.highest_BTN, want.highest_BTN, F32, "highest scores")
    assert_close(got.total_BTN, want.total_BTN, F32, "totals")


def test_what_no_row_sees_is_not_read():
    q, q_rope, latents, keys = arrays(1)
    hidden_BS = np.arange(S)[None] > np.asarray(POSITIONS)
    beyond = jnp.asarray(np.where(hidden_BS, 1e4, 0)[None, :, None, :, None], jnp.bfloat16)
    spoilt = [x.at[jnp.asarray([0, 2])].set(jnp.nan) + beyond for x in (latents, keys)]
    rest = jnp.int32(1), jnp.asarray(POSITIONS, jnp.int32)
    got = interpreted(q, q_rope, *spoilt, *rest, multiprocessors=6)
    want = interpreted(q, q_rope, latents, keys, *rest, multiprocessors=6)
    assert (got.out_BTNW == want.out_BTNW).all()


def test_operands_that_fit():
    q, _, latents, keys = arrays()
    assert fits(q, latents, keys, HOPPER)
    assert not fits(q, latents, keys, Target("gpu", (8, 0)))
    assert not fits(jnp.concatenate([q, q], axis=1), latents, keys, HOPPER)  # two tokens
    assert not fits(q[:, :, :20], latents, keys, HOPPER)  # heads
    assert not fits(q, latents[..., :24], keys, HOPPER)  # no power of two
    assert not fits(q, latents[..., :200, :], keys[..., :200, :], HOPPER)  # no whole blocks
    assert not fits(*(x.astype(jnp.float32) for x in (q, latents, keys)), HOPPER)
    assert not fits(q, latents, keys.astype(jnp.float16), HOPPER)
