"""Attention of DeepSeek-V4: to the last tokens and to compressed entries of all earlier ones, in
XLA.

All heads share one vector per token or entry, which is key and value at once. One softmax spans
both kinds and a sink, a learned score per head that has no value. A query sees an entry once all of
the entry's tokens are at or before it, so the newest tokens are seen one by one only; tokens that
are in the window and in an entry are seen twice.

With an index, a query attends to the entries of the highest scores among those that it sees:
`sparse_attention.select` gathers them, `sparse_attention.chosen` masks the others.

A query's own document begins at `first`; nothing crosses the border of a packed document.

Letter besides the package's: Z compressed entries.

V4 report section 2.3, as transformers 5.24 computes it.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.kernels import sparse_attention
from dsjax.kernels.native_sparse import Stack
from dsjax.kernels.query_tiles import over_tiles
from dsjax.kernels.sparse_attention import Index

# Most numbers in the largest array of one tile of queries: 64 MiB of float32.
_MOST = 2**24
# Up to this many times the chosen entries are masked, more gathered: a product reads an entry once
# for many queries, a gather once for each.
_DENSE = 8
_MASKED = -1e30

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Places(NamedTuple):
    """Where queries are, int32 [B, T]."""

    own_BT: jax.Array  # place of each query in its row; consecutive
    first_BT: jax.Array  # place at which its document begins


class IndexQueries(NamedTuple):
    """The queries' side of an index."""

    q_BTIY: jax.Array
    w_BTI: jax.Array  # float32, all constant factors included


class Entries(NamedTuple):
    """Compressed entries, one head."""

    stack: Stack
    begins_BZ: jax.Array  # int32, place of each one's first token; negative: no entry
    ratio: int  # tokens of each
    keys: Stack | None = None  # of the index; None: a query attends to all that it sees
    topk: int = 0  # most entries that a query attends to, with an index


