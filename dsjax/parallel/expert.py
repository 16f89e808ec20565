"""Bringing tokens to their experts and back, without ever dropping one.

`dispatch` sorts the M*K assignments by expert, so that each expert's rows lie together; `combine`
undoes the order. Both are permutations, and so are their gradients: gathers both ways, no scatter,
bit-reproducible.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
    """Where each assignment goes. Assignment a = m * K + k is token m's k-th choice."""

    order_A: jax.Array  # int32, the assignment that each sorted row holds
    rows_MK: jax.Array  # int32, the sorted row of each assignment
    sizes_E: jax.Array  # int32, rows of each expert


def plan(experts_MK: jax.Array, n_experts: int) -> Plan:
    """Sorts assignments by expert, keeping token order inside an expert."""
    experts_A = experts_MK.reshape(-1)
    order_A = jnp.argsort(experts_A, stable=True).astype(jnp.int32)
    rows_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(order_A.size, dtype=jnp.int32))
    sizes_E = jnp.bincount(experts_A, length=n_experts).astype(jnp.int32)
    return Plan(order_A, rows_A.reshape(experts_MK.shape), sizes_E)


@jax.custom_vjp
def dispatch(x_MD: jax.Array, plan: Plan) -> jax.Array:
    """Copies each token to its experts' rows: [M, D] -> [A, D]."""
    return x_MD[plan.order_A // plan.rows_MK.shape[1]]


def _dispatch_backward(plan: Plan, dy_AD: jax.Array):
    return dy_AD[plan.rows_MK].astype(jnp.float32).sum(axis=1).astype(dy_AD.dtype), None


dispatch.defvjp(lambda x_MD, plan: (dispatch(x_MD, plan), plan), _dispatch_backward)


@jax.custom_vjp
def _unsort(y_AD: jax.Array, plan: Plan) -> jax.Array:
    """[A, D] -> [M, K, D]."""
    return y_AD[plan.rows_MK]


def _unsort_backward(plan: Plan, dz_MKD: jax.Array):
    return dz_MKD.reshape(-1, dz_MKD.shape[-1])[plan.order_A], None


_unsort.defvjp(lambda y_AD, plan: (_unsort(y_AD, plan), plan), _unsort_backward)


def combine(y_AD: jax.Array, weights_MK: jax.Array, plan: Plan) -> jax.Array:
    """Sums each token's expert outputs by weight, in float32: [A, D] -> [M, D] in y's dtype."""
    y_MKD = _unsort(y_AD, plan).astype(jnp.float32)
    return jnp.einsum("MKD,MK->MD", y_MKD, weights_MK).astype(y_AD.dtype)
