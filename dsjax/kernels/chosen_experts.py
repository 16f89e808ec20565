"""The experts of a few tokens, as in decoding. Experts that no token chose are not read, and
nothing is sorted by expert. For many tokens, where arithmetic takes the time, `grouped_matmul` is
faster.

* On a CPU the chosen experts run one after another. Each has its three matrices read from the
  stack once, and every token passes through it, with weight 0 if the token did not choose it. While
  tokens are few, reading the matrices takes all the time and the extra products hide behind it.
* On a GPU all choices of all tokens are computed at once, each reading its own matrices, by one
  kernel per product: there, launching kernels takes the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsjax.kernels.target import Target

Stack = Any


def chosen_experts(
    x_MD: jax.Array,
    w_gate_EDF: Stack,
    w_up_EDF: Stack,
    w_down_EFD: Stack,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    target: Target,
    at_use: Callable[[Stack, DTypeLike], jax.Array],
    limit: float = 0.0,
) -> jax.Array:
    """Sums each token's SwiGLU experts by weight.

    Args:
      x_MD: tokens.
      w_gate_EDF, w_up_EDF, w_down_EFD: stacks of matrices, arrays or pytrees of arrays whose first
        dimension is E.
      experts_MK: int32, the experts of each token.
      weights_MK: float32.
      target: not a TPU.
      at_use: makes an array of the tokens' dtype of what was read from a stack.
      limit: of the gates from above, and of what they multiply on both sides; 0: none.

    Returns:
      [M, D] in x's dtype, summed in float32.
    """
    compute = _at_once if target.kind == "gpu" else _one_by_one
    stacks = w_gate_EDF, w_up_EDF, w_down_EFD
    swiglu = functools.partial(_swiglu, limit=limit)
    y_MD = compute(x_MD, *stacks, experts_MK, weights_MK, lambda w: at_use(w, x_MD.dtype), swiglu)
    return y_MD.astype(x_MD.dtype)


def is_few(n_tokens: int, top_k: int, n_experts: int, target: Target) -> bool:
    """Returns whether `chosen_experts` is faster than the grouped product."""
    if target.kind == "gpu":
        return n_tokens * top_k <= n_experts  # it reads no more matrices than there are
    # The grouped product computes at least 32 rows per expert anyway.
    return target.kind == "cpu" and n_tokens <= 32


def _swiglu(gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
    if limit:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def _at_once(x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, experts_MK, weights_MK, at_use, swiglu):
    def product(x_MKX: jax.Array, stack_EXY: Stack) -> jax.Array:
        # Not a matrix product: XLA would copy the matrices for one, but a sum reads them in place.
        chosen = jax.tree.map(lambda leaf: leaf[experts_MK], stack_EXY)
        matrices = at_use(chosen).astype(jnp.float32)
        return (x_MKX.astype(jnp.float32)[..., None] * matrices).sum(axis=2)

    x_M1D = x_MD[:, None]
    gate, up = (product(x_M1D, w).astype(x_MD.dtype) for w in (w_gate_EDF, w_up_EDF))
    out_MKD = product(swiglu(gate, up), w_down_EFD)
    return (out_MKD * weights_MK[..., None]).sum(axis=1)


def _one_by_one(x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, experts_MK, weights_MK, at_use, swiglu):
    sorted_A = jnp.sort(experts_MK.reshape(-1))
    repeated_A = jnp.pad(sorted_A[1:] == sorted_A[:-1], (1, 0))
    chosen_A = sorted_A[jnp.argsort(repeated_A)]  # each chosen expert once, then repetitions
    n_chosen = (~repeated_A).sum()

    def matrix(stack: Stack, expert: jax.Array) -> jax.Array:
        read = functools.partial(lax.dynamic_index_in_dim, index=expert, keepdims=False)
        return at_use(jax.tree.map(read, stack))

    def add(index: jax.Array, y_MD: jax.Array) -> jax.Array:
        expert = chosen_A[index]
        gate = x_MD @ matrix(w_gate_EDF, expert)
        up = x_MD @ matrix(w_up_EDF, expert)
        out = swiglu(gate, up) @ matrix(w_down_EFD, expert)
        weight_MK = jnp.where(experts_MK == expert, weights_MK, 0.0)
        return y_MD + out.astype(jnp.float32) * weight_MK.sum(axis=1, keepdims=True)

    return lax.fori_loop(0, n_chosen, add, jnp.zeros(x_MD.shape, jnp.float32))
