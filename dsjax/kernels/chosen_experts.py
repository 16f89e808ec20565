"""The experts that tokens chose, each read in place from a stack of all, for tokens that are added
to a cache. Where many tokens keep a GPU or TPU busy, `grouped_matmul` is faster.

* On a CPU the chosen experts run one after another. Each has its three matrices copied out of the
  stack once, and multiplies its own tokens in small blocks, which stay in a core's cache with it.
* On a CPU, in float32, where tokens choose no more matrices than there are, the choices of all
  tokens are the rows of a sparse matrix, which multiplies the stack where it lies: copies would
  take longer than the products. Two such products at a time run on two cores.
* On a GPU all choices of all tokens are computed at once, each reading its own matrices, by one
  kernel per product: there, launching kernels takes the time.
* On a Hopper GPU, where tokens choose more matrices than there are, their rows are sorted, and the
  grouped product reads each matrix once from the stack. A product that is given one layer's experts
  has them copied out of the stack first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsjax.kernels import hopper_grouped
from dsjax.kernels.target import Target

Stack = Any

_SMALLEST_BLOCK, _LARGEST_BLOCK = 4, 256  # rows of an expert on a CPU
# More multiplications than this jaxlib's sparse product hands to other threads, and goes on with
# what does not wait for it. It counts the places for values, whether or not a row has them.
_MOST_AT_ONCE = 1_600_000
_WORTH_HANDING_OVER = 2**18  # multiplications, of 1 MB of weights, which take 30 us to read


def chosen_experts(
    x_MD: jax.Array,
    w_gate_EDF: Stack,
    w_up_EDF: Stack,
    w_down_EFD: Stack,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    target: Target,
    at_use: Callable[[Stack, DTypeLike], Any],
    swiglu: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    n_experts: int,
) -> jax.Array:
    """Sums each token's SwiGLU experts by weight.

    Args:
      x_MD: tokens.
      w_gate_EDF, w_up_EDF, w_down_EFD: stacks of matrices, arrays or pytrees of arrays whose first
        dimension is E.
      experts_MK: int32, the experts of each token.
      weights_MK: float32.
      target: not a TPU.
      at_use: makes an array of the tokens' dtype of what was read from a stack; on a CPU, what can
        stand on the right of a product.
      swiglu: of the two products of a token.
      n_experts: how many a token chooses from; the stacks may hold those of other layers too.

    Returns:
      [M, D] in x's dtype, summed in float32.
    """
    stacks = w_gate_EDF, w_up_EDF, w_down_EFD
    few = experts_MK.size <= n_experts
    if target.kind == "cpu" and few and _all_float32(x_MD, *stacks):
        compute = _as_sparse_rows
    elif target.kind != "gpu":
        compute = functools.partial(_one_by_one, n_experts=n_experts)
    elif not few and grouped_in_place(x_MD.dtype, stacks, target):
        compute = functools.partial(_grouped, n_experts=n_experts, target=target)
    else:
        compute = _at_once
    y_MD = compute(x_MD, *stacks, experts_MK, weights_MK, lambda w: at_use(w, x_MD.dtype), swiglu)
    return y_MD.astype(x_MD.dtype)


def is_faster(
    n_tokens: int, top_k: int, n_experts: int, target: Target, *, in_place: bool = False
) -> bool:
    """Returns whether `chosen_experts` is faster than the grouped product of one layer's experts.

    Args:
      in_place: what `grouped_in_place` says of the stacks.
    """
    if target.kind == "gpu":
        return in_place or n_tokens * top_k <= n_experts  # no more matrices than there are
    return target.kind == "cpu"


def grouped_in_place(dtype: DTypeLike, stacks: Sequence[Stack], target: Target) -> bool:
    """Returns whether a grouped product of rows of this dtype reads these stacks as they are."""

    def fits(stack: Stack) -> bool:
        if not isinstance(stack, jax.Array):
            return False  # small weights
        *_, depth, width = stack.shape
        rows = jax.ShapeDtypeStruct((1, depth), dtype)
        return hopper_grouped.fits(rows, jax.ShapeDtypeStruct((1, depth, width), stack.dtype))

    return target.is_hopper and all(map(fits, stacks))


def _all_float32(*operands: Stack) -> bool:
    return all(isinstance(array, jax.Array) and array.dtype == jnp.float32 for array in operands)


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


def _grouped(
    x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, experts_MK, weights_MK, at_use, swiglu, *,
    n_experts, target,
):  # fmt: skip
    del at_use  # the stacks are of the tokens' dtype
    M, K = experts_MK.shape
    first_group = experts_MK[0, 0] // n_experts * n_experts
    experts_A = experts_MK.reshape(-1) - first_group
    order_A = jnp.argsort(experts_A, stable=True)
    expert_E1 = jnp.arange(n_experts, dtype=experts_A.dtype)[:, None]
    sizes_E = (experts_A[None] == expert_E1).sum(axis=1, dtype=jnp.int32)
    multiply = functools.partial(
        hopper_grouped.matmul,
        sizes_E=sizes_E,
        first_group=first_group,
        multiprocessors=target.multiprocessors,
    )
    x_AD = x_MD[order_A // K]
    gate, up = (multiply(x_AD, w, dtype=x_MD.dtype) for w in (w_gate_EDF, w_up_EDF))
    out_AD = multiply(swiglu(gate, up), w_down_EFD, dtype=jnp.float32)
    out_MKD = out_AD[jnp.argsort(order_A)].reshape(M, K, -1)
    return (out_MKD * weights_MK[..., None]).sum(axis=1)


def _as_sparse_rows(x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, experts_MK, weights_MK, at_use, swiglu):
    del at_use  # all is float32
    M, K = experts_MK.shape
    A = experts_MK.size
    if M == 1:  # a token's experts differ
        experts_A, x_AD = experts_MK[0], jnp.broadcast_to(x_MD, (K, x_MD.shape[1]))
        places_A = jnp.arange(K, dtype=jnp.int32)
    else:
        # Rows of one expert follow each other, so all but the first find it in a core's cache.
        order_A = jnp.argsort(experts_MK.reshape(-1), stable=True)
        experts_A, x_AD = experts_MK.reshape(-1)[order_A], x_MD[order_A // K]
        places_A = jnp.argsort(order_A).astype(jnp.int32)

    def products(
        x_AX: jax.Array, stacks: Sequence[jax.Array], parts: Sequence[tuple[int, int]]
    ) -> list[jax.Array]:
        """Multiplies parts of the rows, each from its first row's beginning to its last one's end,
        by the matrices of their experts in each stack.
        """
        X, Y = stacks[0].shape[1:]
        # Row a has its values in the columns of its expert's rows in the stack.
        columns_AX = experts_A[:, None] * X + jnp.arange(X, dtype=jnp.int32)[None]
        beside = A * X * Y >= _WORTH_HANDING_OVER
        unused = max(_MOST_AT_ONCE // Y + 1 - A * X, 0) if beside else 0
        values, columns = (jnp.pad(each.reshape(-1), (0, unused)) for each in (x_AX, columns_AX))
        # Products that ran one after the other would share memory, and then have to: one's result
        # would lie where the other's values were. So all read the same values.
        return [
            _sparse_product(values, columns, jnp.arange(*part, dtype=jnp.int32) * X, stack)
            for stack in stacks
            for part in parts
        ]

    gate, up = products(x_AD, (w_gate_EDF, w_up_EDF), [(0, A + 1)])
    halves = [(0, A // 2 + 1), (A // 2, A + 1)] if A > 1 else [(0, 2)]
    out_AD = jnp.concatenate(products(swiglu(gate, up), (w_down_EFD,), halves))
    begins = jnp.arange(0, A + 1, K, dtype=jnp.int32)
    return _sparse_product(weights_MK.reshape(-1), places_A, begins, out_AD[:, None])


def _sparse_product(
    values: jax.Array, columns: jax.Array, begins: jax.Array, stack_EXY: jax.Array
) -> jax.Array:
    """Multiplies a matrix in compressed sparse rows by the stack's matrices, one below the other.

    Args:
      begins: int32, where each row's values begin, and where the last one's end.
    """
    # Here, for it imports SciPy, which nothing else in a program needs.
    from jax.experimental import sparse

    E, X, Y = stack_EXY.shape
    rows = sparse.BCSR((values, columns, begins), shape=(begins.size - 1, E * X))
    return rows @ stack_EXY.reshape(E * X, Y)


def _one_by_one(
    x_MD, w_gate_EDF, w_up_EDF, w_down_EFD, experts_MK, weights_MK, at_use, swiglu, *, n_experts
):
    (M, K), count = experts_MK.shape, experts_MK.size
    # An expert's usual share of the rows; a product of four takes hardly longer than one of one.
    size = min(max(-(-count // n_experts), _SMALLEST_BLOCK), M, _LARGEST_BLOCK)
    size = 1 << (size - 1).bit_length()
    order_A = jnp.argsort(experts_MK.reshape(-1), stable=True)
    experts_A = experts_MK.reshape(-1)[order_A]
    begins_A = jnp.pad(experts_A[1:] != experts_A[:-1], (1, 0), constant_values=True)
    # The first row of each chosen expert, then the number of rows.
    row_A = jnp.arange(count, dtype=jnp.int32)
    starts_A = jnp.append(jnp.sort(jnp.where(begins_A, row_A, count)), jnp.int32(count))
    # The last block of an expert runs into rows of the next, which are overwritten.
    x_AD = jnp.pad(x_MD[order_A // K], ((0, size), (0, 0)))

    def matrix(stack: Stack, expert: jax.Array) -> jax.Array:
        read = functools.partial(lax.dynamic_index_in_dim, index=expert, keepdims=False)
        return at_use(jax.tree.map(read, stack))

    def run(index: jax.Array, out_AD: jax.Array) -> jax.Array:
        start = starts_A[index]
        stacks = w_gate_EDF, w_up_EDF, w_down_EFD
        gate_DF, up_DF, down_FD = (matrix(stack, experts_A[start]) for stack in stacks)

        def block(number: jax.Array, out_AD: jax.Array) -> jax.Array:
            row = start + number * size
            x_XD = lax.dynamic_slice_in_dim(x_AD, row, size)
            out_XD = swiglu(x_XD @ gate_DF, x_XD @ up_DF) @ down_FD
            return lax.dynamic_update_slice_in_dim(out_AD, out_XD.astype(out_AD.dtype), row, 0)

        return lax.fori_loop(0, -(-(starts_A[index + 1] - start) // size), block, out_AD)

    out_AD = lax.fori_loop(0, begins_A.sum(), run, jnp.zeros(x_AD.shape, jnp.float32))
    out_MKD = out_AD[jnp.argsort(order_A)].reshape(M, K, -1)
    return (out_MKD * weights_MK[..., None]).sum(axis=1)
