"""The experts of a few tokens, as decoding needs them: weights that nobody chose are not read.

One chosen expert after another has its three matrices taken out of the stack, once, and every token
passes through it, with weight 0 where the token did not choose it. While tokens are few, reading
the matrices takes all the time and the additional products hide behind it; nothing has to be sorted
by expert or brought back. For many tokens `grouped_matmul` is better, whose time is arithmetic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def chosen_experts(
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
    sorted_A = jnp.sort(experts_MK.reshape(-1))
    repeated_A = jnp.pad(sorted_A[1:] == sorted_A[:-1], (1, 0))
    chosen_A = sorted_A[jnp.argsort(repeated_A)]  # each chosen expert once, then the repetitions
    n_chosen = (~repeated_A).sum()

    def matrix(stack: jax.Array, expert: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(stack, expert, keepdims=False).astype(x_MD.dtype)

    def add(index: jax.Array, y_MD: jax.Array) -> jax.Array:
        expert = chosen_A[index]
        gate = x_MD @ matrix(w_gate_EDF, expert)
        up = x_MD @ matrix(w_up_EDF, expert)
        out = (jax.nn.silu(gate) * up) @ matrix(w_down_EFD, expert)
        weight_MK = jnp.where(experts_MK == expert, weights_MK, 0.0)
        return y_MD + out.astype(jnp.float32) * weight_MK.sum(axis=1, keepdims=True)

    return lax.fori_loop(0, n_chosen, add, jnp.zeros(x_MD.shape, jnp.float32)).astype(x_MD.dtype)
