"""Causal attention on devices that have whole sequences, each with its own sequences and heads."""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh

from dsjax.kernels.attention import causal_attention
from dsjax.kernels.target import Target
from dsjax.parallel.sharding import partition_spec
from dsjax.parallel.shards import Specs, on_shards


def sharded_attention(
    q_BTNH: jax.Array,
    k_BTPH: jax.Array,
    v_BTPW: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    scale: float,
    target: Target,
) -> jax.Array:
    """Runs `dsjax.kernels.attention.causal_attention` under the current mesh.

    The compiler splits plain XLA code but not a TPU's or GPU's kernel, so there the kernel is
    called on each device's shard: q[B_batch, T, N_heads, H] and so on, no communication.
    """
    arguments = (q_BTNH, k_BTPH, v_BTPW)
    if segment_ids_BT is not None:
        arguments += (segment_ids_BT,)

    def attention(q, k, v, segments=None):
        return causal_attention(q, k, v, segment_ids_BT=segments, scale=scale, target=target)

    def specs(mesh: AbstractMesh) -> Specs:
        axes = ("batch", "length", "heads", "width")
        placed = tuple(
            partition_spec(axes[: x.ndim], x.shape, mesh, "attention") for x in arguments
        )
        return placed, placed[0]

    if target.kind == "cpu":
        return attention(*arguments)
    return on_shards(attention, arguments, specs, checked=False)
