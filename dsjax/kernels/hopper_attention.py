"""Causal attention within documents for Hopper GPUs (H100, H200), in Triton (FlashAttention-2,
arXiv:2307.08691): scores stay in registers, and keys of earlier documents are not read.

Three kernels. A program owns a block of queries (output; their gradient) or a block of keys (their
gradients), and walks over the blocks of the other side. Nothing is added up between programs, so
results are the same in every run. A query keeps one number for the backward pass.

Where a program starts or ends is read from a table: the first block of keys, or the last of
queries, that may share a document with its own. Blocks may if the ranges of their ids meet, which
is true of any two that do share one, whatever the ids are. Masks hide the other documents in them.

Sides of Triton's arrays are powers of two. So a width such as MLA's 192 is taken in two pieces of
128 and 64, whose products are added up, and nothing is filled up.

Scores, softmax and sums are float32; exponentials are of base two, which a GPU has.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.few_rows import whole
from dsjax.kernels.target import Target
from dsjax.kernels.varying import by_hand, shipped_promotion

_OWN, _STEP = 128, 64  # tokens that a program owns; that it reads at once
_NARROWEST = 16  # a matrix unit's depth
_WIDEST = 192, 128  # queries and values that shared memory and registers hold
_LOG2_E = math.log2(math.e)
_MASKED = -1e30
_PARAMETERS = triton.CompilerParams(num_warps=8, num_stages=2)


def fits(
    q_BTNH: jax.Array | jax.ShapeDtypeStruct,
    v_BTPW: jax.Array | jax.ShapeDtypeStruct,
    target: Target,
) -> bool:
    """Returns whether the kernels take operands of these types and shapes here: two-byte types,
    whole blocks of tokens, widths in multiples of 16 up to MLA's 192 and 128, and no mesh axis
    left to the compiler.
    """
    widths = q_BTNH.shape[-1], v_BTPW.shape[-1]
    return (
        target.is_hopper
        and by_hand()
        and q_BTNH.dtype in (jnp.bfloat16, jnp.float16)
        and q_BTNH.shape[1] % _OWN == 0
        and all(
            width % _NARROWEST == 0 and width <= most
            for width, most in zip(widths, _WIDEST, strict=True)
        )
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def document_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    segment_ids_BT: jax.Array,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Attends causally; each of P key heads serves N / P consecutive query heads.

    Args:
      segment_ids_BT: int32; a query only sees keys of its own segment.
      interpret: whether to interpret the kernels, on any machine.

    Returns:
      [B, T, N, W] in q's dtype.
    """
    return _forward(q_BTNH, k_BTPH, v_BTPW, segment_ids_BT, scale, interpret)[0]


def _forward(q_BTNH, k_BTPH, v_BTPW, segment_ids_BT, scale, interpret):
    B, T, N, _ = q_BTNH.shape
    out = jax.ShapeDtypeStruct((B, T, N, v_BTPW.shape[-1]), q_BTNH.dtype)
    log_sums = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    launch = _Launch("document_attention", N, scale, interpret)
    operands = (_first_blocks(segment_ids_BT), segment_ids_BT, q_BTNH, k_BTPH, v_BTPW)
    out_BTNW, log_sums_BNT = launch(_attend, operands, (out, log_sums))
    return out_BTNW, (q_BTNH, k_BTPH, v_BTPW, segment_ids_BT, out_BTNW, log_sums_BNT)


def _backward(scale, interpret, residuals, dout_BTNW):
    q_BTNH, k_BTPH, v_BTPW, segment_ids_BT, out_BTNW, log_sums_BNT = residuals
    inputs = segment_ids_BT, q_BTNH, k_BTPH, v_BTPW
    launch = _Launch("document_attention_queries", q_BTNH.shape[2], scale, interpret)
    operands = (_first_blocks(segment_ids_BT), *inputs, out_BTNW, log_sums_BNT, dout_BTNW)
    dq_BTNH, means_BNT = launch(_query_gradient, operands, (q_BTNH, log_sums_BNT))
    launch = _Launch("document_attention_keys", k_BTPH.shape[2], scale, interpret)
    operands = (_last_blocks(segment_ids_BT), *inputs, log_sums_BNT, dout_BTNW, means_BNT)
    dk_BTPH, dv_BTPW = launch(_key_gradients, operands, (k_BTPH, v_BTPW))
    return dq_BTNH, dk_BTPH, dv_BTPW, None


document_attention.defvjp(_forward, _backward)