def attend(
    q_BTNH: jax.Array,
    places: Places,
    tokens: Stack,
    entries: Entries | None,
    index: IndexQueries | None,
    sink_N: jax.Array,
    *,
    window: int,
    scale: float,
) -> jax.Array:
    """Attends to the last `window` tokens and to entries: [B, T, N, H].

    Args:
      tokens: key and value of each token, one head.
      entries: None: there are none.
      index: of `entries.keys`.
      sink_N: float32.
    """
    B, T, N, H = q_BTNH.shape
    keys, gathered, heads = min(window, tokens.length), False, N
    if entries is not None:
        Z = entries.stack.length
        heads = N if index is None else max(N, index.w_BTI.shape[-1])
        chooses = entries.keys is not None and entries.topk < Z
        gathered = chooses and (T == 1 or Z > _DENSE * entries.topk)
        keys += max(Z, entries.topk * -(-H // N)) if gathered else Z
    tile = functools.partial(
        _tile,
        tokens=tokens,
        entries=entries,
        sink_N=sink_N,
        window=window,
        scale=scale,
        gathered=gathered,
    )
    # A tile reads as many tokens as it has queries, besides a window.
    each = _MOST // (B * heads)
    most = max(min(each // keys, math.isqrt(each)), 1)
    return over_tiles(tile, (q_BTNH, places, index), most=most)


def _tile(
    of_queries: tuple[jax.Array, Places, IndexQueries | None],
    *,
    tokens: Stack,
    entries: Entries | None,
    sink_N: jax.Array,
    window: int,
    scale: float,
    gathered: bool,
) -> jax.Array:
    q_BTNH, places, index = of_queries
    near_BSH, near_BTS = recent(places, tokens, window)
    scores = [_scores(q_BTNH, near_BSH, near_BTS, scale)]
    values = [near_BSH]
    if entries is not None:
        seen_BTZ = visible(places, entries)
        if gathered:
            assert index is not None
            entry, seen_BTZ = _gathered(index, entries, seen_BTZ)
        else:
            entry = entries.stack.whole()[:, 0]
            if index is not None and entries.topk < entries.stack.length:
                seen_BTZ = sparse_attention.chosen(_index(index, entries), seen_BTZ, entries.topk)
        scores.append(_scores(q_BTNH, entry, seen_BTZ, scale))
        values.append(entry)
    weights = _softmax(scores, sink_N)
    mixed = sum(_mix(w, v) for w, v in zip(weights, values, strict=True))
    return jnp.asarray(mixed).astype(q_BTNH.dtype)


def recent(places: Places, tokens: Stack, window: int) -> tuple[jax.Array, jax.Array]:
    """Reads what consecutive queries may see of the tokens themselves: [B, S, H]; and tells which
    of it each one sees, bool [B, T, S].
    """
    T, length = places.own_BT.shape[1], tokens.length
    size = min(T + window - 1, length)
    begin_B1 = jnp.clip(places.own_BT[:, :1] - window + 1, 0, length - size)
    places_BS = begin_B1 + lax.iota(jnp.int32, size)[None]
    age_BTS = places.own_BT[:, :, None] - places_BS[:, None]
    own_BTS = places_BS[:, None] >= places.first_BT[:, :, None]
    return tokens.take(places_BS[:, None])[:, 0], (age_BTS >= 0) & (age_BTS < window) & own_BTS


def visible(places: Places, entries: Entries) -> jax.Array:
    """Tells which entries are of a query's document and complete at its place: bool [B, T, Z]."""
    begins_B1Z = entries.begins_BZ[:, None]
    complete_BTZ = begins_B1Z + entries.ratio - 1 <= places.own_BT[:, :, None]
    own_BTZ = begins_B1Z >= places.first_BT[:, :, None]
    return complete_BTZ & own_BTZ & (begins_B1Z >= 0)


def _index(index: IndexQueries, entries: Entries) -> jax.Array:
    assert entries.keys is not None
    keys_BZY = entries.keys.whole()[:, 0]
    return sparse_attention.index_scores(Index(index.q_BTIY, index.w_BTI, keys_BZY))


def _gathered(
    index: IndexQueries, entries: Entries, seen_BTZ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Reads the chosen entries of each query, [B, T, J, H]; and tells which are valid."""
    chosen = sparse_attention.select(_index(index, entries), seen_BTZ, entries.topk)
    return entries.stack.take(chosen.indices_BTJ[:, None])[:, 0], chosen.valid_BTJ


def _scores(q_BTNH: jax.Array, keys: jax.Array, seen_BTS: jax.Array, scale: float) -> jax.Array:
    """Returns float32 [B, T, N, S], given keys [B, S, H] or, of each query its own,
    [B, T, S, H].
    """
    shared = keys.ndim == 3
    scores = _product("BTNH,BSH->BTNS" if shared else "BTNH,BTSH->BTNS", q_BTNH, keys) * scale
    return jnp.where(seen_BTS[:, :, None], scores, _MASKED)


def _softmax(scores: list[jax.Array], sink_N: jax.Array) -> list[jax.Array]:
    """Softmax over the last dims of all scores and the sink, whose own weight is left out. A query
    always sees its own token.
    """
    sink_BTN1 = jnp.broadcast_to(sink_N[None, None, :, None], (*scores[0].shape[:3], 1))
    # The softmax does not depend on it.
    highest = lax.stop_gradient(
        functools.reduce(
            jnp.maximum, (each.max(axis=-1, keepdims=True) for each in scores), sink_BTN1
        )
    )
    weights = [jnp.exp(each - highest) for each in scores]
    total = sum(
        (each.sum(axis=-1, keepdims=True) for each in weights), jnp.exp(sink_BTN1 - highest)
    )
    return [each / total for each in weights]


def _mix(weights_BTNS: jax.Array, values: jax.Array) -> jax.Array:
    """Sums values by weight: float32 [B, T, N, H]; values as keys in `_scores`."""
    shared = values.ndim == 3
    equation = "BTNS,BSH->BTNH" if shared else "BTNS,BTSH->BTNH"
    return _product(equation, weights_BTNS.astype(values.dtype), values)
