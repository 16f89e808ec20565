"""Attention to the keys that an index chooses (DeepSeek sparse attention, V3.2), in plain XLA.

A lightning indexer scores every earlier key for every query; a query attends to the `count` keys of
its highest scores. Choice and attention are separate:

* `select` turns scores into indices, and into which of them are valid: a query with fewer visible
  keys than `count` takes all of them. `chosen` is the same choice as a mask. It sorts nothing, so
  it can be split over devices; of equal scores both take the first keys.
* `masked_attention` multiplies whole sequences and masks what is not chosen: the definition, with
  gradients. `gathered_attention` reads the chosen keys only.

Whole sequences run in tiles of queries, and the backward pass recomputes each tile: neither scores
nor masks ever exist for all pairs. On the way, `masked_attention` measures how far the indexer is
from the attention that it shall predict (`Lesson`).

The choice has no gradient. Papers: V3.2-Exp and V3.2 (arXiv:2512.02556), section 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.kernels.cached_attention import Attended
from dsjax.kernels.flash_attention import Segments

# Most numbers in the largest array of one tile: 64 MiB of float32.
_MOST = 2**24
# Queries of the chunks in which a device with whole sequences meets the keys up to their end.
_MIN_CHUNK, _MAX_CHUNKS = 128, 16
_MASKED = -1e30

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

# What the indexer learns from: "warmup": attention to all keys, which masks nothing; "sparse":
# attention to the keys that it chose.
Lesson = Literal["warmup", "sparse"]


class Index(NamedTuple):
    """What scores keys: I heads of queries, the weight of each head, and one key per position."""

    q_BTIY: jax.Array
    w_BTI: jax.Array  # float32, all constant factors included
    k_BSY: jax.Array


class Selection(NamedTuple):
    """The keys of each query, the highest score first."""

    indices_BTJ: jax.Array  # int32, all different
    valid_BTJ: jax.Array  # bool; the others are keys that the query does not see


class Keys(NamedTuple):
    """Keys among which to choose, of each query its own, and in any order."""

    ranks_BTS: jax.Array  # uint32 in the order of the scores; 0 for invisible keys
    places_BTS: jax.Array  # uint32; of equal scores the lowest win

    @classmethod
    def of(cls, scores: jax.Array, places: jax.Array, visible: jax.Array) -> Keys:
        """Ranks float32 scores."""
        ranks = jnp.where(visible, _ordered(_plain_zeros(scores)), jnp.uint32(0))
        return cls(ranks, places.astype(jnp.uint32))


class Limit(NamedTuple):
    """The last key of a choice, [B, T, 1] each."""

    rank: jax.Array  # uint32
    end: jax.Array  # uint32, the place up to which keys of this rank are chosen


class Split(NamedTuple):
    """How many devices share rows, heads and queries.

    Attributes:
      places_T: int32, the place in the sequence of each query; None: their order is the sequence's.
    """

    batch: int = 1
    heads: int = 1
    length: int = 1
    places_T: jax.Array | None = None


WHOLE = Split()


def index_scores(index: Index) -> jax.Array:
    """Returns sum_i w[t, i] * relu(q[t, i] . k[s]), float32 [B, T, S]: V3.2 equation 1.

    A score may be negative, as weights are.
    """
    products_BTIS = jax.nn.relu(_product("BTIY,BSY->BTIS", index.q_BTIY, index.k_BSY))
    return _product("BTI,BTIS->BTS", index.w_BTI, products_BTIS)


def select(scores_BTS: jax.Array, visible_BTS: jax.Array, count: int) -> Selection:
    """Chooses the `count` visible keys of the highest scores, or all if there are no more."""
    candidates = jnp.where(visible_BTS, _plain_zeros(scores_BTS), -jnp.inf)
    values, indices = lax.top_k(candidates, min(count, scores_BTS.shape[-1]))
    return Selection(indices, values > -jnp.inf)


def chosen(scores_BTS: jax.Array, visible_BTS: jax.Array, count: int) -> jax.Array:
    """Returns the choice of `select` as a mask, bool [B, T, S]."""
    S = scores_BTS.shape[-1]
    if count >= S:
        return visible_BTS
    place_11S = lax.broadcasted_iota(jnp.uint32, (1, 1, S), 2)
    keys = Keys.of(scores_BTS, place_11S, visible_BTS)
    return within(keys, limit(keys, count, most=S))


def limit(keys: Keys, count: int, *, most: int = 2**31 - 1) -> Limit:
    """Finds the last of the `count` visible keys of the highest scores.

    Args:
      most: places are below it.
    """
    ranks_BTS, enough = keys.ranks_BTS, jnp.int32(count)
    rank = _largest(lambda trial: _count(ranks_BTS >= trial) >= enough, ranks_BTS, bits=32)
    tied_BTS = (ranks_BTS == rank) & (ranks_BTS > 0)
    room = enough - _count(ranks_BTS > rank)
    end = _largest(
        lambda trial: _count(tied_BTS & (keys.places_BTS < trial)) <= room,
        ranks_BTS,
        bits=most.bit_length(),
    )
    return Limit(rank, end)


def within(keys: Keys, last: Limit) -> jax.Array:
    """Tells which keys are chosen, bool [B, T, S]."""
    tied_BTS = (keys.ranks_BTS == last.rank) & (keys.ranks_BTS > 0)
    return (keys.ranks_BTS > last.rank) | (tied_BTS & (keys.places_BTS < last.end))


def _plain_zeros(scores: jax.Array) -> jax.Array:
    """Replaces -0.0 by 0.0: they are equal scores."""
    return jnp.where(scores == 0, jnp.zeros_like(scores), scores)


def _ordered(x: jax.Array) -> jax.Array:
    """Maps finite float32 numbers to uint32 above 0 in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _count(mask_BTS: jax.Array) -> jax.Array:
    return mask_BTS.sum(axis=-1, keepdims=True, dtype=jnp.int32)


