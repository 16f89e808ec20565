"""Scores of a lightning indexer for TPUs: what `sparse_attention.index_scores` returns, without the
products of each head in memory.

A Mosaic kernel: a tile of queries, all heads one below the other, meets a block of keys; relu,
weights and the sum over the heads follow on the chip. With 64 heads the products of a query are 64
times its scores, which XLA writes to memory and reads again. Blocks of keys that come after all
queries of a tile are neither read nor multiplied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsjax.kernels.target import Target
from dsjax.kernels.varying import by_hand, call_shipped

_LANES = 128
_QUERIES, _KEYS = 8, 1024  # of a tile


def takes(target: Target, heads: int, n_keys: int) -> bool:
    """Whether the kernel computes these scores: on a TPU, where no mesh axis is left to the
    compiler, which cannot split a kernel.
    """
    return target.kind == "tpu" and by_hand() and heads % 8 == 0 and n_keys % _LANES == 0


def kernel_scores(
    q_BTIY: jax.Array, w_BTI: jax.Array, k_BSY: jax.Array, places_1T: jax.Array
) -> jax.Array:
    """Returns sum_i w[t, i] * relu(q[t, i] . k[s]), float32 [B, T, S]; 0 for keys of blocks that
    begin after all queries of a tile.

    Args:
      places_1T: int32, place of each query among the keys.
    """
    B, T, heads, _ = q_BTIY.shape
    S = k_BSY.shape[1]
    size = next(size for size in range(_KEYS, 0, -_LANES) if S % size == 0)
    fill = -T % _QUERIES
    q_BXY, w_BX1 = (
        jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0))).reshape(B, -1, x.shape[3])
        for x in (q_BTIY, w_BTI[..., None])
    )
    last_I = jnp.pad(places_1T[0], (0, fill)).reshape(-1, _QUERIES).max(axis=1)
    seen_I = (last_I // size + 1).astype(jnp.int32)
    launch = functools.partial(_launch, heads=heads, size=size)
    return call_shipped(launch, seen_I, q_BXY, w_BX1, k_BSY)[:, :T]


def _launch(
    seen_I: jax.Array,
    q_BXY: jax.Array,
    w_BX1: jax.Array,
    k_BSY: jax.Array,
    *,
    heads: int,
    size: int,
) -> jax.Array:
    B, S, Y = k_BSY.shape
    rows = _QUERIES * heads

    def of_queries(row: Any, tile: Any, block: Any, seen: Any) -> tuple[Any, ...]:
        return row, tile, 0

    def of_keys(row: Any, tile: Any, block: Any, seen: Any) -> tuple[Any, ...]:
        # What is not multiplied is not read: its block is the one that is there.
        return row, jnp.minimum(block, seen[tile] - 1), 0

    return pl.pallas_call(
        functools.partial(_kernel, heads=heads),
        out_shape=jax.ShapeDtypeStruct((B, len(seen_I) * _QUERIES, S), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, len(seen_I), S // size),
            in_specs=[
                pl.BlockSpec((1, rows, Y), of_queries),
                pl.BlockSpec((1, rows, 1), of_queries),
                pl.BlockSpec((1, size, Y), of_keys),
            ],
            out_specs=pl.BlockSpec(
                (1, _QUERIES, size), lambda row, tile, block, seen: (row, tile, block)
            ),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        # All blocks of keys, although a query that comes before a block skips it.
        cost_estimate=pl.CostEstimate(
            flops=2 * B * len(seen_I) * rows * S * (Y + 1),
            bytes_accessed=4 * B * len(seen_I) * _QUERIES * S,
            transcendentals=0,
        ),
        name="index_scores",
    )(seen_I, q_BXY, w_BX1, k_BSY)


def _kernel(seen, q, w, k, out, *, heads: int) -> None:
    visible = pl.program_id(2) < seen[pl.program_id(1)]

    @pl.when(visible)
    def _():
        products = lax.dot_general(
            q[0], k[0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        weighted = jax.nn.relu(products) * w[0]
        out[0] = weighted.reshape(-1, heads, weighted.shape[1]).sum(axis=1)

    @pl.when(jnp.logical_not(visible))
    def _():
        out[...] = jnp.zeros_like(out)
