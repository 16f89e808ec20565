"""The divergence by a list of tiles against that of whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.dense_lesson import tiled_divergence
from dsjax.kernels.flash_attention import Segments, Tiles, tiled_attention
from dsjax.kernels.sparse_attention import Index, masked_attention
from tests.closeness import BF16, F32, assert_close

B, T, N, H, W, SIZE = 2, 24, 3, 8, 6, 4
SEGMENTS = np.array([[1] * 10 + [2] * 14, [1] * 17 + [2] * 7], np.int32)
BLOCKS = [4, 0, 5]  # of six, in this order
ROWS = np.concatenate([np.arange(block * SIZE, (block + 1) * SIZE) for block in BLOCKS])


def arrays():
    """Queries, keys, values; queries, weights and keys of the index, whose scores are large."""
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, N, H), (B, T, N, W), (B, T, 5, 4), (B, T, 5), (B, T, 4)
    made = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    return made[:3], Index(made[3], 4 * made[4], made[5])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_divergence_and_its_gradient_are_those_of_whole_rows(dtype):
    (q, k, v), index = arrays()
    index = index._replace(q_BTIY=index.q_BTIY.astype(dtype), k_BSY=index.k_BSY.astype(dtype))
    close = F32 if dtype == jnp.float32 else BF16
    pairs = [(place, key) for place, block in enumerate(BLOCKS) for key in range(block + 1)]
    tiles = Tiles(jnp.asarray(BLOCKS, jnp.int32), jnp.asarray(pairs, jnp.int32))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, len(ROWS))), jnp.float32)

    def tiled(q, k, v, index):
        common = {"scale": 0.3, "segments": Segments(SEGMENTS[:, ROWS], SEGMENTS)}
        few = index._replace(q_BTIY=index.q_BTIY[:, ROWS], w_BTI=index.w_BTI[:, ROWS])
        _, log_sum = tiled_attention(q[:, ROWS], k, v, tiles, **common)
        return tiled_divergence(q[:, ROWS], k, log_sum, few, tiles, **common)

    def whole(q, k, v, index):
        both = Segments(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS))
        _, divergence = masked_attention(
            q, k, v, index, count=1, scale=0.3, segments=both, lesson="warmup"
        )
        return divergence[:, ROWS]

    def run(way):
        def total(*inputs):
            divergence = way(*inputs)
            return (divergence * weights).sum(), divergence

        gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True))
        return gradient(q, k, v, index)

    ((_, got), of), ((_, want), wanted) = run(tiled), run(whole)
    assert_close(got, want, close, "divergence")
    for name, *parts in zip(Index._fields, of[3], wanted[3], strict=True):
        assert_close(*parts, close, f"gradient of {name}")
    assert not any(np.asarray(part).any() for part in of[:3])