def _largest(holds: Callable[[jax.Array], jax.Array], like_BTS: jax.Array, bits: int) -> jax.Array:
    """Returns the largest number of `bits` bits for which a condition holds, uint32 [B, T, 1]. The
    condition must hold for all smaller numbers too.
    """

    def step(place: jax.Array | int, found: jax.Array) -> jax.Array:
        trial = found | (jnp.uint32(1 << (bits - 1)) >> jnp.asarray(place, jnp.uint32))
        return jnp.where(holds(trial), trial, found)

    return lax.fori_loop(0, bits, step, like_BTS[..., :1] & jnp.uint32(0))


def gathered_attention(
    queries: Sequence[jax.Array],
    keys: Sequence[jax.Array],
    v_BTJW: jax.Array,
    valid_BTJ: jax.Array,
    *,
    scale: float,
) -> Attended:
    """Attends from each query to J keys of its own, which all its heads share.

    Args:
      queries: [B, T, N, X] each; a score is the sum of their products with `keys`.
      keys: [B, T, J, X] each.

    Returns:
      `out` in the queries' dtype.
    """
    products = [
        _product("BTNX,BTJX->BTNJ", q_BTNX, k_BTJX)
        for q_BTNX, k_BTJX in zip(queries, keys, strict=True)
    ]
    scores_BTNJ = jnp.where(valid_BTJ[:, :, None], sum(products) * scale, _MASKED)
    highest_BTN1 = scores_BTNJ.max(axis=-1, keepdims=True)
    weights_BTNJ = jnp.exp(scores_BTNJ - highest_BTN1)
    total_BTN1 = weights_BTNJ.sum(axis=-1, keepdims=True)
    weights_BTNJ = (weights_BTNJ / total_BTN1).astype(v_BTJW.dtype)
    out_BTNW = _product("BTNJ,BTJW->BTNW", weights_BTNJ, v_BTJW).astype(queries[0].dtype)
    return Attended(out_BTNW, highest_BTN1[..., 0], total_BTN1[..., 0])


