"""Which inputs the backward pass keeps of two kinds of layers, and in how many bits.

Most of a training step's memory holds activations for the backward pass. The two largest kinds have
names for `jax.checkpoint`, which keeps what is named and recomputes the rest:

* "swiglu_input": gate and up. The product of SwiGLU, which the following layer needs for its weight
  gradient, is recomputed from them. With FP8 they are kept in 1 x 128 tiles of E4M3.
* "attention": the input of the linear layer after attention. With FP8 it is kept in E5M6.

The forward pass sees neither rounding: each function computes its output from its exact arguments
and only its gradient from what was kept.

Paper: DeepSeek-V3 (arXiv:2412.19437) section 3.3.3. Departure: the attention core is recomputed
whole, so the E5M6 numbers serve the linear layer's weight gradient alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsjax.precision import e5m6
from dsjax.precision.fp8 import CHANNEL_TILE
from dsjax.precision.matmul import (
    grouped_backward,
    grouped_forward,
    linear_backward,
    linear_forward,
    quantized,
)
from dsjax.precision.policy import Policy


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def limited(gate: jax.Array, up: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    """Clamps what SwiGLU reads (V4): gate from above, up on both sides; a limit of 0 does not."""
    if not limit:
        return gate, up
    return jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)


def _swiglu_linear(gate: jax.Array, up: jax.Array, w_FD: jax.Array, policy: Policy) -> jax.Array:
    """Returns linear(swiglu(gate, up), w): [..., F] twice -> [..., D]."""
    return linear_forward(swiglu(gate, up), w_FD, policy)


def _swiglu_linear_forward(gate, up, w_FD, policy):
    kept = _keep_fp8((gate, up), policy)
    return _swiglu_linear(gate, up, w_FD, policy), (kept, w_FD)


def _swiglu_linear_backward(policy, residuals, dy):
    kept, w_FD = residuals
    hidden, swiglu_backward = jax.vjp(swiglu, *_restore_fp8(kept, policy))
    dhidden, dw_FD = linear_backward(policy, (hidden, w_FD), dy)
    return *swiglu_backward(dhidden), dw_FD


swiglu_linear = jax.custom_vjp(_swiglu_linear, nondiff_argnums=(3,))
swiglu_linear.defvjp(_swiglu_linear_forward, _swiglu_linear_backward)


def weighted_swiglu(gate_AF: jax.Array, up_AF: jax.Array, weights_A: jax.Array) -> jax.Array:
    """Multiplies each row of `swiglu` by its float32 weight: [A, F] in gate's type."""
    hidden_AF = swiglu(gate_AF, up_AF).astype(jnp.float32) * weights_A[:, None]
    return hidden_AF.astype(gate_AF.dtype)


def _swiglu_grouped(
    gate_AF: jax.Array,
    up_AF: jax.Array,
    weights_A: jax.Array,
    w_EFD: jax.Array,
    sizes_E: jax.Array,
    policy: Policy,
) -> jax.Array:
    """Does what `swiglu_linear` does for rows sorted by expert, times each row's weight: [A, F]
    twice, float32 [A] -> [A, D].
    """
    # Rows are weighted before the product, not after: the weight's gradient is then a sum over F of
    # numbers that the backward pass has anyway. After it, the product would have to be kept or
    # recomputed.
    return grouped_forward(weighted_swiglu(gate_AF, up_AF, weights_A), w_EFD, sizes_E, policy)


def _swiglu_grouped_forward(gate_AF, up_AF, weights_A, w_EFD, sizes_E, policy):
    kept = _keep_fp8((gate_AF, up_AF), policy)
    y_AD = _swiglu_grouped(gate_AF, up_AF, weights_A, w_EFD, sizes_E, policy)
    return y_AD, (kept, weights_A, w_EFD, sizes_E)


def _swiglu_grouped_backward(policy, residuals, dy_AD):
    kept, weights_A, w_EFD, sizes_E = residuals
    gate_AF, up_AF = _restore_fp8(kept, policy)
    hidden_AF, swiglu_backward = jax.vjp(weighted_swiglu, gate_AF, up_AF, weights_A)
    dhidden_AF, dw_EFD, _ = grouped_backward(policy, (hidden_AF, w_EFD, sizes_E), dy_AD)
    return *swiglu_backward(dhidden_AF), dw_EFD, None


swiglu_grouped_linear = jax.custom_vjp(_swiglu_grouped, nondiff_argnums=(5,))
swiglu_grouped_linear.defvjp(_swiglu_grouped_forward, _swiglu_grouped_backward)


def _attention_linear_forward(x, w_DF, policy):
    kept = e5m6.pack(x) if policy.fp8 else x
    return linear_forward(x, w_DF, policy), (_named(kept, "attention"), w_DF)


def _attention_linear_backward(policy, residuals, dy):
    kept, w_DF = residuals
    # Seven significant bits times a power of two: exact in bfloat16 too.
    x = kept.unpack(policy.compute) if policy.fp8 else kept
    return linear_backward(policy, (x, w_DF), dy)


# linear(x, w) for attention's output x.
attention_linear = jax.custom_vjp(linear_forward, nondiff_argnums=(2,))
attention_linear.defvjp(_attention_linear_forward, _attention_linear_backward)


def _named(tree, name: str):
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), tree)


def _keep_fp8(arrays: tuple[jax.Array, ...], policy: Policy):
    if policy.fp8 is None:
        return _named(arrays, "swiglu_input")
    tiles = tuple(quantized(x, CHANNEL_TILE, policy) for x in arrays)
    return _named(tiles, "swiglu_input")


def _restore_fp8(kept, policy: Policy) -> tuple[jax.Array, ...]:
    return tuple(x.dequantize(policy.compute) for x in kept) if policy.fp8 else kept
