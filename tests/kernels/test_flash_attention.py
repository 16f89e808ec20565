"""Attention by a list of tiles against the whole score matrix."""

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.kernels.flash_attention import Segments, Tiles, tiled_attention
from tests.closeness import F32, assert_close
from tests.oracles.kernels import reference_attention

LENGTH, SIZE = 24, 4


def _tiles(blocks):
    pairs = [(place, key) for place, block in enumerate(blocks) for key in range(block + 1)]
    return Tiles(jnp.asarray(blocks, jnp.int32), jnp.asarray(pairs, jnp.int32))


def _inputs():
    rng = np.random.default_rng(0)
    shapes = [(2, LENGTH, 4, 8), (2, LENGTH, 2, 8), (2, LENGTH, 2, 6)]
    segments = np.array([[1] * 10 + [2] * 14, [1] * 17 + [2] * 7], np.int32)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes], segments


def _run(attention, *inputs):
    def total(*inputs):
        out = attention(*inputs)
        return (out * jnp.cos(jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))).sum(), out

    return jax.tree.leaves(jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*inputs))


def test_listed_queries_get_what_the_whole_matrix_gives_them():
    """Blocks 4, 0 and 5 of six, in this order; gradients of keys are those of these queries."""
    inputs, segments = _inputs()
    blocks = [4, 0, 5]
    rows = np.concatenate([np.arange(block * SIZE, (block + 1) * SIZE) for block in blocks])

    def tiled(q, k, v):
        cut = Segments(jnp.asarray(segments[:, rows]), jnp.asarray(segments))
        return tiled_attention(q[:, rows], k, v, _tiles(blocks), scale=0.3, segments=cut)[0]

    def reference(q, k, v):
        out = reference_attention(q, k, v, scale=0.3, segment_ids_BT=jnp.asarray(segments))
        return out[:, rows]

    for name, got, want in zip(
        ("dq", "dk", "dv", "out"), _run(tiled, *inputs), _run(reference, *inputs), strict=True
    ):
        assert_close(got, want, F32, name)


def test_tile_that_is_not_listed_is_not_seen():
    (q, k, v), _ = _inputs()
    tiles = _tiles([5])
    tiles = tiles._replace(pairs_X2=tiles.pairs_X2[1:])  # without the first block of keys
    got, _ = tiled_attention(q[:, -SIZE:], k, v, tiles, scale=0.3)
    want = reference_attention(q[:, SIZE:], k[:, SIZE:], v[:, SIZE:], scale=0.3)[:, -SIZE:]
    assert_close(got, want, F32, "out")
