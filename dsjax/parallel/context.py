"""Sequences split along their length over the mesh axis `context`.

Only attention needs a token's neighbours. For it, each device gathers what all queries need of the
other devices' tokens. With MLA that is the latent and the rope key: 576 values per token for V3,
where expanded keys and values would be 40,960. They are expanded after the gather, on every device
for the whole sequence, and the gradient is sent back as a latent too.

With contiguous parts, causal attention would leave the device with the start of a sequence idle and
the one with its end busy. So a sequence is cut into 2c chunks for c devices, and device r holds
chunks r and 2c - 1 - r: then all devices meet the same number of keys, to the tile. Inside the
model tokens are therefore in that order; `arrange` brings a batch into it and `restore` undoes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from dsjax.kernels.flash_attention import Segments, Tiles, tiled_attention
from dsjax.kernels.target import Target
from dsjax.kernels.varying import vary_as
from dsjax.parallel.sharded_attention import sharded_attention
from dsjax.parallel.sharding import constrain, partition_spec, parts, parts_here
from dsjax.parallel.shards import on_shards

AXIS = "context"
_MOST_BLOCK = 512  # queries per tile

Expand = Callable[..., tuple[jax.Array, jax.Array]]


def check_length(length: int, mesh: Mesh | AbstractMesh) -> None:
    """Checks that sequences can be split over the mesh.

    Raises:
      ValueError: the length does not divide into two chunks per device.
    """
    n_parts = parts("length", mesh)
    if n_parts > 1 and length % (2 * n_parts):
        raise ValueError(
            f"data.sequence_length={length} does not divide into 2 chunks for each of "
            f"mesh.context={n_parts} devices; choose a multiple of {2 * n_parts}"
        )


def fitting(length: int, mesh: Mesh | AbstractMesh | None) -> int:
    """Returns the smallest length of at least this many tokens that can be split over the mesh."""
    n_parts = parts("length", mesh) if mesh else 1
    return length if n_parts == 1 else length + -length % (2 * n_parts)


def order(length: int, n_parts: int) -> np.ndarray:
    """Lists the positions of the tokens that the devices hold, one device after the other."""
    chunks = np.arange(length).reshape(2 * n_parts, -1)
    return np.stack([chunks[:n_parts], chunks[::-1][:n_parts]], axis=1).reshape(-1)


def arrange(x_BT: jax.Array) -> jax.Array:
    """Brings numbers per token, [..., B, T], from the order of their sequence to that of the
    devices, and splits them.
    """
    n_parts = parts_here("length")
    if n_parts == 1:
        return x_BT
    x_BT = x_BT[..., order(x_BT.shape[-1], n_parts)]
    return constrain(x_BT, *("micro_batches",) * (x_BT.ndim - 2), "batch", "length")


def restore(x_BTX: jax.Array) -> jax.Array:
    """Brings an array [B, T, ...] back to the sequence's order, whole on every device:
    x[B, T_context, X] -> all_gather(context) -> x[B, T, X].
    """
    n_parts = parts_here("length")
    if n_parts == 1:
        return x_BTX
    x_BTX = constrain(x_BTX, "batch", "tokens", *("width",) * (x_BTX.ndim - 2))
    return x_BTX[:, np.argsort(order(x_BTX.shape[1], n_parts))]


def split_length(x_BTX: jax.Array) -> jax.Array:
    """Makes each device's part of a sequence a row of its own, for work in which order does not
    matter: [B, T, ...] -> [c * B, T / c, ...]; nothing moves.
    """
    n_parts = parts_here("length")
    if n_parts == 1:
        return x_BTX
    B, T, *rest = x_BTX.shape
    x_cBtX = x_BTX.reshape(B, n_parts, T // n_parts, *rest).swapaxes(0, 1)
    x_CtX = x_cBtX.reshape(n_parts * B, T // n_parts, *rest)
    return constrain(x_CtX, "length_shards", "tokens", *("width",) * len(rest))


def join_length(x_CtX: jax.Array) -> jax.Array:
    """Undoes `split_length`: [c * B, T / c, ...] -> [B, T, ...]; nothing moves."""
    n_parts = parts_here("length")
    if n_parts == 1:
        return x_CtX
    C, t, *rest = x_CtX.shape
    x_BTX = x_CtX.reshape(n_parts, C // n_parts, t, *rest).swapaxes(0, 1)
    x_BTX = x_BTX.reshape(C // n_parts, n_parts * t, *rest)
    return constrain(x_BTX, "batch", "length", *("width",) * len(rest))


def attend(
    q_BTNH: jax.Array,
    kept: tuple[jax.Array, ...],
    weights: Any,
    expand: Expand,
    *,
    scale: float,
    segment_ids_BT: jax.Array | None,
    target: Target,
) -> jax.Array:
    """Attends causally to keys and values expanded from what each token keeps.

    Args:
      kept: [B, T, ...]; of four dims, the third is heads.
      weights: arrays [..., heads] that `expand` needs.
      expand: (*kept, weights), for some sequences and heads -> their keys and values.
      segment_ids_BT: int32; a query only sees keys of its own segment. None: all earlier ones.

    Returns:
      [B, T, N, W].
    """
    if parts_here("length") == 1:
        k_BTPH, v_BTPW = expand(*kept, weights)
        return sharded_attention(q_BTNH, k_BTPH, v_BTPW, segment_ids_BT, scale=scale, target=target)

    def specs(mesh: AbstractMesh):
        def spec(x: jax.Array, *axes: str):
            return partition_spec(axes, x.shape, mesh, "attention")

        q = spec(q_BTNH, "batch", "length", "heads", "width")
        tokens = tuple(
            spec(x, "batch", "length", *("heads",) * (x.ndim - 3), "width") for x in kept
        )
        heads = jax.tree.map(lambda w: spec(w, *("latent",) * (w.ndim - 1), "heads"), weights)
        segments = None if segment_ids_BT is None else spec(segment_ids_BT, "batch", "length")
        return (q, tokens, heads, segments), q

    attention = functools.partial(_attend_shard, expand=expand, scale=scale)
    return on_shards(attention, (q_BTNH, kept, weights, segment_ids_BT), specs)


def _attend_shard(
    q_btNH: jax.Array,
    kept: tuple[jax.Array, ...],
    weights: Any,
    segment_ids_bt: jax.Array | None,
    *,
    expand: Expand,
    scale: float,
) -> jax.Array:
    """Attends from a device's own queries to the whole sequence."""
    # Devices with the same tokens have different heads, so gradients of what they share are summed.
    kept, weights = jax.tree.map(lambda x: vary_as(x, q_btNH), (kept, weights))
    segments = None
    if segment_ids_bt is not None:
        segments = Segments(segment_ids_bt, gather(segment_ids_bt))

    def dense(q_btNH: Any, keys_values: Any, tiles: Tiles, segments: Segments | None) -> jax.Array:
        k_bTPH, v_bTPW = keys_values
        return tiled_attention(q_btNH, k_bTPH, v_bTPW, tiles, scale=scale, segments=segments)[0]

    return in_tiles(dense, q_btNH, expand(*map(gather, kept), weights), segments)


