"""Attention of a few new tokens to a long cache that holds them and all earlier tokens.

`read` fetches the cached positions in blocks, so that what is derived from the cache (MLA's
expanded keys) exists for one block at a time, and so does the score matrix. A running maximum and
sum join the blocks (FlashAttention, arXiv:2205.14135, algorithm 1). Blocks that no query can see
are not read. Scores and softmax are float32.

A score may be a sum of several products (MLA has one without position and one of rotated channels).
Each product has its own key heads, so operands need not be concatenated.

A device may hold a `Part` of the positions only. Then its result counts for as much as its keys'
share of the softmax (`Attended`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.kernels.target import Target
from dsjax.kernels.varying import vary_as

# Most scores of one block, over rows, heads, queries and positions: 64 MiB of float32.
_MAX_SCORES = 2**24
_MIN_BLOCK = 128
_MANY = 16  # queries: a chunk of a prompt, where fewer are a step of decoding
_LONG_BLOCK = 512  # of a chunk that is shorter
_CPU_BLOCK = 2048  # of a step, over all rows: the keys, read twice, stay in a core's cache
_MASKED = -1e30


class Block(NamedTuple):
    """Keys and values of some cached positions; keys are one array per product of a score.

    Each of P key heads serves N / P consecutive query heads; P may differ between arrays.
    """

    keys: tuple[jax.Array, ...]  # [B, P, S, X] each
    values: jax.Array  # [B, P, S, W]


class Part(NamedTuple):
    """Which positions an array of cached ones holds: number `rank`, and every `n_parts`-th from
    there on.
    """

    rank: jax.Array | int = 0
    n_parts: int = 1

    def position(self, index: jax.Array) -> jax.Array:
        """Returns the position that each place of the array holds."""
        return index * jnp.int32(self.n_parts) + self.rank


WHOLE = Part()


class Attended(NamedTuple):
    """Values summed by their weights in a softmax over some keys, and what it takes to join them
    with those of other keys. Of no visible key, `out` is finite and the highest score as low as
    scores are.
    """

    out_BTNW: jax.Array
    highest_BTN: jax.Array  # score, float32
    total_BTN: jax.Array  # of the exponentials of scores less the highest, float32


Read = Callable[[jax.Array | int, int], Block]  # (first position, number of positions)


def cached_attention(
    queries: tuple[jax.Array, ...],
    read: Read,
    length: int,
    positions_BT: jax.Array,
    *,
    scale: float,
    target: Target,
    part: Part = WHOLE,
) -> Attended:
    """Attends to the cached positions up to each query's own.

    Args:
      queries: [B, T, N, X] each, one per product.
      read: takes places in the cache, which are positions unless it holds a part of them.
      length: places of the cache, unwritten ones included.
      positions_BT: int32 position of each query.

    Returns:
      `out` in the queries' dtype.
    """
    B, T, N, _ = queries[0].shape
    size = _block_size(queries[0], length, target)
    queries = tuple(q.swapaxes(1, 2) for q in queries)
    if size == length:
        block = read(0, length)
        scores = _scores(queries, block.keys, 0, positions_BT, scale, part)
        highest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis=-1, keepdims=True)
        out = _mix(weights / total, block.values)
        return _attended(out.astype(queries[0].dtype), highest, total)

    def join(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        highest, total, out = carry
        # The last block is moved back to end where the cache does; what it repeats is masked.
        start = jnp.minimum(index * size, length - size)
        block = read(start, size)
        scores = _scores(queries, block.keys, start, positions_BT, scale, part, index * size)
        new_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_highest)
        shrink = jnp.exp(highest - new_highest)
        total = total * shrink + weights.sum(axis=-1, keepdims=True)
        return new_highest, total, out * shrink + _mix(weights, block.values)

    width = jax.eval_shape(lambda: read(0, size)).values.shape[-1]
    start = (
        jnp.full((B, N, T, 1), _MASKED, jnp.float32),
        jnp.zeros((B, N, T, 1), jnp.float32),
        jnp.zeros((B, N, T, width), jnp.float32),
    )
    start = jax.tree.map(lambda x: vary_as(x, jnp.asarray(part.rank)), start)
    # Equally many on all devices that hold parts: what a block needs may be gathered from others.
    n_blocks = positions_BT.max() // (part.n_parts * size) + 1
    highest, total, out = lax.fori_loop(0, n_blocks, join, start)
    # The total is at least 1: the highest score's own weight.
    return _attended((out / total).astype(queries[0].dtype), highest, total)


def in_blocks(attend: Callable[[jax.Array], Attended], n_blocks: jax.Array | int) -> Attended:
    """Attends to blocks of keys, one after the other.

    Args:
      attend: takes the number of a block.
      n_blocks: at least 1.
    """

    def wide(attended: Attended) -> Attended:
        return attended._replace(out_BTNW=attended.out_BTNW.astype(jnp.float32))

    def join(index: jax.Array, past: Attended) -> Attended:
        new = wide(attend(index))
        highest_BTN = jnp.maximum(past.highest_BTN, new.highest_BTN)
        past_BTN, new_BTN = (
            each.total_BTN * jnp.exp(each.highest_BTN - highest_BTN) for each in (past, new)
        )
        total_BTN = past_BTN + new_BTN
        out_BTNW = past.out_BTNW * (past_BTN / total_BTN)[..., None]
        out_BTNW = out_BTNW + new.out_BTNW * (new_BTN / total_BTN)[..., None]
        return Attended(out_BTNW, highest_BTN, total_BTN)

    first = attend(jnp.int32(0))
    joined = lax.fori_loop(1, n_blocks, join, wide(first))
    return joined._replace(out_BTNW=joined.out_BTNW.astype(first.out_BTNW.dtype))


def _attended(out_BNTW: jax.Array, highest_BNT1: jax.Array, total_BNT1: jax.Array) -> Attended:
    return Attended(
        out_BNTW.swapaxes(1, 2), *(x[..., 0].swapaxes(1, 2) for x in (highest_BNT1, total_BNT1))
    )


def _block_size(q_BTNX: jax.Array, length: int, target: Target) -> int:
    """Returns the positions per block: a power of two within the bound on scores, or all."""
    B, T, N, _ = q_BTNX.shape
    most = max(_MAX_SCORES // (B * T * N), _MIN_BLOCK)
    if T >= _MANY:  # for whom positions that nobody sees, up to half a cache, are work
        most = min(most, max(T, _LONG_BLOCK))
    elif target.kind == "cpu":
        most = min(most, max(_CPU_BLOCK // B, _MIN_BLOCK))
    return min(2 ** (most.bit_length() - 1), length)


def _scores(
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    start: jax.Array | int,
    positions_BT: jax.Array,
    scale: float,
    part: Part,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Returns masked scores [B, N, T, S] of queries [B, N, T, X] against the places from `start`
    on; those before `first` are masked too.
    """
    products = []
    for q_BNTX, k_BPSX in zip(queries, keys, strict=True):
        grouped = _group(q_BNTX, k_BPSX.shape[1])
        products.append(_product(grouped, k_BPSX, q_BNTX.shape[2]).reshape(*q_BNTX.shape[:3], -1))
    index_11S = (start + jnp.arange(keys[0].shape[2], dtype=jnp.int32))[None, None]
    visible_BTS = part.position(index_11S) <= positions_BT[:, :, None]
    visible_BTS = visible_BTS & (index_11S >= first)
    return jnp.where(visible_BTS[:, None], sum(products) * scale, _MASKED)


