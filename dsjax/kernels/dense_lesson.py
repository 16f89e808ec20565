r"""How far an index is from attention to all earlier keys: the warm-up of DeepSeek sparse
attention, tile by tile.

The list of tiles is that of `dsjax.kernels.flash_attention.tiled_attention`, which also returns the
logarithm of each softmax's denominator. With it a tile knows its probabilities without the others,
p = exp(score - log sum), averaged over the heads. Since they add up to 1, a query's divergence is

    KL(p || softmax(I)) = sum_s p (log p - I) + log sum_s exp(I)

whose sums grow from tile to tile, so that no array holds all pairs. The backward pass computes each
tile again: the gradient of a score I is softmax(I) - p. Only the index has one.

Papers: V3.2-Exp and V3.2 (arXiv:2512.02556), section 2.1.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.kernels.flash_attention import Segments, Tiles
from dsjax.kernels.sparse_attention import Index, everywhere, index_scores
from dsjax.kernels.varying import vary_as

_MASKED = -1e30

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Queries(NamedTuple):
    """Blocks of queries, [blocks, B, t, ...]."""

    q: jax.Array
    log_sum: jax.Array
    segments: jax.Array | None


class _Keys(NamedTuple):
    """Blocks of keys, [blocks, B, s, ...]."""

    k: jax.Array
    segments: jax.Array | None


class _Sums(NamedTuple):
    """What a block of queries carries from tile to tile, float32 [B, t]."""

    apart: jax.Array  # p (log p - I)
    highest: jax.Array  # I
    total: jax.Array  # exp(I - highest)


class _Sizes(NamedTuple):
    """What must be known while it is traced."""

    scale: float
    head_axes: tuple[str, ...]


def tiled_divergence(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    log_sum_BTN: jax.Array,
    index: Index,
    tiles: Tiles,
    *,
    scale: float,
    segments: Segments | None = None,
    head_axes: tuple[str, ...] = (),
) -> jax.Array:
    """Returns KL(p || softmax(I)) of each query in nats, float32 [B, T], where p is the causal
    attention's probability of each key, averaged over the heads, and I are the index scores.

    Args:
      log_sum_BTN: what `tiled_attention` returns for these queries, keys and tiles.
      tiles: must list every pair in which a query may see a key, and none twice.
      head_axes: mesh axes over which devices have other heads of the same queries.
    """
    n_blocks = len(tiles.blocks_I)
    size = q_BTNH.shape[1] // n_blocks

    def cut(x_BTX: jax.Array) -> jax.Array:
        B, T, *rest = x_BTX.shape
        return x_BTX.reshape(B, T // size, size, *rest).swapaxes(0, 1)

    queries = _Queries(q_BTNH, log_sum_BTN, segments and segments.q_BT)
    keys = _Keys(k_BSNH, segments and segments.k_BS)
    target: Any = jax.tree.map(lambda x: cut(lax.stop_gradient(x)), (queries, keys))
    sizes = _Sizes(scale, head_axes)
    divergence_IBt: Any = _divergence(Index(*map(cut, index)), target, tiles, sizes)
    return divergence_IBt.swapaxes(0, 1).reshape(q_BTNH.shape[:2])


def _of_pair(index: Index, pair_2: jax.Array) -> Index:
    place, number = pair_2
    return Index(index.q_BTIY[place], index.w_BTI[place], index.k_BSY[number])


def _wanted(target: Any, tiles: Tiles, pair_2: jax.Array, sizes: _Sizes) -> Any:
    """Returns a tile's probabilities, averaged over the heads, and which keys its queries see:
    float32 and bool [B, t, s].
    """
    (place, number), (queries, keys) = pair_2, target
    size = keys.k.shape[2]
    inside = lax.iota(jnp.int32, size)
    at_t, at_s = tiles.blocks_I[place] * size + inside, number * size + inside
    visible_Bts = (at_s[None] <= at_t[:, None])[None]
    if queries.segments is not None:
        same_Bts = queries.segments[place][:, :, None] == keys.segments[number][:, None]
        visible_Bts = visible_Bts & same_Bts
    scores_BNts = _product("BtNH,BsNH->BNts", queries.q[place], keys.k[number]) * sizes.scale
    log_sum_BNt1 = queries.log_sum[place].swapaxes(1, 2)[..., None]
    scores_BNts = jnp.where(visible_Bts[:, None], scores_BNts - log_sum_BNt1, _MASKED)
    return everywhere(jnp.exp(scores_BNts).mean(axis=1), sizes.head_axes), visible_Bts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _divergence(index: Index, target: Any, tiles: Tiles, sizes: _Sizes) -> jax.Array:
    return _divergence_forward(index, target, tiles, sizes)[0]


def _divergence_forward(index, target, tiles, sizes):
    # Masks depend on the tokens alone: see `flash_attention`. Behind a barrier all arrays vary
    # between devices as any of them does, so the target, which has heads, is not among them.
    index, tiles = lax.optimization_barrier((index, tiles))

    def tile(sums_I: _Sums, pair_2):
        wanted_Bts, visible_Bts = _wanted(target, tiles, pair_2, sizes)
        scores_Bts = jnp.where(visible_Bts, index_scores(_of_pair(index, pair_2)), _MASKED)
        past = _Sums(*(x[pair_2[0]] for x in sums_I))
        highest_Bt = jnp.maximum(past.highest, scores_Bts.max(axis=-1))
        found_Bts = jnp.where(visible_Bts, jnp.exp(scores_Bts - highest_Bt[..., None]), 0.0)
        counted_Bts = visible_Bts & (wanted_Bts > 0)
        log_wanted_Bts = jnp.log(jnp.where(counted_Bts, wanted_Bts, 1.0))
        apart_Bts = jnp.where(counted_Bts, wanted_Bts * (log_wanted_Bts - scores_Bts), 0.0)
        sums = _Sums(
            past.apart + apart_Bts.sum(axis=-1),
            highest_Bt,
            past.total * jnp.exp(past.highest - highest_Bt) + found_Bts.sum(axis=-1),
        )
        return _Sums(*(x.at[pair_2[0]].set(y) for x, y in zip(sums_I, sums, strict=True))), None

    rows = index.w_BTI.shape[:-1]
    start = (vary_as(jnp.full(rows, x, jnp.float32), *index, *tiles) for x in (0, _MASKED, 0))
    sums_I, _ = lax.scan(tile, _Sums(*start), tiles.pairs_X2)
    log_found = sums_I.highest + jnp.log(sums_I.total)
    return sums_I.apart + log_found, (index, target, tiles, log_found)


def _divergence_backward(sizes, residuals, gradient_IBt):
    index, target, tiles, log_found = residuals

    def tile(sums: Index, pair_2):
        place, number = pair_2
        wanted_Bts, visible_Bts = _wanted(target, tiles, pair_2, sizes)
        scores_Bts, pull = jax.vjp(index_scores, _of_pair(index, pair_2))
        found_Bts = jnp.exp(
            jnp.where(visible_Bts, scores_Bts - log_found[place][..., None], _MASKED)
        )
        (parts,) = pull(gradient_IBt[place][..., None] * (found_Bts - wanted_Bts))
        places = Index(place, place, number)
        added = (
            x.at[i].add(part.astype(x.dtype))
            for x, i, part in zip(sums, places, parts, strict=True)
        )
        return Index(*added), None

    start = (vary_as(jnp.zeros(x.shape, jnp.float32), *index, gradient_IBt, *tiles) for x in index)
    sums, _ = lax.scan(tile, Index(*start), tiles.pairs_X2)
    return Index(*(x.astype(like.dtype) for x, like in zip(sums, index, strict=True))), None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)
