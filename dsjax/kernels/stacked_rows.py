"""Rows of one layer out of a stack of layers, without a copy of the layer or of the stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def take(stack_LBPSX: jax.Array, layer: jax.Array | int, places_BPY: jax.Array) -> jax.Array:
    """Returns a layer's rows [B, P, ..., X] at int32 places [B, P, ...], all within the stack.

    It is one gather out of the stack as it lies. `vmap` would put what it maps over first, and a
    TPU then copies the stack into that order. B and P are batches, so that each device gathers from
    its own.
    """
    X, n_dims = stack_LBPSX.shape[-1], places_BPY.ndim
    layers_BPY = jnp.broadcast_to(jnp.asarray(layer, jnp.int32), places_BPY.shape)
    return lax.gather(
        stack_LBPSX,
        jnp.stack([layers_BPY, places_BPY], axis=-1),
        lax.GatherDimensionNumbers(
            offset_dims=(n_dims,),
            collapsed_slice_dims=(0, 3),
            start_index_map=(0, 3),
            operand_batching_dims=(1, 2),
            start_indices_batching_dims=(0, 1),
        ),
        slice_sizes=(1, 1, 1, 1, X),
        mode=lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
