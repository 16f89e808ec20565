"""Causal attention of some of a sequence's queries to the keys of all of it, tile by tile.

Queries and keys are cut into blocks of one size, and a list says which block of queries meets which
block of keys. Whoever writes the list decides what is computed: a device that holds queries from
the beginning and the end of a sequence lists as many tiles as one that holds two from its middle.
One tile's scores exist at a time; each block of queries carries its highest score and the sum of
its weights from tile to tile, in float32 (FlashAttention, arXiv:2205.14135, algorithm 1). The
backward pass walks the same list.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsjax.kernels.varying import vary_as

_MASKED = -1e30


class Tiles(NamedTuple):
    """What is computed. Blocks are numbered from the beginning of the sequence."""

    blocks_I: jax.Array  # int32, the number of each block of queries
    pairs_X2: jax.Array  # int32, place of a block of queries in blocks_I, number of a block of keys


class Segments(NamedTuple):
    """int32 documents of queries and keys; a query sees those of its own alone."""

    q_BT: jax.Array
    k_BS: jax.Array


def tiled_attention(
    q_BTNH: jax.Array,
    k_BSPH: jax.Array,
    v_BSPW: jax.Array,
    tiles: Tiles,
    *,
    scale: float,
    segments: Segments | None = None,
) -> jax.Array:
    """Attends causally; each of P key heads serves N / P consecutive query heads.

    Args:
      tiles: every pair of which a query may see a key must be listed, and none twice.

    Returns:
      [B, T, N, W] in q's dtype.
    """
    B, T, N, H = q_BTNH.shape
    P, n_blocks = k_BSPH.shape[2], len(tiles.blocks_I)
    size = T // n_blocks
    q_IBPGtH = q_BTNH.reshape(B, n_blocks, size, P, N // P, H).transpose(1, 0, 3, 4, 2, 5)
    k_JBPsH, v_JBPsW = (
        x.reshape(B, -1, size, P, x.shape[-1]).transpose(1, 0, 3, 2, 4) for x in (k_BSPH, v_BSPW)
    )
    cut = segments and Segments(*(x.reshape(B, -1, size).swapaxes(0, 1) for x in segments))
    return _join(_attention(q_IBPGtH, k_JBPsH, v_JBPsW, cut, tiles, scale))


def _join(out_IBPGtW):
    n_blocks, B, P, G, size, W = out_IBPGtW.shape
    return out_IBPGtW.transpose(1, 0, 4, 2, 3, 5).reshape(B, n_blocks * size, P * G, W)


def _scores(q_BPGtH, k_BPsH, segments, tiles: Tiles, pair_2, scale: float) -> jax.Array:
    """Masked float32 scores of one tile."""
    (place, number), size = pair_2, k_BPsH.shape[2]
    scores = jnp.einsum("BPGtH,BPsH->BPGts", q_BPGtH, k_BPsH, preferred_element_type=jnp.float32)
    inside = jnp.arange(size, dtype=jnp.int32)
    q_t, k_s = tiles.blocks_I[place] * size + inside, number * size + inside
    visible = (k_s[None] <= q_t[:, None])[None, None, None]
    if segments is not None:
        same_Bts = segments.q_BT[place][:, :, None] == segments.k_BS[number][:, None]
        visible = visible & same_Bts[:, None, None]
    return jnp.where(visible, scores * scale, _MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, scale):
    return _attention_forward(q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, scale)[0]


def _attention_forward(q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, scale):
    rows = q_IBPGtH.shape[:-1]

    def tile(carry, pair_2):
        out, highest, total = carry
        place, number = pair_2
        v_BPsW = v_JBPsW[number]
        scores = _scores(q_IBPGtH[place], k_JBPsH[number], segments, tiles, pair_2, scale)
        now = jnp.maximum(highest[place], scores.max(axis=-1, keepdims=True))
        weights, before = jnp.exp(scores - now), jnp.exp(highest[place] - now)
        values = jnp.einsum(
            "BPGts,BPsW->BPGtW",
            weights.astype(v_BPsW.dtype),
            v_BPsW,
            preferred_element_type=jnp.float32,
        )
        out = out.at[place].set(out[place] * before + values)
        total = total.at[place].set(total[place] * before + weights.sum(axis=-1, keepdims=True))
        return (out, highest.at[place].set(now), total), None

    start = (
        jnp.zeros((*rows, v_JBPsW.shape[-1]), jnp.float32),
        jnp.full((*rows, 1), _MASKED, jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
    )
    start = tuple(vary_as(x, q_IBPGtH, k_JBPsH, v_JBPsW, tiles.pairs_X2) for x in start)
    (out, highest, total), _ = jax.lax.scan(tile, start, tiles.pairs_X2)
    out_IBPGtW = (out / total).astype(q_IBPGtH.dtype)
    log_sum = highest + jnp.log(total)
    return out_IBPGtW, (q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, out_IBPGtW, log_sum)


def _attention_backward(scale, residuals, dout_IBPGtW):
    q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, out_IBPGtW, log_sum_IBPGt1 = residuals
    compute = q_IBPGtH.dtype
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # sum over keys of probability times its gradient
    mean_IBPGt1 = product("IBPGtW,IBPGtW->IBPGt", dout_IBPGtW, out_IBPGtW)[..., None]

    def tile(carry, pair_2):
        dq, dk, dv = carry
        place, number = pair_2
        q, dout, k, v = q_IBPGtH[place], dout_IBPGtW[place], k_JBPsH[number], v_JBPsW[number]
        scores = _scores(q, k, segments, tiles, pair_2, scale)
        probabilities = jnp.exp(scores - log_sum_IBPGt1[place])
        dprobabilities = product("BPGtW,BPsW->BPGts", dout, v)
        dscores = probabilities * (dprobabilities - mean_IBPGt1[place]) * scale
        dscores, probabilities = dscores.astype(compute), probabilities.astype(compute)
        dq = dq.at[place].add(product("BPGts,BPsH->BPGtH", dscores, k))
        dk = dk.at[number].add(product("BPGts,BPGtH->BPsH", dscores, q))
        dv = dv.at[number].add(product("BPGts,BPGtW->BPsW", probabilities, dout))
        return (dq, dk, dv), None

    inputs = (q_IBPGtH, k_JBPsH, v_JBPsW)
    start = [
        vary_as(jnp.zeros(x.shape, jnp.float32), *inputs, dout_IBPGtW, tiles.pairs_X2)
        for x in inputs
    ]
    gradients, _ = jax.lax.scan(tile, tuple(start), tiles.pairs_X2)
    gradients = (dx.astype(x.dtype) for dx, x in zip(gradients, inputs, strict=True))
    return *gradients, None, None


_attention.defvjp(_attention_forward, _attention_backward)
