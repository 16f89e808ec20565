"""Which row holds which assignment, and back: permutations that never drop a token.

`plan` sorts assignments by expert, so that each expert's rows lie together; `dispatch` copies
tokens to their rows and `combine` sums what came of them. Both are permutations, and so are their
gradients: gathers both ways, no scatter, bit-reproducible. `dsjax.parallel.exchange` uses the same
plans for the way between devices, a device standing for an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Plan(NamedTuple):
    """Where each assignment goes. Assignment a = m * K + k is token m's k-th choice.

    A rows hold them. An assignment may go nowhere: its row is A. A row may hold none: its
    assignment is M * K.
    """

    order_A: jax.Array  # int32, the assignment that each row holds
    rows_MK: jax.Array  # int32, the row of each assignment
    sizes_E: jax.Array  # int32, rows of each expert


def plan(experts_MK: jax.Array, n_experts: int, n_rows: int | None = None) -> Plan:
    """Sorts assignments by expert, keeping token order inside an expert.

    Args:
      experts_MK: int32; `n_experts` for an assignment that goes nowhere.
      n_rows: rows to use, M * K unless given; there must be no more assignments that go somewhere.
    """
    experts_A = experts_MK.reshape(-1)
    none, n_rows = experts_A.size, experts_A.size if n_rows is None else n_rows
    order_A = jnp.argsort(experts_A, stable=True).astype(jnp.int32)
    rows_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(none, dtype=jnp.int32))
    # One bin more takes those that go nowhere.
    sizes_E = jnp.bincount(experts_A, length=n_experts + 1)[:-1].astype(jnp.int32)
    filled = jnp.arange(n_rows, dtype=jnp.int32) < sizes_E.sum()
    rows_A = jnp.where((experts_A < n_experts) & (rows_A < n_rows), rows_A, n_rows)
    return Plan(
        jnp.where(filled, order_A[:n_rows], none), rows_A.reshape(experts_MK.shape), sizes_E
    )


def padded_plan(experts_MK: jax.Array, n_experts: int, capacity: int) -> Plan:
    """Like `plan`, but expert e's rows start at e * capacity, and rows without assignment fill the
    gaps. No expert must have more than `capacity` assignments.
    """
    order_A, rows_MK, sizes_E = plan(experts_MK, n_experts)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    place_EX = jnp.arange(capacity, dtype=jnp.int32)[None]
    row_EX = jnp.where(place_EX < sizes_E[:, None], starts_E[:, None] + place_EX, order_A.size)
    padded = _take(order_A, row_EX.reshape(-1), order_A.size)
    expert_MK = jnp.minimum(experts_MK, n_experts - 1)
    slots_MK = expert_MK * capacity + rows_MK - starts_E[expert_MK]
    return Plan(padded, jnp.where(experts_MK < n_experts, slots_MK, n_experts * capacity), sizes_E)


def _take(x: jax.Array, index: jax.Array, fill: int = 0) -> jax.Array:
    """x[index]; an index behind the end gives `fill`."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=fill)


@jax.custom_vjp
def dispatch(x_MD: jax.Array, plan: Plan) -> jax.Array:
    """Copies each token to its experts' rows: [M, D] -> [A, D]; a row that holds none is 0."""
    return _take(x_MD, plan.order_A // plan.rows_MK.shape[1])


def _dispatch_backward(plan: Plan, dy_AD: jax.Array):
    return _take(dy_AD, plan.rows_MK).astype(jnp.float32).sum(axis=1).astype(dy_AD.dtype), None


dispatch.defvjp(lambda x_MD, plan: (dispatch(x_MD, plan), plan), _dispatch_backward)


@jax.custom_vjp
def undispatch(y_AD: jax.Array, plan: Plan) -> jax.Array:
    """Each assignment's row, 0 for one that goes nowhere: [A, D] -> [M, K, D]."""
    return _take(y_AD, plan.rows_MK)


def _undispatch_backward(plan: Plan, dz_MKD: jax.Array):
    return _take(dz_MKD.reshape(-1, dz_MKD.shape[-1]), plan.order_A), None


undispatch.defvjp(lambda y_AD, plan: (undispatch(y_AD, plan), plan), _undispatch_backward)


def combine(y_AD: jax.Array, weights_MK: jax.Array, plan: Plan) -> jax.Array:
    """Sums each token's expert outputs by weight, in float32: [A, D] -> [M, D] in y's dtype."""
    y_MKD = undispatch(y_AD, plan).astype(jnp.float32)
    return jnp.einsum("MKD,MK->MD", y_MKD, weights_MK).astype(y_AD.dtype)
