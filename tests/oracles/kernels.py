"""The definitions that kernels are tested against: whole score matrices, one gathered matrix per
row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsjax.kernels.cached_attention import Read
from dsjax.kernels.grouped_matmul import group_of_row


def reference_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    *,
    scale: float,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """`dsjax.kernels.attention.causal_attention`, with the whole score matrix at once."""
    T, N = q_BTNH.shape[1:3]
    k_BTNH, v_BTNW = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k_BTPH, v_BTPW))
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH, preferred_element_type=jnp.float32)
    visible = jnp.tril(jnp.ones((T, T), bool))[None]
    if segment_ids_BT is not None:
        visible = visible & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores * scale, -jnp.inf), axis=-1)
    out = jnp.einsum("BNTS,BSNW->BTNW", weights.astype(v_BTNW.dtype), v_BTNW)
    return out.astype(q_BTNH.dtype)


def reference_cached_attention(
    queries: tuple[jax.Array, ...],
    read: Read,
    length: int,
    positions_BT: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """`cached_attention`: keys and values of every head side by side, the whole score matrix."""
    block = read(0, length)
    N = queries[0].shape[2]

    def per_head(x_BPSX: jax.Array) -> jax.Array:
        return jnp.repeat(x_BPSX, N // x_BPSX.shape[1], axis=1)

    q = jnp.concatenate(queries, axis=-1)
    k = jnp.concatenate([per_head(keys) for keys in block.keys], axis=-1)
    scores = jnp.einsum("BTNX,BNSX->BNTS", q, k, preferred_element_type=jnp.float32) * scale
    visible_BTS = jnp.arange(length, dtype=jnp.int32)[None, None] <= positions_BT[:, :, None]
    weights = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores, -jnp.inf), axis=-1)
    v = per_head(block.values)
    return jnp.einsum("BNTS,BNSW->BTNW", weights.astype(v.dtype), v).astype(q.dtype)


def reference_matmul(x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`grouped_matmul`, with one gathered matrix per row."""
    group_A = group_of_row(x_AD.shape[0], sizes_E)
    return jnp.einsum(
        "AD,ADF->AF", x_AD, w_EDF[group_A], preferred_element_type=jnp.float32
    ).astype(x_AD.dtype)


def reference_outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`grouped_outer`, through a one-hot of the groups."""
    group_A = group_of_row(x_AD.shape[0], sizes_E)
    onehot_AE = jax.nn.one_hot(group_A, sizes_E.shape[0], dtype=x_AD.dtype)
    return jnp.einsum("AE,AD,AF->EDF", onehot_AE, x_AD, y_AF, preferred_element_type=jnp.float32)
