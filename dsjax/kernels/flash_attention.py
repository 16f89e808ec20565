"""Causal attention in plain XLA that never holds the whole score matrix (FlashAttention,
arXiv:2205.14135): two ways through the causal square, one arithmetic.

* `chunked_attention`, for a device with whole sequences: queries come in chunks, and each chunk
  meets all keys up to its own end at once. Half of the square is never computed.
* `tiled_attention`, for a device with some of a sequence's queries and the keys of all of it:
  queries and keys are cut into blocks of one size, and a list says which block of queries meets
  which block of keys. A device that holds queries from the start and the end of a sequence lists as
  many tiles as one that holds two blocks from its middle.

A block of queries carries its highest score, the sum of its weights and the weighted values from
tile to tile (algorithm 1). The backward pass is written down (appendix B): it keeps one number per
query and recomputes each tile's probabilities. Scores, softmax and sums are float32.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsjax.kernels.varying import vary_as

# Small chunks stay in cache and skip more of the square, large ones add up fewer gradients of keys;
# their loop is unrolled, so they are few.
_MIN_CHUNK, _MAX_CHUNKS = 256, 16
_MASKED = -1e30

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Tiles(NamedTuple):
    """What `tiled_attention` computes. Blocks are numbered from the start of the sequence."""

    blocks_I: jax.Array  # int32, the number of each block of queries
    pairs_X2: jax.Array  # int32, index of a block of queries in blocks_I, number of a block of keys


class Segments(NamedTuple):
    """int32 documents of queries and keys; a query sees only the keys of its own."""

    q_BT: jax.Array
    k_BS: jax.Array


class _Softmax(NamedTuple):
    """What a block of queries carries from tile to tile, float32."""

    values: jax.Array  # [B, P, G, T, W], summed by weight
    highest: jax.Array  # score, [B, P, G, T, 1]
    total: jax.Array  # of the weights, relative to the highest score

    @classmethod
    def of(cls, scores_BPGTS: jax.Array, v_BPSW: jax.Array, past: _Softmax | None = None):
        """Adds the keys and values of one tile to those of past tiles, if any."""
        highest = scores_BPGTS.max(axis=-1, keepdims=True)
        if past is not None:
            highest = jnp.maximum(past.highest, highest)
        weights = jnp.exp(scores_BPGTS - highest)
        total = weights.sum(axis=-1, keepdims=True)
        values = _product("BPGTS,BPSW->BPGTW", weights.astype(v_BPSW.dtype), v_BPSW)
        if past is not None:
            shrink = jnp.exp(past.highest - highest)
            values, total = past.values * shrink + values, past.total * shrink + total
        return cls(values, highest, total)

    def result(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Returns the output, and the logarithm of the softmax's denominator."""
        return (self.values / self.total).astype(dtype), self.highest + jnp.log(self.total)


def _scores(q_BPGTH, k_BPSH, q_positions_T, k_positions_S, segments, scale) -> jax.Array:
    """Returns a tile's masked scores, float32; `segments` are those of its queries and keys."""
    scores = _product("BPGTH,BPSH->BPGTS", q_BPGTH, k_BPSH)
    return _masked(scores, q_positions_T, k_positions_S, segments, scale)


def _masked(scores_BPGTS, q_positions_T, k_positions_S, segments, scale) -> jax.Array:
    visible = (k_positions_S[None] <= q_positions_T[:, None])[None, None, None]
    if segments is not None:
        same_BTS = segments.q_BT[:, :, None] == segments.k_BS[:, None]
        visible = visible & same_BTS[:, None, None]
    return jnp.where(visible, scores_BPGTS * scale, _MASKED)


def _gradients(q, k, v, dout, scores, log_sum, mean, scale):
    """Returns one tile's parts of dq, dk and dv, float32.

    Args:
      log_sum: what `_Softmax.result` returned for the queries.
      mean: per query, the sum over all keys of probability times its gradient.
    """
    probabilities = jnp.exp(scores - log_sum)
    dscores = probabilities * (_product("BPGTW,BPSW->BPGTS", dout, v) - mean) * scale
    dscores, probabilities = dscores.astype(q.dtype), probabilities.astype(q.dtype)
    return (
        _product("BPGTS,BPSH->BPGTH", dscores, k),
        _product("BPGTS,BPGTH->BPSH", dscores, q),
        _product("BPGTS,BPGTW->BPSW", probabilities, dout),
    )


