"""Causal attention over expanded keys and values, any number of query heads a key head, values of any width.

`causal_attention` is exact attention that never holds the whole score matrix of a long sequence: queries come in
chunks, a chunk only meets the keys up to its own end (so half of the causal square is never computed), and the
backward pass computes a chunk's scores again. Scores and softmax are float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_CHUNK, _MAX_CHUNKS = 512, 16
_MASKED = -1e30  # finite, so that a row of padding gives numbers and not NaN


def causal_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    *,
    scale: float,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """Attends causally, N query heads sharing P key heads (N a multiple of P).

    Args:
      segment_ids_BT: int32; a query only sees keys of its own segment. None: all earlier ones.

    Returns:
      [B, T, N, W] in q's dtype.
    """
    length = q_BTNH.shape[1]
    chunk = max(_CHUNK, -(-length // _MAX_CHUNKS))
    if length <= chunk:
        return reference_attention(
            q_BTNH, k_BTPH, v_BTPW, scale=scale, segment_ids_BT=segment_ids_BT
        )
    attend = jax.checkpoint(functools.partial(_attend, scale=scale), static_argnums=(5,))
    outputs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        segments = (
            (None, None)
            if segment_ids_BT is None
            else (segment_ids_BT[:, start:end], segment_ids_BT[:, :end])
        )
        outputs.append(
            attend(q_BTNH[:, start:end], k_BTPH[:, :end], v_BTPW[:, :end], *segments, start)
        )
    return jnp.concatenate(outputs, axis=1)


def reference_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    *,
    scale: float,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """The same with the whole score matrix at once."""
    return _attend(q_BTNH, k_BTPH, v_BTPW, segment_ids_BT, segment_ids_BT, 0, scale=scale)


def _attend(
    q_BTNH, k_BSPH, v_BSPW, q_segments_BT, k_segments_BS, start: int, *, scale: float
) -> jax.Array:
    """Queries at positions start, start + 1, ... against keys at 0 ... S - 1."""
    B, T, N, H = q_BTNH.shape
    S, P = k_BSPH.shape[1:3]
    q_BTPGH = q_BTNH.reshape(B, T, P, N // P, H)
    scores = (
        jnp.einsum("BTPGH,BSPH->BPGTS", q_BTPGH, k_BSPH, preferred_element_type=jnp.float32) * scale
    )
    visible = (jnp.arange(S)[None] <= jnp.arange(start, start + T)[:, None])[None, None, None]
    if q_segments_BT is not None:
        same = q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
        visible = visible & same[:, None, None]
    probabilities = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1).astype(
        v_BSPW.dtype
    )
    out = jnp.einsum("BPGTS,BSPW->BTPGW", probabilities, v_BSPW, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, v_BSPW.shape[-1]).astype(q_BTNH.dtype)
