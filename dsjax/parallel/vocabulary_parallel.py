"""Rows of an embedding by token, wherever the table and the tokens lie.

Outside a pipeline the compiler splits the lookup as it does everything else. In a pipeline's
`shard_map` XLA (of jax 0.10 to 0.12) aborts at many lookups of which two axes split an operand
("num_replica_groups ... Check failed"), so there each device looks up its own tokens by hand: the
width is put together, as a weight's is at use, and the vocabulary stays split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from dsjax.parallel.sharding import partition_spec, parts_here, split_axes
from dsjax.parallel.shards import Specs, on_shards


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """int32 [B, T] -> [B, T, D]; an id outside the vocabulary gives NaN."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return jnp.take(table_VD, tokens_BT, axis=0)

    def specs(mesh: AbstractMesh) -> Specs:
        table = partition_spec(("vocab", "width"), table_VD.shape, mesh, "embedding")
        tokens = partition_spec(("batch", "length"), tokens_BT.shape, mesh, "tokens")
        return (table, tokens), PartitionSpec(*tokens, None)

    return on_shards(_in_part, (table_VD, tokens_BT), specs)


def _in_part(part_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """The rows of a device's part of the vocabulary, summed over the parts."""
    axes = split_axes("vocab")
    if not axes:
        return jnp.take(part_VD, tokens_BT, axis=0)
    size = part_VD.shape[0]
    local_BT = tokens_BT - jax.lax.axis_index(axes).astype(tokens_BT.dtype) * size
    here_BT = (local_BT >= 0) & (local_BT < size)
    rows_BTD = jnp.take(part_VD, jnp.where(here_BT, local_BT, 0), axis=0)
    inside_BT = (tokens_BT >= 0) & (tokens_BT < size * parts_here("vocab"))
    rows_BTD = jax.lax.psum(jnp.where(here_BT[..., None], rows_BTD, 0.0), axes)
    return jnp.where(inside_BT[..., None], rows_BTD, jnp.nan)