def masked_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNW: jax.Array,
    index: Index,
    *,
    count: int,
    scale: float,
    segments: Segments | None = None,
    split: Split = WHOLE,
    lesson: Lesson | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Attends causally from whole sequences to the keys that the index chooses among those that a
    query sees.

    Args:
      count: keys per query.
      segments: a query sees and counts keys of its own segment only; None: all earlier ones.
      split: how devices share the queries.
      lesson: what the indexer learns from; None: nothing.

    Returns:
      attention, [B, T, N, W]; and with a lesson float32 [B, T], the divergence KL(p || softmax(I))
      of each query, where p is the attention's probability of each key, averaged over the heads,
      and I are the index scores, over the keys that take part. Only the index has its gradient.
    """
    T, S = q_BTNH.shape[1], k_BSNH.shape[1]
    of_queries: Any = (q_BTNH, index.q_BTIY, index.w_BTI, segments and segments.q_BT)
    of_keys: Any = (k_BSNH, v_BSNW, index.k_BSY, segments and segments.k_BS)
    B, _, N, _ = q_BTNH.shape
    # Of one query and key, on one device.
    widest = max(N // split.heads, index.w_BTI.shape[2]) * max(B // split.batch, 1)

    def attend(queries: Any, places_T: jax.Array, seen: int) -> Any:
        keys = jax.tree.map(lambda x: x[:, :seen], of_keys)
        tile = functools.partial(_tile, keys=keys, count=count, scale=scale, lesson=lesson)
        most = max(_MOST // (widest * seen), 1)
        return over_tiles(tile, queries, places_T, most=most, shards=split.length)

    if split.places_T is not None:
        return attend(of_queries, split.places_T, S)
    # Queries in order meet the keys up to the end of their chunk only.
    size = max(-(-T // _MAX_CHUNKS // _MIN_CHUNK) * _MIN_CHUNK, _MIN_CHUNK)
    chunks = [slice(start, min(start + size, T)) for start in range(0, T, size)]
    pieces = []
    for chunk in chunks:
        queries = jax.tree.map(lambda x, chunk=chunk: x[:, chunk], of_queries)
        pieces.append(attend(queries, lax.iota(jnp.int32, T)[chunk], chunk.stop))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces)


def over_tiles(
    function: Callable[[Any, jax.Array], Any],
    of_queries: Any,
    places_T: jax.Array,
    *,
    most: int,
    shards: int = 1,
) -> Any:
    """Applies a function to a few queries after the other, and again in the backward pass.

    Args:
      function: (a part of `of_queries`, its places, [T]) -> a tree of arrays [B, T, ...].
      of_queries: a tree of arrays [B, T, ...].
      most: queries per tile.
      shards: equal parts of the queries that different devices hold; each gives a part of a tile.
    """
    T = len(places_T)
    part = T // shards
    size = next(size for size in range(min(most, part), 0, -1) if part % size == 0)
    if size == part:
        return jax.checkpoint(function)(of_queries, places_T)
    n_tiles = part // size

    def cut(x_BTX: jax.Array) -> jax.Array:
        B, _, *rest = x_BTX.shape
        x_BRItX = x_BTX.reshape(B, shards, n_tiles, size, *rest)
        return jnp.moveaxis(x_BRItX, 2, 0).reshape(n_tiles, B, shards * size, *rest)

    def join(x_IBTX: jax.Array) -> jax.Array:
        _, B, _, *rest = x_IBTX.shape
        x_IBRtX = x_IBTX.reshape(n_tiles, B, shards, size, *rest)
        return jnp.moveaxis(x_IBRtX, 0, 2).reshape(B, T, *rest)

    tiles = (jax.tree.map(cut, of_queries), cut(places_T[None])[:, 0])
    return jax.tree.map(join, lax.map(lambda tile: jax.checkpoint(function)(*tile), tiles))


def _tile(
    queries: Any, places_T: jax.Array, *, keys: Any, count: int, scale: float, lesson: Lesson | None
) -> tuple[jax.Array, jax.Array | None]:
    q_BTNH, index_q_BTIY, w_BTI, q_segments_BT = queries
    k_BSNH, v_BSNW, index_k_BSY, k_segments_BS = keys
    (B, T), S = q_BTNH.shape[:2], k_BSNH.shape[1]
    places_S = lax.iota(jnp.int32, S)
    visible_BTS = jnp.broadcast_to((places_S[None] <= places_T[:, None])[None], (B, T, S))
    if q_segments_BT is not None:
        visible_BTS = visible_BTS & (q_segments_BT[:, :, None] == k_segments_BS[:, None])
    mask_BTS, index_BTS = visible_BTS, None
    if lesson or count < S:
        index_BTS = index_scores(Index(index_q_BTIY, w_BTI, index_k_BSY))
        if lesson != "warmup":
            mask_BTS = chosen(lax.stop_gradient(index_BTS), visible_BTS, count)
    scores_BNTS = _product("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * scale
    weights_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, _MASKED), axis=-1)
    out_BTNW = _product("BNTS,BSNW->BTNW", weights_BNTS.astype(v_BSNW.dtype), v_BSNW)
    divergence_BT = None
    if lesson and index_BTS is not None:
        wanted_BTS = lax.stop_gradient(weights_BNTS.mean(axis=1))
        divergence_BT = divergence(wanted_BTS, index_BTS, mask_BTS)
    return out_BTNW.astype(q_BTNH.dtype), divergence_BT


def divergence(wanted_BTS: jax.Array, scores_BTS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Returns KL(wanted || softmax of the scores over the mask), in nats, float32 [B, T]."""
    log_found_BTS = jax.nn.log_softmax(jnp.where(mask_BTS, scores_BTS, _MASKED), axis=-1)
    # A key that is left out, or whose probability has vanished, adds nothing.
    counted_BTS = mask_BTS & (wanted_BTS > 0)
    log_wanted_BTS = jnp.log(jnp.where(counted_BTS, wanted_BTS, 1.0))
    return jnp.where(counted_BTS, wanted_BTS * (log_wanted_BTS - log_found_BTS), 0.0).sum(axis=-1)
