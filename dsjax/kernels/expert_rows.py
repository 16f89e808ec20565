"""The experts of a few tokens, as decoding needs them: weights that nobody chose are not read.

One assignment (a token and one of its experts) after another takes its expert's three matrices out
of the stack and multiplies one row. That reads the chosen matrices once, which is all the time it
takes: a row's arithmetic hides behind them. Assignments come sorted by expert, so that tokens with
the same expert find its matrices in the processor's cache. For many rows `grouped_matmul` is
better, whose time is arithmetic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def expert_rows(
    x_MD: jax.Array,
    w_gate_EDF: jax.Array,
    w_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
) -> jax.Array:
    """Sums each token's SwiGLU experts by weight.

    Args:
      x_MD: tokens; a matrix is cast to their dtype after it is taken from its stack.
      experts_MK: int32, the experts of each token.
      weights_MK: float32.

    Returns:
      [M, D] in x's dtype, summed in float32.
    """
    K = experts_MK.shape[1]
    experts_A = experts_MK.reshape(-1)
    order_A = jnp.argsort(experts_A) if experts_A.size > K else jnp.arange(K)

    def matrix(stack: jax.Array, expert: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(stack, expert, keepdims=False).astype(x_MD.dtype)

    def add(index: jax.Array, y_MD: jax.Array) -> jax.Array:
        assignment = order_A[index]
        token, expert = assignment // K, experts_A[assignment]
        x_1D = lax.dynamic_slice_in_dim(x_MD, token, 1)
        gate = x_1D @ matrix(w_gate_EDF, expert)
        up = x_1D @ matrix(w_up_EDF, expert)
        y_1D = (jax.nn.silu(gate) * up) @ matrix(w_down_EFD, expert)
        weight = weights_MK.reshape(-1)[assignment]
        y_1D = lax.dynamic_slice_in_dim(y_MD, token, 1) + y_1D.astype(jnp.float32) * weight
        return lax.dynamic_update_slice_in_dim(y_MD, y_1D, token, 0)

    start = jnp.zeros(x_MD.shape, jnp.float32)
    return lax.fori_loop(0, experts_A.size, add, start).astype(x_MD.dtype)