def gather(x_btX: jax.Array) -> jax.Array:
    """Returns the whole sequence, in its order, of which each device holds a part: inside
    `shard_map`, x[b, t_context, ...] -> all_gather(context) -> x[b, T, ...].
    """
    n_parts = parts_here("length")
    if n_parts == 1:
        return x_btX
    x_bTX = lax.all_gather(x_btX, AXIS, axis=1, tiled=True)
    return x_bTX[:, np.argsort(order(x_bTX.shape[1], n_parts))]


def in_tiles(
    attend: Callable[[Any, Any, Tiles, Segments | None], Any],
    of_queries: Any,
    of_keys: Any,
    segments: Segments | None,
) -> Any:
    """Calls attend(queries, keys, tiles, segments), inside `shard_map`.

    Chunks that do not divide into tiles of one size are filled up with tokens of a document of
    their own, and what comes of these is dropped.

    Args:
      attend: returns a tree of arrays [B, T, ...].
      of_queries: a tree of arrays [B, T, ...], of this device's tokens.
      of_keys: a tree of arrays [B, S, ...], of the whole sequence in its order.
    """
    n_parts = parts_here("length")
    queries, keys = (jax.tree.leaves(tree)[0] for tree in (of_queries, of_keys))
    chunk = keys.shape[1] // (2 * n_parts)
    n_tiles, size = _tiles_of(chunk)
    fill = n_tiles * size - chunk
    here = lax.axis_index(AXIS)
    tiles = Tiles(*(jnp.asarray(table)[here] for table in tile_tables(keys.shape[1], n_parts)))
    if not fill:
        return attend(of_queries, of_keys, tiles, segments)

    def filled(x_BTX: jax.Array, value: int = 0) -> jax.Array:
        B, T, *rest = x_BTX.shape
        widths = [(0, 0), (0, 0), (0, fill), *[(0, 0)] * len(rest)]
        chunks = jnp.pad(x_BTX.reshape(B, T // chunk, chunk, *rest), widths, constant_values=value)
        return chunks.reshape(B, -1, *rest)

    def cut(x_BTX: jax.Array) -> jax.Array:
        B, _, *rest = x_BTX.shape
        return x_BTX.reshape(B, -1, chunk + fill, *rest)[:, :, :chunk].reshape(B, -1, *rest)

    if segments is None:
        segments = Segments(*(jnp.zeros(x.shape[:2], jnp.int32) for x in (queries, keys)))
    # Documents are numbered from 0.
    segments = Segments(*(filled(x, -1) for x in segments))
    of_queries, of_keys = jax.tree.map(filled, (of_queries, of_keys))
    return jax.tree.map(cut, attend(of_queries, of_keys, tiles, segments))


def _tiles_of(chunk: int) -> tuple[int, int]:
    """Returns how many tiles hold a chunk's tokens, and the places of each."""
    n_tiles = -(-chunk // _MOST_BLOCK)
    return n_tiles, -(-chunk // n_tiles)


def tile_tables(length: int, n_parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `Tiles` of each device, int32 [devices, ...], with equally many pairs each; tiles are
    numbered through all chunks.
    """
    n_tiles, _ = _tiles_of(length // (2 * n_parts))
    blocks_RI = order(2 * n_parts * n_tiles, n_parts).reshape(n_parts, -1)
    pairs_RX2 = [
        [(place, number) for place, block in enumerate(blocks_I) for number in range(block + 1)]
        for blocks_I in blocks_RI
    ]
    return blocks_RI.astype(np.int32), np.array(pairs_RX2, np.int32)