def _product(q_BPMX: jax.Array, k_BPSX: jax.Array, n_queries: int) -> jax.Array:
    """Returns the products of queries and keys, float32 [B, P, M, S]."""
    if n_queries >= _MANY:
        return jnp.einsum("BPMX,BPSX->BPMS", q_BPMX, k_BPSX, preferred_element_type=jnp.float32)
    # A CPU copies what it needs transposed: here the scores of few queries instead of the keys.
    product = jnp.einsum("BPSX,BPMX->BPSM", k_BPSX, q_BPMX, preferred_element_type=jnp.float32)
    return product.swapaxes(2, 3)


def _mix(weights_BNTS: jax.Array, v_BPSW: jax.Array) -> jax.Array:
    """Sums values by weight: float32 [B, N, T, W]."""
    grouped = _group(weights_BNTS.astype(v_BPSW.dtype), v_BPSW.shape[1])
    out = jnp.einsum("BPMS,BPSW->BPMW", grouped, v_BPSW, preferred_element_type=jnp.float32)
    return out.reshape(*weights_BNTS.shape[:3], -1)


def _group(x_BNTX: jax.Array, heads: int) -> jax.Array:
    """Stacks the queries that share a key head: [B, P, N / P * T, X]."""
    B, N, T, X = x_BNTX.shape
    return x_BNTX.reshape(B, heads, N // heads * T, X)