def _may_share(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns which blocks of `_OWN` and of `_STEP` tokens may share a segment: [B, own, step]."""
    # A token of -s lies in document s.
    ids_BT = jnp.abs(segment_ids_BT)

    def ranges(size: int) -> tuple[jax.Array, jax.Array]:
        ids_BXt = ids_BT.reshape(len(ids_BT), -1, size)
        return ids_BXt.min(axis=-1), ids_BXt.max(axis=-1)

    (low, high), (step_low, step_high) = ranges(_OWN), ranges(_STEP)
    return (low[:, :, None] <= step_high[:, None]) & (step_low[:, None] <= high[:, :, None])


def _first_blocks(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns the first block of keys for each block of queries: int32 [B, own]."""
    return jnp.argmax(_may_share(segment_ids_BT), axis=-1).astype(jnp.int32)


def _last_blocks(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns one past the last block of queries for each block of keys: int32 [B, own]."""
    shares = _may_share(segment_ids_BT)
    return shares.shape[-1] - jnp.argmax(shares[..., ::-1], axis=-1).astype(jnp.int32)


class _Launch(NamedTuple):
    """A kernel's start: a program for each block that is owned, of each head of each row."""

    name: str
    heads: int  # of those that own
    scale: float
    interpret: bool

    def __call__(self, kernel: Any, operands: Sequence[jax.Array], results: Sequence[Any]) -> Any:
        """Runs a kernel on its table, segment ids, and arrays [B, T, heads, X] and [B, heads, T];
        results are arrays of such shapes.
        """
        table_BX = operands[0]
        results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results]
        with shipped_promotion():
            return pl.pallas_call(
                functools.partial(kernel, scale=self.scale),
                out_shape=results,
                grid=(table_BX.shape[1], self.heads, len(table_BX)),
                in_specs=[whole(table_BX), *map(self._of_head, operands[1:])],
                out_specs=[*map(self._of_head, results)],
                compiler_params=_PARAMETERS,
                name=self.name,
                interpret=self.interpret,
            )(*operands)

    def _of_head(self, x: jax.Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        """Returns what a program has of an array: [T], or of the heads that belong to its own [T,
        heads, X] or [heads, T].
        """
        if x.ndim == 2:
            return pl.BlockSpec((None, x.shape[1]), lambda block, head, row: (row, 0))
        count = x.shape[2] if x.ndim == 4 else x.shape[1]
        # A key's head serves several of queries.
        own, shared = max(count // self.heads, 1), max(self.heads // count, 1)
        if x.ndim == 4:
            size = None, x.shape[1], own, x.shape[3]
            return pl.BlockSpec(size, lambda block, head, row: (row, 0, lax.div(head, shared), 0))
        size = None, own, x.shape[2]
        return pl.BlockSpec(size, lambda block, head, row: (row, lax.div(head, shared), 0))


class _Tokens(NamedTuple):
    """A block of a row."""

    span: Any
    places: jax.Array
    ids: jax.Array

    @classmethod
    def of(cls, segments: Any, block: jax.Array, size: int) -> _Tokens:
        span = pl.ds(block * size, size)
        return cls(span, block * size + lax.iota(jnp.int32, size), segments[span])


def _attend(table, segments, q, k, v, out, log_sums, *, scale: float) -> None:
    block = pl.program_id(0)
    own = _Tokens.of(segments, block, _OWN)
    q_QH = _read(q, own)

    def attend(turn, found):
        highest_Q, total_Q, sums_QW = found
        keys = _Tokens.of(segments, turn, _STEP)
        scores_QK = _scores(q_QH, _read(k, keys), scale)
        scores_QK = jnp.where(_visible(own, keys), scores_QK, _MASKED)
        new_Q = jnp.maximum(highest_Q, scores_QK.max(axis=1))
        weights_QK = jnp.exp2(scores_QK - new_Q[:, None])
        shrink_Q = jnp.exp2(highest_Q - new_Q)
        sums_QW = [x * shrink_Q[:, None] for x in sums_QW]
        total_Q = total_Q * shrink_Q + weights_QK.sum(axis=1)
        return new_Q, total_Q, _added(sums_QW, weights_QK.astype(q.dtype), _read(v, keys))

    start = (
        jnp.full((_OWN,), _MASKED, jnp.float32),
        jnp.zeros((_OWN,), jnp.float32),
        _zeros(v),
    )
    # The last block of keys holds each query itself. It wipes out what a query whose document
    # starts later took from a block without visible keys.
    end = (block + 1) * (_OWN // _STEP)
    highest_Q, total_Q, sums_QW = lax.fori_loop(_of_table(table), end, attend, start)
    _write(out, own, [x / total_Q[:, None] for x in sums_QW])
    log_sums[0, own.span] = highest_Q + jnp.log(total_Q) * _LOG2_E


def _query_gradient(
    table, segments, q, k, v, out, log_sums, dout, *results, scale: float
) -> None:  # fmt: skip
    (dq, means), block = results, pl.program_id(0)
    own = _Tokens.of(segments, block, _OWN)
    q_QH, dout_QW, log_sum_Q = _read(q, own), _read(dout, own), log_sums[0, own.span]
    mean_Q = jnp.zeros((_OWN,), jnp.float32)
    for one, other in zip(dout_QW, _read(out, own), strict=True):
        mean_Q += (one.astype(jnp.float32) * other.astype(jnp.float32)).sum(axis=1)
    means[0, own.span] = mean_Q

    def add(turn, sums_QH):
        keys = _Tokens.of(segments, turn, _STEP)
        k_KH = _read(k, keys)
        scores_QK = _scores(q_QH, k_KH, scale)
        scores_QK = jnp.where(_visible(own, keys), scores_QK, _MASKED)
        weights_QK = jnp.exp2(scores_QK - log_sum_Q[:, None])
        dscores_QK = weights_QK * (_product(dout_QW, _read(v, keys)) - mean_Q[:, None])
        return _added(sums_QH, dscores_QK.astype(q.dtype), k_KH)

    end = (block + 1) * (_OWN // _STEP)
    sums_QH = lax.fori_loop(_of_table(table), end, add, _zeros(q))
    _write(dq, own, [x * scale for x in sums_QH])


def _key_gradients(
    table, segments, q, k, v, log_sums, dout, means, *results, scale: float
) -> None:  # fmt: skip
    """Tiles are turned, keys by queries: so weights are what their products take."""
    (dk, dv), block = results, pl.program_id(0)
    own = _Tokens.of(segments, block, _OWN)
    k_KH, v_KW = _read(k, own), _read(v, own)

    def add(head, turn, sums):
        sums_KH, sums_KW = sums
        queries = _Tokens.of(segments, turn, _STEP)
        q_QH, dout_QW = _read(q, queries, head), _read(dout, queries, head)
        scores_KQ = _scores(k_KH, q_QH, scale)
        scores_KQ = jnp.where(_visible(queries, own, turned=True), scores_KQ, _MASKED)
        weights_KQ = jnp.exp2(scores_KQ - log_sums[head, queries.span][None])
        dweights_KQ = _product(v_KW, dout_QW) - means[head, queries.span][None]
        dscores_KQ = (weights_KQ * dweights_KQ).astype(k.dtype)
        return (
            _added(sums_KH, dscores_KQ, q_QH),
            _added(sums_KW, weights_KQ.astype(k.dtype), dout_QW),
        )

    start, end = block * (_OWN // _STEP), _of_table(table)

    def add_head(head, sums):
        return lax.fori_loop(start, end, functools.partial(add, head), sums)

    sums_KH, sums_KW = lax.fori_loop(0, q.shape[1], add_head, (_zeros(k), _zeros(v)))
    _write(dk, own, [x * scale for x in sums_KH])
    _write(dv, own, sums_KW)


def _of_table(table: Any) -> jax.Array:
    return table[pl.program_id(2), pl.program_id(0)]


def _visible(queries: _Tokens, keys: _Tokens, *, turned: bool = False) -> jax.Array:
    """Returns which queries see which keys: [Q, K], or [K, Q]."""
    of_queries, of_keys = (1, 0) if turned else (0, 1)

    def spread(of_queries_or_keys: jax.Array, axis: int) -> jax.Array:
        return jnp.expand_dims(of_queries_or_keys, 1 - axis)

    return (spread(keys.ids, of_keys) == spread(queries.ids, of_queries)) & (
        spread(keys.places, of_keys) <= spread(queries.places, of_queries)
    )


def _pieces(width: int) -> list[Any]:
    """Cuts a width into powers of two, the largest first."""
    pieces, start = [], 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        pieces.append(pl.ds(start, size))
        start += size
    return pieces


def _read(x: Any, tokens: _Tokens, head: jax.Array | int = 0) -> list[jax.Array]:
    return [x[tokens.span, head, piece] for piece in _pieces(x.shape[-1])]


def _write(x: Any, tokens: _Tokens, values: Sequence[jax.Array]) -> None:
    for piece, value in zip(_pieces(x.shape[-1]), values, strict=True):
        x[tokens.span, 0, piece] = value.astype(x.dtype)


def _zeros(x: Any) -> list[jax.Array]:
    return [jnp.zeros((_OWN, piece.size), jnp.float32) for piece in _pieces(x.shape[-1])]


def _product(x: Sequence[jax.Array], y: Sequence[jax.Array]) -> jax.Array:
    """Multiplies by the transpose of y."""
    transposed = (((1,), (1,)), ((), ()))
    parts = [
        lax.dot_general(one, other, transposed, preferred_element_type=jnp.float32)
        for one, other in zip(x, y, strict=True)
    ]
    return functools.reduce(jnp.add, parts)


def _scores(x: Sequence[jax.Array], y: Sequence[jax.Array], scale: float) -> jax.Array:
    return _product(x, y) * (scale * _LOG2_E)


def _added(sums: Sequence[jax.Array], x: jax.Array, y: Sequence[jax.Array]) -> list[jax.Array]:
    return [
        total + jnp.dot(x, piece, preferred_element_type=jnp.float32)
        for total, piece in zip(sums, y, strict=True)
    ]