def chunked_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    scale: float,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Attends causally; each of P key heads serves N / P consecutive query heads.

    Args:
      segment_ids_BT: int32; a query only sees keys of its own segment. None: all earlier ones.

    Returns:
      [B, T, N, W] in q's dtype.
    """
    B, T, N, H = q_BTNH.shape
    P = k_BTPH.shape[2]
    # Heads first, queries grouped by their key head: the layout of a batched product.
    q_BPGTH = q_BTNH.reshape(B, T, P, N // P, H).transpose(0, 2, 3, 1, 4)
    k_BPTH, v_BPTW = k_BTPH.swapaxes(1, 2), v_BTPW.swapaxes(1, 2)
    out_BPGTW = _chunked(q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, scale)
    return out_BPGTW.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)  # type: ignore


def _chunks(length: int) -> list[slice]:
    size = max(_MIN_CHUNK, -(-length // _MAX_CHUNKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _turned(*arrays: jax.Array) -> Any:
    """Swaps the last two dims, and keeps XLA from doing it to each chunk: a CPU multiplies rows by
    columns as they lie in memory, and copies what lies otherwise.
    """
    return jax.lax.optimization_barrier(tuple(x.swapaxes(-1, -2) for x in arrays))


def _chunk_scores(q_BPGTH, k_BPHT, segment_ids_BT, chunk: slice, scale) -> jax.Array:
    """Scores of a chunk of queries against the keys up to its end."""
    position = jnp.arange(chunk.stop)
    segments = None
    if segment_ids_BT is not None:
        segments = Segments(segment_ids_BT[:, chunk], segment_ids_BT[:, : chunk.stop])
    q, k = q_BPGTH[:, :, :, chunk], k_BPHT[..., : chunk.stop]
    scores = _product("BPGTH,BPHS->BPGTS", q, k)
    return _masked(scores, position[chunk], position, segments, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, scale):
    return _chunked_forward(q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, scale)[0]


def _chunked_forward(q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, scale):
    (k_BPHT,) = _turned(k_BPTH)
    results = []
    for chunk in _chunks(q_BPGTH.shape[3]):
        scores = _chunk_scores(q_BPGTH, k_BPHT, segment_ids_BT, chunk, scale)
        softmax = _Softmax.of(scores, v_BPTW[:, :, : chunk.stop])
        results.append(softmax.result(q_BPGTH.dtype))
    out, log_sum = (jnp.concatenate(parts, axis=3) for parts in zip(*results, strict=True))
    return out, (q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, out, log_sum)


def _chunked_backward(scale, residuals, dout_BPGTW):
    """Does what `_gradients` does, with the gradients of keys and values turned: then no array of
    the size of the scores is.
    """
    q_BPGTH, k_BPTH, v_BPTW, segment_ids_BT, out_BPGTW, log_sum = residuals
    mean = _product("BPGTW,BPGTW->BPGT", dout_BPGTW, out_BPGTW)[..., None]
    k_BPHT, v_BPWT, q_BPGHT, dout_BPGWT = _turned(k_BPTH, v_BPTW, q_BPGTH, dout_BPGTW)
    dq = []
    dk_BPHT, dv_BPWT = (jnp.zeros(x.shape, jnp.float32) for x in (k_BPHT, v_BPWT))
    for chunk in _chunks(q_BPGTH.shape[3]):
        dout, log_sums, means = (x[:, :, :, chunk] for x in (dout_BPGTW, log_sum, mean))
        scores = _chunk_scores(q_BPGTH, k_BPHT, segment_ids_BT, chunk, scale)
        probabilities = jnp.exp(scores - log_sums)
        seen = _product("BPGTW,BPWS->BPGTS", dout, v_BPWT[..., : chunk.stop])
        dscores = (probabilities * (seen - means) * scale).astype(q_BPGTH.dtype)
        probabilities = probabilities.astype(q_BPGTH.dtype)
        dq_chunk = _product("BPGTS,BPSH->BPGTH", dscores, k_BPTH[:, :, : chunk.stop])
        dq.append(dq_chunk.astype(q_BPGTH.dtype))
        dk_chunk = _product("BPGHT,BPGTS->BPHS", q_BPGHT[..., chunk], dscores)
        dk_BPHT = dk_BPHT.at[..., : chunk.stop].add(dk_chunk)
        dv_chunk = _product("BPGWT,BPGTS->BPWS", dout_BPGWT[..., chunk], probabilities)
        dv_BPWT = dv_BPWT.at[..., : chunk.stop].add(dv_chunk)
    # Without the barrier XLA turns the products of a single chunk, by swapping their operands, into
    # ones that its CPU runtime (of jax 0.10) lacks in bfloat16.
    dk_BPHT, dv_BPWT = jax.lax.optimization_barrier((dk_BPHT, dv_BPWT))
    dk, dv = (x.swapaxes(2, 3).astype(k_BPTH.dtype) for x in (dk_BPHT, dv_BPWT))
    return jnp.concatenate(dq, axis=3), dk, dv, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def tiled_attention(
    q_BTNH: jax.Array,
    k_BSPH: jax.Array,
    v_BSPW: jax.Array,
    tiles: Tiles,
    *,
    scale: float,
    segments: Segments | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends causally; each of P key heads serves N / P consecutive query heads.

    Args:
      tiles: must list every pair in which a query may see a key, and none twice.

    Returns:
      [B, T, N, W] in q's dtype; and without gradient the logarithm of the softmax's denominator,
      float32 [B, T, N].
    """
    B, T, N, H = q_BTNH.shape
    P, n_blocks = k_BSPH.shape[2], len(tiles.blocks_I)
    size = T // n_blocks
    q_IBPGtH = q_BTNH.reshape(B, n_blocks, size, P, N // P, H).transpose(1, 0, 3, 4, 2, 5)
    k_JBPsH, v_JBPsW = (
        x.reshape(B, -1, size, P, x.shape[-1]).transpose(1, 0, 3, 2, 4) for x in (k_BSPH, v_BSPW)
    )
    cut = segments and Segments(*(x.reshape(B, -1, size).swapaxes(0, 1) for x in segments))
    attended: Any = _tiled(q_IBPGtH, k_JBPsH, v_JBPsW, cut, tiles, scale)
    out_BTNW, log_sum_BTN1 = (x.transpose(1, 0, 4, 2, 3, 5).reshape(B, T, N, -1) for x in attended)
    return out_BTNW, jax.lax.stop_gradient(log_sum_BTN1[..., 0])


def _tile_scores(q_BPGtH, k_BPsH, segments, tiles: Tiles, pair_2, scale) -> jax.Array:
    (index, number), size = pair_2, k_BPsH.shape[2]
    inside = jnp.arange(size, dtype=jnp.int32)
    if segments is not None:
        segments = Segments(segments.q_BT[index], segments.k_BS[number])
    q_positions, k_positions = tiles.blocks_I[index] * size + inside, number * size + inside
    return _scores(q_BPGtH, k_BPsH, q_positions, k_positions, segments, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _tiled(q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, scale):
    return _tiled_forward(q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, scale)[0]


def _tiled_forward(q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, scale):
    # A mask depends on the tokens alone. JAX would compute those of all tiles once for all layers
    # and keep them, for each head: 22 GB for a row of 36,864 tokens on 4 devices.
    q_IBPGtH, segments, tiles = jax.lax.optimization_barrier((q_IBPGtH, segments, tiles))

    def tile(softmax_I: _Softmax, pair_2):
        index, number = pair_2
        scores = _tile_scores(q_IBPGtH[index], k_JBPsH[number], segments, tiles, pair_2, scale)
        past = _Softmax(*(x[index] for x in softmax_I))
        softmax = _Softmax.of(scores, v_JBPsW[number], past)
        new = (all_.at[index].set(one) for all_, one in zip(softmax_I, softmax, strict=True))
        return _Softmax(*new), None

    rows, width = q_IBPGtH.shape[:-1], v_JBPsW.shape[-1]
    start = [jnp.full((*rows, x), y, jnp.float32) for x, y in ((width, 0), (1, _MASKED), (1, 0))]
    start = (vary_as(x, q_IBPGtH, k_JBPsH, v_JBPsW, tiles.pairs_X2) for x in start)
    softmax_I, _ = jax.lax.scan(tile, _Softmax(*start), tiles.pairs_X2)
    out_IBPGtW, log_sum = softmax_I.result(q_IBPGtH.dtype)
    residuals = q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, out_IBPGtW, log_sum
    return (out_IBPGtW, log_sum), residuals


def _tiled_backward(scale, residuals, gradients):
    dout_IBPGtW, _ = gradients
    q_IBPGtH, k_JBPsH, v_JBPsW, segments, tiles, out_IBPGtW, log_sum = residuals
    mean = _product("IBPGTW,IBPGTW->IBPGT", dout_IBPGtW, out_IBPGtW)[..., None]

    def tile(sums, pair_2):
        index, number = pair_2
        q, dout, log_sums, means = (x[index] for x in (q_IBPGtH, dout_IBPGtW, log_sum, mean))
        k, v = k_JBPsH[number], v_JBPsW[number]
        scores = _tile_scores(q, k, segments, tiles, pair_2, scale)
        parts = _gradients(q, k, v, dout, scores, log_sums, means, scale)
        places = index, number, number
        sums = [x.at[i].add(part) for x, i, part in zip(sums, places, parts, strict=True)]
        return tuple(sums), None

    inputs = (q_IBPGtH, k_JBPsH, v_JBPsW)
    start = [
        vary_as(jnp.zeros(x.shape, jnp.float32), *inputs, dout_IBPGtW, tiles.pairs_X2)
        for x in inputs
    ]
    gradients, _ = jax.lax.scan(tile, tuple(start), tiles.pairs_X2)
    gradients = (dx.astype(x.dtype) for dx, x in zip(gradients, inputs, strict=True))
    return *gradients, None, None


_tiled.defvjp(_tiled_forward, _tiled_backward)
