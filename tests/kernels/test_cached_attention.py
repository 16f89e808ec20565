"""Attention to a cache, in blocks, against the whole score matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import cached_attention as kernel
from dsjax.kernels.target import Target
from tests.closeness import F32, assert_close
from tests.oracles.kernels import reference_cached_attention

B, T, N, S = 2, 3, 4, 300
POSITIONS = jnp.asarray([[140, 141, 142], [5, 6, 7]], jnp.int32)


def _arrays(key_heads=(2, 1), widths=(8, 6), seed=0, T=T):
    """Queries and keys of a score of two products, and values."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    queries = tuple(array(B, T, N, width) for width in widths)
    keys = tuple(array(B, P, S, width) for P, width in zip(key_heads, widths, strict=True))
    return queries, keys, array(B, key_heads[0], S, 5)


def _reader(keys, values):
    def read(start, size):
        slices = [jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (*keys, values)]
        return kernel.Block(tuple(slices[:-1]), slices[-1])

    return read


@functools.partial(jax.jit, static_argnums=0)
def _attend(attention, queries, keys, values, positions_BT):
    return attention(queries, _reader(keys, values), S, positions_BT, scale=0.3)


cached_attention = functools.partial(kernel.cached_attention, target=Target("cpu"))


@pytest.fixture(params=["whole", "blocks"])
def attend(request, monkeypatch):
    """Blocks of 128, of which the third would end beyond the cache, or one of all positions."""
    if request.param == "blocks":
        monkeypatch.setattr(kernel, "_MAX_SCORES", 1)
    return functools.partial(_attend.__wrapped__, _cached_attention)


def _cached_attention(*arguments, **scale):
    return cached_attention(*arguments, **scale).out_BTNW


@pytest.mark.parametrize(("first", "T"), [(140, 3), (S - 3, 3), (140, 20), (S - 20, 20)])
def test_cached_attention_equals_reference(attend, first, T):
    positions_BT = jnp.asarray([[first], [5]], jnp.int32) + jnp.arange(T, dtype=jnp.int32)[None]
    queries, keys, values = _arrays(T=T)
    want = _attend(reference_cached_attention, queries, keys, values, positions_BT)
    assert_close(attend(queries, keys, values, positions_BT), want, F32, "attention")


def test_a_query_sees_exactly_the_positions_up_to_its_own(attend):
    """Values that name their position, under equal scores, give the mean of what is seen."""
    queries, keys, _ = _arrays()
    values = jnp.broadcast_to(jnp.arange(S, dtype=jnp.float32)[:, None], (B, 1, S, 1))
    out = attend([0 * q for q in queries], keys, values, POSITIONS)
    assert_close(out[..., 0], jnp.broadcast_to(POSITIONS[..., None] / 2, (B, T, N)), F32, "mean")


def test_blocks_that_nobody_sees_are_not_read(monkeypatch):
    monkeypatch.setattr(kernel, "_MAX_SCORES", 1)
    queries, keys, values = _arrays()
    values = values.at[:, :, 256:].set(jnp.nan)
    out = _attend.__wrapped__(_cached_attention, queries, keys, values, POSITIONS)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(
    ("target", "B", "T", "size"),
    [
        ("gpu", 1, 1, 8192),
        ("cpu", 1, 1, 2048),  # the keys of a step stay in a core's cache
        ("cpu", 8, 3, 256),
        ("cpu", 1, 16, 512),  # a chunk of a prompt reads few positions that nobody sees
        ("gpu", 1, 1024, 1024),
        ("gpu", 4, 2048, 128),  # the bound on scores
    ],
)
def test_blocks_are_small_where_it_pays(target, B, T, size):
    sizes = []

    def read(start, size):
        sizes.append(size)
        return kernel.Block((jnp.zeros((B, 1, size, 4)),), jnp.zeros((B, 1, size, 4)))

    def attend(q, positions_BT):
        return kernel.cached_attention(
            (q,), read, 8192, positions_BT, scale=1.0, target=Target(target)
        )

    jax.eval_shape(attend, jnp.zeros((B, T, 16, 4)), jnp.zeros((B, T), jnp.int32))
    assert set(sizes) == {size}


def test_scores_of_a_long_cache_stay_within_the_bound():
    """64 MiB of scores and a few copies of them, where the whole matrix would take 1 GiB."""
    q = jax.ShapeDtypeStruct((1, 512, 16, 8), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, 1, 2**15, 8), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, 512), jnp.int32)

    def attend(q, k, v, positions_BT):
        read = _reader((k,), v)
        return _cached_attention((q,), read, k.shape[2], positions_BT, scale=1.0)

    memory = jax.jit(attend).lower(q, kv, kv, positions).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**28


@pytest.mark.parametrize("n_blocks", [2, 3])
def test_blocks_of_keys_are_joined_to_the_whole(n_blocks):
    """The second row sees keys of the first of three blocks only, neither row any of the third."""
    queries, keys, values = _arrays()
    want = _attend(reference_cached_attention, queries, keys, values, POSITIONS)

    @jax.jit
    def joined(queries, keys, values, n_blocks):
        def attend(number):
            def read(start, size):
                return _reader(keys, values)(number * 100 + start, size)

            return cached_attention(queries, read, 100, POSITIONS - number * 100, scale=0.3)

        return kernel.in_blocks(attend, n_blocks).out_BTNW

    assert_close(joined(queries, keys, values, n_blocks), want, F32, "attention")
