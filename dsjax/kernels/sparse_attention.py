"""Attention to the keys that an index chooses (DeepSeek sparse attention, V3.2), in plain XLA.

A lightning indexer scores every earlier key for every query; a query attends to the `count` keys of
its highest scores. Choice and attention are separate:

* `select` turns scores into indices, and into which of them are valid: a query with fewer visible
  keys than `count` takes all of them. `chosen` is the same choice as a mask. It sorts nothing, so
  it can be split over devices; of equal scores both take the first keys.
* `masked_attention` multiplies whole sequences and masks what is not chosen: the definition, with
  gradients.
* `gathered_attention` reads the chosen keys only, `latent_attention` does so for whole sequences,
  with gradients, where all heads share keys and values, as they share latents.

Whole sequences run in tiles of queries, and the backward pass recomputes each tile: neither scores
nor masks ever exist for all pairs. Of what is gathered, the indices are kept for it. On the way,
both measure how far the indexer is from the attention that it shall predict (`Lesson`).

What queries gather is theirs alone. Sharing would not pay: if q queries choose independently k of L
keys, they choose together a part 1 - (1 - k / L)^q of them, for k / L of 1 / 16 already 40 % with 8
queries; and no block of 64 keys is ever without a choice.

The choice has no gradient. Papers: V3.2-Exp and V3.2 (arXiv:2512.02556), section 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsjax.kernels.cached_attention import Attended
from dsjax.kernels.flash_attention import Segments
from dsjax.kernels.index_kernel import kernel_scores, takes
from dsjax.kernels.query_tiles import fold_tiles, over_tiles
from dsjax.kernels.target import Target
from dsjax.kernels.varying import vary_as

# Most numbers in the largest array of one tile: 64 MiB of float32.
_MOST = 2**24
# Products of queries' heads and keys that are summed to scores at once, and fewest keys of them: on
# a CPU what fits in the cache of a core.
_MOST_PRODUCTS = {"cpu": 2**17, "accelerator": 2**24}
_FEWEST_KEYS = 1024
# Values that queries gather at once: what fits in the cache of a core, and 64 MiB of float32.
_MOST_GATHERED = {"cpu": 2**19, "accelerator": 2**24}
# Queries of a run in which a device with whole sequences meets the keys up to the run's end.
_MIN_RUN, _MAX_RUNS = 128, 16
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


class Shard(NamedTuple):
    """The part of a sequence's queries, and of their heads, that a device has."""

    places_T: jax.Array  # int32, place in the sequence of each query
    # (queries, keys): the next so many queries come after none but the first so many keys
    runs: tuple[tuple[int, int], ...]
    head_axes: tuple[str, ...] = ()  # mesh axes over which devices have the other heads

    @classmethod
    def whole(cls, length: int) -> Shard:
        """Returns that of a device with whole sequences: queries in order meet the keys up to the
        end of their run.
        """
        size = max(-(-length // _MAX_RUNS // _MIN_RUN) * _MIN_RUN, _MIN_RUN)
        ends = [min(start + size, length) for start in range(0, length, size)]
        runs = tuple((end - start, end) for start, end in zip([0, *ends], ends, strict=False))
        return cls(lax.iota(jnp.int32, length), runs)


def everywhere(mean: jax.Array, head_axes: tuple[str, ...]) -> jax.Array:
    """Averages over all heads what is an average over a device's."""
    return lax.pmean(mean, head_axes) if head_axes else mean


def index_scores(index: Index) -> jax.Array:
    """Returns sum_i w[t, i] * relu(q[t, i] . k[s]), float32 [B, T, S]: V3.2 equation 1.

    A score may be negative, as weights are.
    """
    if index.q_BTIY.shape[1] == 1:
        # The keys come first: after few rows, a CPU's product takes a transposed copy of them.
        products_BSTI = jax.nn.relu(_product("BSY,BTIY->BSTI", index.k_BSY, index.q_BTIY))
        return _product("BSTI,BTI->BTS", products_BSTI, index.w_BTI)
    products_BTIS = jax.nn.relu(_product("BTIY,BSY->BTIS", index.q_BTIY, index.k_BSY))
    return _product("BTI,BTIS->BTS", index.w_BTI, products_BTIS)


class Scoring(NamedTuple):
    """How many queries and keys of each row are scored at once."""

    queries: int
    keys: int


def scored_at_once(target: Target, heads: int, n_queries: int, n_keys: int) -> Scoring:
    """Bounds the products of one tile of queries.

    Args:
      heads: of all rows of a device.
    """
    most = _MOST_PRODUCTS[_memory(target)] // heads
    queries = min(most // _FEWEST_KEYS, _MOST // n_keys, n_queries)
    keys = max(most // max(queries, 1), _FEWEST_KEYS)
    return Scoring(max(queries, 1), min(keys, n_keys))


def scores_in_blocks(
    q_BTIY: jax.Array,
    w_BTI: jax.Array,
    read: Callable[[jax.Array | int, int], jax.Array],
    length: int,
    *,
    size: int,
    n_blocks: jax.Array | int,
) -> jax.Array:
    """Scores keys as `index_scores` does, a block at a time: float32 [B, T, S]. Has no gradient.

    Args:
      read: (first place, number of places) -> keys [B, size, Y].
      length: places that there are.
      size: of a block.
      n_blocks: keys of later blocks get 0; no query may see them.
    """
    if size == length:
        return index_scores(Index(q_BTIY, w_BTI, read(0, length)))

    def score(number: jax.Array, scores_BTS: jax.Array) -> jax.Array:
        # The last block is moved back to end where the keys do.
        start = jnp.minimum(number * size, length - size)
        block_BTX = index_scores(Index(q_BTIY, w_BTI, read(start, size)))
        return lax.dynamic_update_slice_in_dim(scores_BTS, block_BTX, start, axis=2)

    empty_BTS = jnp.zeros((*q_BTIY.shape[:2], length), jnp.float32)
    return lax.fori_loop(0, n_blocks, score, vary_as(empty_BTS, q_BTIY, w_BTI, read(0, size)))


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


def masked_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNW: jax.Array,
    index: Index,
    *,
    count: int,
    scale: float,
    segments: Segments | None = None,
    shard: Shard | None = None,
    lesson: Lesson | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Attends causally from whole sequences to the keys that the index chooses among those that a
    query sees.

    Args:
      count: keys per query.
      segments: a query sees and counts keys of its own segment only; None: all earlier ones.
      shard: which queries these are; None: all, in order.
      lesson: what the indexer learns from; None: nothing.

    Returns:
      attention, [B, T, N, W]; and with a lesson float32 [B, T], the divergence KL(p || softmax(I))
      of each query, where p is the attention's probability of each key, averaged over the heads,
      and I are the index scores, over the keys that take part. Only the index has its gradient.
    """
    shard = shard or Shard.whole(q_BTNH.shape[1])
    of_queries: Any = (q_BTNH, index.q_BTIY, index.w_BTI, segments and segments.q_BT)
    of_keys: Any = (k_BSNH, v_BSNW, index.k_BSY, segments and segments.k_BS)
    B, _, N, _ = q_BTNH.shape

    def attend(queries: Any, keys: Any, seen: int) -> Any:
        tile = functools.partial(
            _tile, keys=keys, count=count, scale=scale, lesson=lesson, head_axes=shard.head_axes
        )
        most = max(_MOST // (max(N, index.w_BTI.shape[2]) * B * seen), 1)
        return over_tiles(tile, queries, most=most)

    return _in_runs(attend, of_queries, of_keys, shard)


def _in_runs(
    attend: Callable[[Any, Any, int], Any], of_queries: Any, of_keys: Any, shard: Shard
) -> Any:
    """Joins attend(queries with their places, keys, number of keys) over the runs of a shard."""
    pieces, start = [], 0
    for length, seen in shard.runs:
        here = slice(start, start + length)
        queries = jax.tree.map(lambda x, here=here: x[:, here], (of_queries, shard.places_T[None]))
        keys = jax.tree.map(lambda x, seen=seen: x[:, :seen], of_keys)
        pieces.append(attend(queries, keys, seen))
        start += length
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces)


def _visible(
    places_1T: jax.Array,
    q_segments_BT: jax.Array | None,
    k_segments_BS: jax.Array | None,
    like_BSX: jax.Array,
) -> jax.Array:
    """Tells which keys, in the order of the sequence, a query may choose: bool [B, T, S]."""
    B, S, _ = like_BSX.shape
    places_11S = lax.broadcasted_iota(jnp.int32, (1, 1, S), 2)
    visible_1TS = places_11S <= places_1T[:, :, None]
    visible_BTS = jnp.broadcast_to(visible_1TS, (B, *visible_1TS.shape[1:]))
    if q_segments_BT is None or k_segments_BS is None:
        return visible_BTS
    return visible_BTS & (q_segments_BT[:, :, None] == k_segments_BS[:, None])


def _tile(
    of_queries: Any,
    *,
    keys: Any,
    count: int,
    scale: float,
    lesson: Lesson | None,
    head_axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array | None]:
    (q_BTNH, index_q_BTIY, w_BTI, q_segments_BT), places_1T = of_queries
    k_BSNH, v_BSNW, index_k_BSY, k_segments_BS = keys
    visible_BTS = _visible(places_1T, q_segments_BT, k_segments_BS, index_k_BSY)
    mask_BTS, index_BTS = visible_BTS, None
    if lesson or count < k_BSNH.shape[1]:
        index_BTS = index_scores(Index(index_q_BTIY, w_BTI, index_k_BSY))
        if lesson != "warmup":
            mask_BTS = chosen(lax.stop_gradient(index_BTS), visible_BTS, count)
    scores_BNTS = _product("BTNH,BSNH->BNTS", q_BTNH, k_BSNH) * scale
    weights_BNTS = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores_BNTS, _MASKED), axis=-1)
    out_BTNW = _product("BNTS,BSNW->BTNW", weights_BNTS.astype(v_BSNW.dtype), v_BSNW)
    divergence_BT = None
    if lesson and index_BTS is not None:
        wanted_BTS = lax.stop_gradient(everywhere(weights_BNTS.mean(axis=1), head_axes))
        divergence_BT = divergence(wanted_BTS, index_BTS, mask_BTS)
    return out_BTNW.astype(q_BTNH.dtype), divergence_BT


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
    weights_BTNJ, highest_BTN1, total_BTN1 = _weights(queries, keys, valid_BTJ, scale)
    out_BTNW = _product("BTNJ,BTJW->BTNW", weights_BTNJ.astype(v_BTJW.dtype), v_BTJW)
    return Attended(out_BTNW.astype(queries[0].dtype), highest_BTN1[..., 0], total_BTN1[..., 0])


def _weights(
    queries: Sequence[jax.Array], keys: Sequence[jax.Array], valid_BTJ: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the probability of each key, float32 [B, T, N, J], and what `Attended` has."""
    products = [
        _product("BTNX,BTJX->BTNJ", q_BTNX, k_BTJX)
        for q_BTNX, k_BTJX in zip(queries, keys, strict=True)
    ]
    scores_BTNJ = jnp.where(valid_BTJ[:, :, None], sum(products) * scale, _MASKED)
    highest_BTN1 = lax.stop_gradient(scores_BTNJ.max(axis=-1, keepdims=True))
    weights_BTNJ = jnp.exp(scores_BTNJ - highest_BTN1)
    total_BTN1 = weights_BTNJ.sum(axis=-1, keepdims=True)
    return weights_BTNJ / total_BTN1, highest_BTN1, total_BTN1


def gathered_at_once(target: Target, values_per_query: int) -> int:
    """Returns how many queries gather their keys together. On a CPU what they gather stays in the
    cache of a core until it is multiplied.
    """
    return max(_MOST_GATHERED[_memory(target)] // values_per_query, 1)


def _memory(target: Target) -> str:
    return "cpu" if target.kind == "cpu" else "accelerator"


def latent_attention(
    q_BTNX: jax.Array,
    kv_BSX: jax.Array,
    index: Index,
    *,
    width: int,
    count: int,
    scale: float,
    target: Target,
    segments: Segments | None = None,
    shard: Shard | None = None,
    lesson: Literal["sparse"] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Computes what `masked_attention` does where all heads share keys and values, and gathers the
    chosen ones instead of masking the others.

    Args:
      kv_BSX: keys; their first `width` channels are the values too.

    Returns:
      as `masked_attention`; W is `width`.
    """
    detached = jax.tree.map(lax.stop_gradient, index)
    kept = (q_BTNX, index.q_BTIY, index.w_BTI) if lesson else (q_BTNX, None, None)
    entries_BSX = jnp.concatenate([kv_BSX, index.k_BSY], axis=-1) if lesson else kv_BSX
    shard = shard or Shard.whole(q_BTNX.shape[1])
    rows = q_BTNX.shape[0]
    sizes = _Sizes(
        key=kv_BSX.shape[-1],
        value=width,
        scale=scale,
        at_once=gathered_at_once(target, rows * count * entries_BSX.shape[-1]),
        head_axes=shard.head_axes,
    )

    def attend(queries: Any, keys: Any, seen: int) -> Any:
        (kept, of_choice), places_1T = queries
        entries, *of_index = keys
        if takes(target, index.w_BTI.shape[2], seen):
            at_once = Scoring(max(_MOST // (rows * seen), 1), seen)
        else:
            T, heads = places_1T.shape[1], rows * index.w_BTI.shape[2]
            at_once = scored_at_once(target, heads, T, seen)
        choose = functools.partial(
            _choose, keys=of_index, count=count, size=at_once.keys, target=target
        )
        selection = over_tiles(choose, (of_choice, places_1T), most=at_once.queries)
        return _attend_chosen(kept, entries, checkpoint_name(selection, "index"), sizes)

    of_choice = (*detached[:2], segments and segments.q_BT)
    of_keys = (entries_BSX, detached.k_BSY, segments and segments.k_BS)
    return _in_runs(attend, (kept, of_choice), of_keys, shard)


class _Sizes(NamedTuple):
    """What `_attend_chosen` must know while it is traced."""

    key: int  # channels of an entry that are the key
    value: int  # and, of these, the value too
    scale: float
    at_once: int
    head_axes: tuple[str, ...]


def _choose(of_queries: Any, *, keys: Any, count: int, size: int, target: Target) -> Selection:
    """Selects keys for a tile of queries, and scores `size` of them at once."""
    (index_q_BTIY, w_BTI, q_segments_BT), places_1T = of_queries
    index_k_BSY, k_segments_BS = keys
    S = index_k_BSY.shape[1]
    if takes(target, w_BTI.shape[2], S):
        scores_BTS = kernel_scores(index_q_BTIY, w_BTI, index_k_BSY, places_1T)
    else:
        scores_BTS = scores_in_blocks(
            index_q_BTIY,
            w_BTI,
            lambda start, size: lax.dynamic_slice_in_dim(index_k_BSY, start, size, axis=1),
            S,
            size=size,
            n_blocks=-(-S // size),
        )
    visible_BTS = _visible(places_1T, q_segments_BT, k_segments_BS, index_k_BSY)
    return select(scores_BTS, visible_BTS, count)


def _attend_few(queries: Any, entries_BTJX: jax.Array, valid_BTJ: jax.Array, sizes: _Sizes) -> Any:
    """Returns attention to gathered entries and, if these hold index keys, the divergence."""
    q_BTNX, index_q_BTIY, w_BTI = queries
    k_BTJX, index_k_BTJY = jnp.split(entries_BTJX, [sizes.key], axis=-1)
    weights_BTNJ, _, _ = _weights((q_BTNX,), (k_BTJX,), valid_BTJ, sizes.scale)
    # All channels: to take the values apart would copy them.
    out_BTNX = _product("BTNJ,BTJX->BTNX", weights_BTNJ.astype(k_BTJX.dtype), k_BTJX)
    divergence_BT = None
    if index_q_BTIY is not None:
        products_BTIJ = jax.nn.relu(_product("BTIY,BTJY->BTIJ", index_q_BTIY, index_k_BTJY))
        scores_BTJ = _product("BTI,BTIJ->BTJ", w_BTI, products_BTIJ)
        wanted_BTJ = lax.stop_gradient(everywhere(weights_BTNJ.mean(axis=2), sizes.head_axes))
        divergence_BT = divergence(wanted_BTJ, scores_BTJ, valid_BTJ)
    return out_BTNX[..., : sizes.value].astype(q_BTNX.dtype), divergence_BT


def _take(entries_BSX: jax.Array, indices_BTJ: jax.Array) -> jax.Array:
    # Mapped over rows, so that each device gathers from its own.
    of_row = jax.vmap(lambda entries_SX, i_TJ: entries_SX.at[i_TJ].get(mode="promise_in_bounds"))
    return of_row(entries_BSX, indices_BTJ)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend_chosen(
    queries: Any, entries_BSX: jax.Array, selection: Selection, sizes: _Sizes
) -> Any:
    """Attends to the selected entries, gathered for a few queries at a time. Its backward pass adds
    to the gradient of the entries in place.
    """
    return _attend_chosen_forward(queries, entries_BSX, selection, sizes)[0]


def _attend_chosen_forward(queries, entries_BSX, selection, sizes):
    def few(_, tile):
        queries, (indices_BtJ, valid_BtJ) = tile
        return None, _attend_few(queries, _take(entries_BSX, indices_BtJ), valid_BtJ, sizes)

    tiles = (queries, selection)
    _, out = fold_tiles(few, None, tiles, most=sizes.at_once)
    return out, (queries, entries_BSX, selection)


def _attend_chosen_backward(sizes, residuals, gradients):
    queries, entries_BSX, selection = residuals

    def few(total_BSX, tile):
        queries, (indices_BtJ, valid_BtJ), gradients = tile
        attend = functools.partial(_attend_few, valid_BTJ=valid_BtJ, sizes=sizes)
        pull = jax.vjp(attend, queries, _take(entries_BSX, indices_BtJ))[1]
        of_queries, of_entries_BtJX = pull(gradients)
        add = jax.vmap(lambda total, i, part: total.at[i].add(part, mode="promise_in_bounds"))
        return add(total_BSX, indices_BtJ, of_entries_BtJX.astype(total_BSX.dtype)), of_queries

    start = jnp.zeros(entries_BSX.shape, jnp.float32)
    start = vary_as(start, *jax.tree.leaves((queries, entries_BSX, selection, gradients)))
    tiles = (queries, selection, gradients)
    total, of_queries = fold_tiles(few, start, tiles, most=sizes.at_once)
    return of_queries, total.astype(entries_BSX.dtype), None


_attend_chosen.defvjp(_attend_chosen_forward, _attend_chosen_backward)


def divergence(wanted_BTS: jax.Array, scores_BTS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Returns KL(wanted || softmax of the scores over the mask), in nats, float32 [B, T]."""
    log_found_BTS = jax.nn.log_softmax(jnp.where(mask_BTS, scores_BTS, _MASKED), axis=-1)
    # A key that is left out, or whose probability has vanished, adds nothing.
    counted_BTS = mask_BTS & (wanted_BTS > 0)
    log_wanted_BTS = jnp.log(jnp.where(counted_BTS, wanted_BTS, 1.0))
    return jnp.where(counted_BTS, wanted_BTS * (log_wanted_BTS - log_found_BTS), 0.0).sum(axis=-1)
