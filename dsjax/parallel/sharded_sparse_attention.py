"""Attention to chosen keys (`dsjax.kernels.sparse_attention`) over the mesh.

Each device attends from its own rows, queries and heads. Over `context` it gathers what all queries
need of the other devices' tokens, as `dsjax.parallel.context` does: latents, rope keys and index
keys. The gradients of these come back in one reduction per layer and not in one per tile. The index
is whole on all devices that share heads, and so is its choice; what it shall predict is averaged
over them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh

from dsjax.kernels.dense_lesson import tiled_divergence
from dsjax.kernels.flash_attention import Segments, Tiles, tiled_attention
from dsjax.kernels.sparse_attention import (
    Index,
    Lesson,
    Shard,
    latent_attention,
    masked_attention,
)
from dsjax.kernels.target import Target
from dsjax.kernels.varying import agreed, vary_as
from dsjax.parallel import context
from dsjax.parallel.sharding import partition_spec, parts_here, split_axes
from dsjax.parallel.shards import Specs, on_shards

# Attention, and the divergence of an index that learns.
Attended = tuple[jax.Array, jax.Array | None]


def gathered(
    q_BTNX: jax.Array,
    kv_BTX: jax.Array,
    index: Index,
    segment_ids_BT: jax.Array | None,
    *,
    lesson: Lesson | None,
    width: int,
    count: int,
    scale: float,
    target: Target,
) -> Attended:
    """Runs `latent_attention`; keys are those of the queries' own tokens."""

    def attend(q: Any, kept: Any, _: Any, index: Index, segments: Any, shard: Shard) -> Attended:
        assert lesson != "warmup"  # it learns from all keys
        (kv_BSX,) = kept
        out, divergence = latent_attention(
            q, kv_BSX, jax.tree.map(lambda x: vary_as(x, q), index), segments=segments, shard=shard,
            lesson=lesson, width=width, count=count, scale=scale, target=target,
        )  # fmt: skip
        return out, None if divergence is None else agreed(divergence, shard.head_axes)

    return _on_shards(attend, q_BTNX, (kv_BTX,), None, index, segment_ids_BT, lesson)


def expanded(
    q_BTNH: jax.Array,
    kept: tuple[jax.Array, ...],
    weights: jax.Array | None,
    index: Index,
    segment_ids_BT: jax.Array | None,
    *,
    lesson: Lesson | None,
    expand: context.Expand,
    count: int,
    scale: float,
) -> Attended:
    """Runs `masked_attention` with keys and values expanded from what each token keeps. In the
    warm-up, devices that share a sequence attend densely by a list of tiles instead.

    Args:
      kept: [B, T, X] each.
      weights: [..., heads], what `expand` needs.
      expand: (*kept, weights), for some sequences and heads -> their keys and values.
    """
    n_parts = parts_here("length")

    def attend(
        q: Any, kept: Any, weights: Any, index: Index, segments: Any, shard: Shard
    ) -> Attended:
        k, v = kept if n_parts == 1 else expand(*kept, weights)
        if lesson != "warmup" or n_parts == 1:
            return masked_attention(
                q, k, v, index, segments=segments, shard=shard, lesson=lesson, count=count,
                scale=scale,
            )  # fmt: skip

        def dense(queries: Any, keys: Any, tiles: Tiles, segments: Segments | None) -> Attended:
            (q, index_q, index_w), (k, v, index_k) = queries, keys
            common: Any = {"scale": scale, "segments": segments}
            out, log_sum = tiled_attention(q, k, v, tiles, **common)
            divergence = tiled_divergence(
                q, k, checkpoint_name(log_sum, "index"), Index(index_q, index_w, index_k),
                tiles, head_axes=shard.head_axes, **common,
            )  # fmt: skip
            return out, divergence

        queries, keys = (q, index.q_BTIY, index.w_BTI), (k, v, index.k_BSY)
        return context.in_tiles(dense, queries, keys, segments)

    if n_parts == 1:
        kept, weights = expand(*kept, weights), None
    return _on_shards(attend, q_BTNH, kept, weights, index, segment_ids_BT, lesson)


def _on_shards(
    attend: Callable[..., Attended],
    q_BTNX: jax.Array,
    kept: tuple[jax.Array, ...],
    weights: jax.Array | None,
    index: Index,
    segment_ids_BT: jax.Array | None,
    lesson: Lesson | None,
) -> Attended:
    """Calls attend(queries, kept, weights, index, segments, shard) on each device.

    Args:
      kept: [B, T, X], or [B, T, N, X] for a device's heads.
    """

    def specs(mesh: AbstractMesh) -> Specs:
        def spec(x: jax.Array, *axes: str) -> Any:
            return partition_spec(axes, x.shape, mesh, "attention")

        def of_tokens(x: jax.Array, dim: str = "width") -> Any:
            return spec(x, "batch", "length", *(dim, "width")[4 - x.ndim :])

        q = of_tokens(q_BTNX, "heads")
        heads = None if weights is None else spec(weights, "latent", "heads")
        of_kept = tuple(of_tokens(x, "heads") for x in kept)
        of_index, segments = jax.tree.map(of_tokens, (index, segment_ids_BT))
        results = (q, of_tokens(index.w_BTI[:, :, 0])) if lesson else (q,)
        return (q, of_kept, heads, of_index, segments), results

    arguments = (q_BTNX, kept, weights, index, segment_ids_BT)
    out, *divergence = on_shards(functools.partial(_on_shard, attend=attend), arguments, specs)
    return out, divergence[0] if divergence else None


def _on_shard(
    q_btnX: jax.Array,
    kept: tuple[jax.Array, ...],
    weights: jax.Array | None,
    index: Index,
    segment_ids_bt: jax.Array | None,
    *,
    attend: Callable[..., Attended],
) -> tuple[jax.Array, ...]:
    # Devices with the same tokens have different heads, so gradients of what they share are summed.
    kept, weights = jax.tree.map(lambda x: vary_as(x, q_btnX), (kept, weights))
    segments = None
    if segment_ids_bt is not None:
        segments = Segments(segment_ids_bt, context.gather(segment_ids_bt))
    out, divergence_bt = attend(
        q_btnX,
        tuple(map(context.gather, kept)),
        weights,
        index._replace(k_BSY=context.gather(index.k_BSY)),
        segments,
        _shard(q_btnX.shape[1]),
    )
    return (out,) if divergence_bt is None else (out, divergence_bt)


def _shard(length: int) -> Shard:
    """Returns which queries and heads a device has that has so many queries."""
    n_parts = parts_here("length")
    shard = Shard.whole(length)
    if n_parts > 1:
        # One chunk from the first half of the sequence, and one from the second.
        order = context.order(length * n_parts, n_parts).reshape(n_parts, length)
        places_T = jnp.asarray(order, jnp.int32)[lax.axis_index(context.AXIS)]
        halves = tuple((length // 2, half * n_parts * length // 2) for half in (1, 2))
        shard = Shard(places_T, halves)
    return shard._replace(head_axes=split_axes("heads"))
