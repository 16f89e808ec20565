"""The one place that chooses the element type of a matrix product.

A `linear` has three products: forward, input gradient and weight gradient. Autodiff alone would run
the latter two in whatever types the cast left behind; here each is written down: operands in the
policy's compute type, accumulation in float32, activations back in the compute type, weight
gradients straight in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsjax.kernels.grouped_matmul import grouped_matmul, grouped_outer
from dsjax.precision.policy import Policy


def linear(x: jax.Array, w_DF: jax.Array, policy: Policy) -> jax.Array:
    """x[..., D] @ w[D, F] -> [..., F] in the compute type; w is the float32 master."""
    return _linear(x, w_DF, policy)


def _linear_product(x: jax.Array, w_DF: jax.Array, policy: Policy) -> jax.Array:
    compute = policy.compute
    return jnp.matmul(x.astype(compute), w_DF.astype(compute), preferred_element_type=compute)


def _linear_backward(policy: Policy, residuals, dy):
    x, w_DF = residuals
    compute = policy.compute
    dy = dy.astype(compute)
    dx = jnp.matmul(dy, w_DF.astype(compute).T, preferred_element_type=compute)
    rows = tuple(range(x.ndim - 1))
    dw_DF = jnp.tensordot(x.astype(compute), dy, (rows, rows), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw_DF.astype(w_DF.dtype)


_linear = jax.custom_vjp(_linear_product, nondiff_argnums=(2,))
_linear.defvjp(lambda x, w, policy: (_linear_product(x, w, policy), (x, w)), _linear_backward)


def grouped_linear(
    x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, policy: Policy
) -> jax.Array:
    """`linear` for rows sorted by expert: [A, D] with weights [E, D, F] -> [A, F]."""
    return _grouped(x_AD, w_EDF, sizes_E, policy)


def _grouped_product(
    x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, policy: Policy
) -> jax.Array:
    compute = policy.compute
    return grouped_matmul(x_AD.astype(compute), w_EDF.astype(compute), sizes_E, policy.platform)


def _grouped_backward(policy: Policy, residuals, dy_AF):
    x_AD, w_EDF, sizes_E = residuals
    compute, platform = policy.compute, policy.platform
    dy_AF, weight = dy_AF.astype(compute), w_EDF.astype(compute)
    dx_AD = grouped_matmul(dy_AF, weight, sizes_E, platform, transpose_w=True)
    dw_EDF = grouped_outer(x_AD.astype(compute), dy_AF, sizes_E, platform)
    return dx_AD.astype(x_AD.dtype), dw_EDF.astype(w_EDF.dtype), None


_grouped = jax.custom_vjp(_grouped_product, nondiff_argnums=(3,))
_grouped.defvjp(
    lambda x, w, sizes, policy: (_grouped_product(x, w, sizes, policy), (x, w, sizes)),
    _grouped_backward,
)


def float32_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """A true float32 product on every platform (a TPU would otherwise round the operands to
    bfloat16): the router's.
    """
    return jnp.matmul(
        x.astype(jnp.float32), w.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


def vocabulary_logits(x: jax.Array, w_DV: jax.Array, policy: Policy) -> jax.Array:
    """The output head's product: operands in the compute type, logits [..., V] in float32."""
    compute = policy.compute
    return jnp.matmul(x.astype(compute), w_DV.astype(compute), preferred_element_type=jnp.float32)
