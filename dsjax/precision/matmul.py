"""The one place that chooses the element type of a matrix product.

A `linear` has three products: forward, input gradient and weight gradient. Autodiff alone would run the latter two in
whatever types the cast left behind; here each is written down: operands in the policy's compute type,
accumulation in float32, activations back in the compute type, weight gradients straight in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from dsjax.kernels.grouped_matmul import grouped_matmul, grouped_outer
from dsjax.precision.policy import Policy


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w_DF: jax.Array, policy: Policy) -> jax.Array:
    """x[..., D] @ w[D, F] -> [..., F] in the compute type; w is the float32 master."""
    compute = policy.compute
    return jnp.matmul(x.astype(compute), w_DF.astype(compute), preferred_element_type=compute)


def _linear_forward(x, w_DF, policy):
    return linear(x, w_DF, policy), (x, w_DF)


def _linear_backward(policy, residuals, dy):
    x, w_DF = residuals
    compute = policy.compute
    dy = dy.astype(compute)
    dx = jnp.matmul(dy, w_DF.astype(compute).T, preferred_element_type=compute).astype(x.dtype)
    leading = tuple(range(x.ndim - 1))
    dw_DF = jnp.tensordot(
        x.astype(compute), dy, (leading, leading), preferred_element_type=jnp.float32
    )
    return dx, dw_DF.astype(w_DF.dtype)


linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_linear(
    x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, policy: Policy
) -> jax.Array:
    """`linear` for rows sorted by expert: [A, D] with weights [E, D, F] -> [A, F] in the compute type."""
    compute = policy.compute
    return grouped_matmul(x_AD.astype(compute), w_EDF.astype(compute), sizes_E, policy.platform)


def _grouped_forward(x_AD, w_EDF, sizes_E, policy):
    return grouped_linear(x_AD, w_EDF, sizes_E, policy), (x_AD, w_EDF, sizes_E)


def _grouped_backward(policy, residuals, dy_AF):
    x_AD, w_EDF, sizes_E = residuals
    compute = policy.compute
    dy_AF = dy_AF.astype(compute)
    weight = w_EDF.astype(compute)
    dx_AD = grouped_matmul(dy_AF, weight, sizes_E, policy.platform, transpose_w=True)
    dw_EDF = grouped_outer(x_AD.astype(compute), dy_AF, sizes_E, policy.platform)
    return dx_AD.astype(x_AD.dtype), dw_EDF.astype(w_EDF.dtype), None


grouped_linear.defvjp(_grouped_forward, _grouped_backward)


def float32_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """A true float32 product on every platform (a TPU would otherwise round the operands to bfloat16): the router's."""
    return jnp.matmul(
        x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def vocabulary_logits(x: jax.Array, w_DV: jax.Array, policy: Policy) -> jax.Array:
    """The output head's product: operands in the compute type, logits [..., V] in float32."""
    compute = policy.compute
    return jnp.matmul(x.astype(compute), w_DV.astype(compute), preferred_element_type=jnp.float32)
