"""Looking up rows of an embedding that is split over devices.

Outside a pipeline the compiler splits the lookup like everything else. Inside a pipeline's
`shard_map`, XLA (of jax 0.10 to 0.12) aborts at many lookups whose operand is split over two axes
("num_replica_groups ... Check failed"), so there each device looks up its own tokens by hand: the
width is gathered, as a weight's is at use, and the vocabulary stays split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from dsjax.parallel.sharding import partition_spec, parts_here, split_axes
from dsjax.parallel.shards import Specs, on_shards


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Looks up int32 tokens [B, T]: [B, T, D]; an id outside the vocabulary gives NaN."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return jnp.take(table_VD, tokens_BT, axis=0)

    def specs(mesh: AbstractMesh) -> Specs:
        table = partition_spec(("vocab", "width"), table_VD.shape, mesh, "embedding")
        tokens = partition_spec(("batch", "length"), tokens_BT.shape, mesh, "tokens")
        return (table, tokens), PartitionSpec(*tokens, None)

    return on_shards(_in_part, (table_VD, tokens_BT), specs)


def _in_part(part_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Looks tokens up in a device's part of the vocabulary and sums over the parts."""
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
