"""Attention to chosen blocks of keys for TPUs: what `native_sparse.gathered_attention` returns,
with a table of blocks that is read before the kernel runs.

A Mosaic kernel: one step is one query of the heads that share a key head. The table says which
blocks of keys and values the step needs, and while it computes, those of the next query arrive: no
gathered copy is ever written to memory. Cached keys stay in their stack.

The backward pass is that of the gathered form.
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

_MASKED = -1e30
_SUBLANES = 16  # of a tile in memory, of operands of two bytes


def takes(target: Target, size: int, length: int) -> bool:
    """Whether the kernel attends to blocks of this size in stacks of this length: on a TPU, where
    no mesh axis is left to the compiler, which cannot split a kernel.
    """
    return target.kind == "tpu" and by_hand() and size % _SUBLANES == 0 and length % size == 0


def kernel_attention(
    q_BTPGH: jax.Array,
    k_LBPSH: jax.Array,
    v_LBPSW: jax.Array,
    layer: jax.Array | int,
    table_BTPX: jax.Array,
    places_BT: jax.Array,
    *,
    size: int,
    scale: float,
) -> jax.Array:
    """Attends to the chosen blocks up to each query's own place: float32 [B, T, P, G, W].

    Args:
      table_BTPX: int32 numbers of blocks, counted from the beginning of a row; all different, or
        negative: none.
    """
    n_chosen = table_BTPX.shape[-1]
    tables = (table_BTPX.swapaxes(1, 2), places_BT, jnp.asarray(layer))
    tables = tuple(x.reshape(-1).astype(jnp.int32) for x in tables)
    launch = functools.partial(_launch, n_chosen=n_chosen, size=size, scale=scale)
    out_BPTGW = call_shipped(launch, *tables, q_BTPGH.swapaxes(1, 2), k_LBPSH, v_LBPSW)
    return out_BPTGW.swapaxes(1, 2)


def _launch(
    table: jax.Array,
    places: jax.Array,
    layer: jax.Array,
    q_BPTGH: jax.Array,
    k_LBPSH: jax.Array,
    v_LBPSW: jax.Array,
    *,
    n_chosen: int,
    size: int,
    scale: float,
) -> jax.Array:
    B, P, T, G, H = q_BPTGH.shape
    W = v_LBPSW.shape[-1]

    def first(b: Any, p: Any, t: Any) -> Any:
        """Returns where the table of a query begins; tables are flat, as scalar memory pads."""
        return ((b * P + p) * T + t) * n_chosen

    def of_block(number: int, width: int) -> pl.BlockSpec:
        def place(b: Any, p: Any, t: Any, table: Any, places: Any, layer: Any) -> tuple[Any, ...]:
            return layer[0], b, p, jnp.maximum(table[first(b, p, t) + number], 0), 0

        return pl.BlockSpec((1, 1, 1, size, width), place)

    def of_query(b: Any, p: Any, t: Any, *_: Any) -> tuple[Any, ...]:
        return b, p, t, 0, 0

    def kernel(table: Any, places: Any, layer: Any, q: Any, *refs: Any) -> None:
        keys, values, out = refs[:n_chosen], refs[n_chosen:-1], refs[-1]
        b, p, t = (pl.program_id(axis) for axis in range(3))
        numbers = [table[first(b, p, t) + number] for number in range(n_chosen)]
        _attend(numbers, places[b * T + t], q[0, 0, 0], keys, values, out, size=size, scale=scale)

    chosen, queries = range(n_chosen), B * P * T
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((B, P, T, G, W), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, P, T),
            in_specs=[
                pl.BlockSpec((1, 1, 1, G, H), of_query),
                *(of_block(number, H) for number in chosen),
                *(of_block(number, W) for number in chosen),
            ],
            out_specs=pl.BlockSpec((1, 1, 1, G, W), of_query),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * queries * G * n_chosen * size * (H + W),
            bytes_accessed=queries * n_chosen * size * (H + W) * k_LBPSH.dtype.itemsize,
            transcendentals=queries * G * n_chosen * size,
        ),
        name="chosen_blocks",
    )(table, places, layer, q_BPTGH, *(k_LBPSH,) * n_chosen, *(v_LBPSW,) * n_chosen)


def _attend(numbers, place, q_GH, keys, values, out, *, size: int, scale: float) -> None:
    """Attends from one query's heads to its blocks."""

    def scores(number: jax.Array, k: Any) -> jax.Array:
        products_GU = lax.dot_general(
            q_GH, k[0, 0, 0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        place_GU = number * size + lax.broadcasted_iota(jnp.int32, products_GU.shape, 1)
        return jnp.where((number >= 0) & (place_GU <= place), products_GU * scale, _MASKED)

    blocks = [scores(number, k) for number, k in zip(numbers, keys, strict=True)]
    highest_G1 = functools.reduce(
        jnp.maximum, (scores_GU.max(axis=1, keepdims=True) for scores_GU in blocks)
    )
    total_G1, sum_GW = jnp.zeros_like(highest_G1), jnp.zeros(out.shape[3:], jnp.float32)
    for scores_GU, v in zip(blocks, values, strict=True):
        weights_GU = jnp.where(scores_GU > _MASKED, jnp.exp(scores_GU - highest_G1), 0.0)
        total_G1 += weights_GU.sum(axis=1, keepdims=True)
        sum_GW += lax.dot_general(
            weights_GU.astype(v.dtype), v[0, 0, 0], (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
    out[0, 0, 0] = sum_GW / jnp.where(total_G1 > 0, total_G1, 1.0)
