"""Which row holds which assignment, and back: permutations that never drop a token.

An assignment is a pair of a token and one of its experts. `sort_by_expert` makes each expert's rows
contiguous, `dispatch` copies tokens to their rows, and `combine` sums each token's rows. Both are
permutations and so are their gradients: gathers in both directions, no scatter, reproducible to the
bit. `dsjax.parallel.expert_parallel` uses the same plans between devices, a device taking the place
of an expert.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsjax.kernels.varying import vary_as


class Plan(NamedTuple):
    """Which of A rows holds which assignment. Assignment a = k * M + m is token m's k-th choice.

    Choices are the leading dimension: a TPU pads the last dimension to 128, and a token has only K
    choices. An assignment that goes nowhere has row A; a row without one has assignment K * M.
    """

    order_A: jax.Array  # int32, the assignment of each row
    rows_KM: jax.Array  # int32, the row of each assignment
    sizes_E: jax.Array  # int32, rows per expert

    @property
    def tokens_A(self) -> jax.Array:
        """Returns each row's token, int32, M for a row without one."""
        M = self.rows_KM.shape[1]
        return jnp.where(self.order_A < self.rows_KM.size, self.order_A % M, M)


def sort_by_expert(experts_MK: jax.Array, n_experts: int, n_rows: int | None = None) -> Plan:
    """Sorts assignments by expert, then by token.

    Args:
      experts_MK: int32; `n_experts` for an assignment that goes nowhere.
      n_rows: M * K unless given; at least the number of assignments that go somewhere.
    """
    experts_KM = experts_MK.T
    none, n_rows = experts_KM.size, experts_KM.size if n_rows is None else n_rows
    order_A = checkpoint_name(_sort(experts_KM, n_experts), "routing")
    places_A = jnp.arange(none, dtype=jnp.int32)
    rows_A = jnp.zeros_like(order_A).at[order_A].set(places_A, unique_indices=True)
    rows_KM = checkpoint_name(rows_A.reshape(experts_KM.shape), "routing")
    sizes_E = count(experts_KM, n_experts)
    return Plan(
        jnp.where(places_A < sizes_E.sum(), order_A, none)[:n_rows],
        jnp.where((experts_KM < n_experts) & (rows_KM < n_rows), rows_KM, n_rows),
        sizes_E,
    )


def _sort(experts_KM: jax.Array, n_experts: int) -> jax.Array:
    """Returns the assignments by expert, then by token: int32 [A]."""
    (K, M), A = experts_KM.shape, experts_KM.size
    token_1M, choice_K1 = (
        jnp.arange(M, dtype=jnp.int32)[None],
        jnp.arange(K, dtype=jnp.int32)[:, None],
    )
    by_token_KM = token_1M * K + choice_K1
    if (n_experts + 1) * A <= 2**31:
        # Both keys in one number: half the data to move, and a third of the TPU's compile time.
        keys_A = (experts_KM * A + by_token_KM).reshape(-1)
        by_token_A = lax.sort(keys_A, is_stable=False) % A
    else:
        keys = experts_KM.reshape(-1), by_token_KM.reshape(-1)
        by_token_A = lax.sort(keys, num_keys=2, is_stable=False)[1]
    return by_token_A % K * M + by_token_A // K


def count(experts: jax.Array, n_experts: int) -> jax.Array:
    """Counts how often each expert is named, int32 [E]; other numbers are ignored."""
    named = experts.reshape(1, -1) == jnp.arange(n_experts, dtype=experts.dtype)[:, None]
    return named.sum(axis=1, dtype=jnp.int32)


def bucket_by_expert(experts_MK: jax.Array, n_experts: int, capacity: int) -> Plan:
    """Does what `sort_by_expert` does, but expert e's rows start at e * capacity, with empty rows
    in the gaps. No expert may have more than `capacity` assignments.
    """
    order_A, rows_KM, sizes_E = sort_by_expert(experts_MK, n_experts)
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    place_EX = jnp.arange(capacity, dtype=jnp.int32)[None]
    row_EX = jnp.where(place_EX < sizes_E[:, None], starts_E[:, None] + place_EX, order_A.size)
    padded = _take(order_A, row_EX.reshape(-1), order_A.size)
    experts_KM = experts_MK.T
    expert_KM = jnp.minimum(experts_KM, n_experts - 1)
    slots_KM = expert_KM * capacity + rows_KM - starts_E[expert_KM]
    return Plan(padded, jnp.where(experts_KM < n_experts, slots_KM, n_experts * capacity), sizes_E)


def _take(x: jax.Array, index: jax.Array, fill: int = 0) -> jax.Array:
    """Returns x[index]; an index past the end gives `fill`."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=fill)


@jax.custom_vjp
def dispatch(x_MD: jax.Array, plan: Plan) -> jax.Array:
    """Copies each token to its experts' rows: [M, D] -> [A, D]; empty rows are 0."""
    return _take(x_MD, plan.tokens_A)


@jax.custom_vjp
def combine(y_AD: jax.Array, plan: Plan) -> jax.Array:
    """Sums each token's rows, in float32: [A, D] -> [M, D] in y's dtype."""
    # One choice at a time: all at once would take K times the tokens' memory. A TPU needs a loop
    # for that; on CPUs and GPUs the unrolled sum is fused into one pass.
    return lax.platform_dependent(
        y_AD,
        plan.rows_KM,
        tpu=partial(_sum_choices, unroll=False),
        default=partial(_sum_choices, unroll=True),
    )


def _sum_choices(y_AD: jax.Array, rows_KM: jax.Array, *, unroll: bool) -> jax.Array:
    def add(total_MD: jax.Array, row_M: jax.Array):
        return total_MD + _take(y_AD, row_M).astype(jnp.float32), None

    start_MD = vary_as(jnp.zeros((rows_KM.shape[1], y_AD.shape[1]), jnp.float32), y_AD, rows_KM)
    return lax.scan(add, start_MD, rows_KM, unroll=unroll)[0].astype(y_AD.dtype)


@jax.custom_vjp
def undispatch(y_AD: jax.Array, plan: Plan) -> jax.Array:
    """Returns each assignment's row, 0 for one that goes nowhere: [A, ...] -> [K, M, ...]."""
    return _take(y_AD, plan.rows_KM)


@jax.custom_vjp
def dispatch_choices(z_KM: jax.Array, plan: Plan) -> jax.Array:
    """Copies each assignment's values to its row: [K, M, ...] -> [A, ...]; empty rows are 0."""
    return _take(z_KM.reshape(-1, *z_KM.shape[2:]), plan.order_A)


def _transpose_each_other(forward: Any, back: Any) -> None:
    """Makes each the backward pass of the other; autodiff would scatter where both gather."""
    for function, transpose in ((forward, back), (back, forward)):
        function.defvjp(
            lambda x, plan, function=function: (function(x, plan), plan),
            lambda plan, dy, transpose=transpose: (transpose(dy, plan), None),
        )


_transpose_each_other(dispatch, combine)
_transpose_each_other(undispatch, dispatch_choices)
