"""The experts of a decoding step in which rows choose more matrices than there are, on a Hopper
GPU, in Triton: each chosen expert is read once, in place, and multiplies every row.

`dsjax.kernels.mixture_step` says what is computed. With up to 64 rows a product takes less time
than the reading of its matrix, so rows that did not choose the expert are multiplied too, and left
out of the sum. Nothing is sorted.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.expert_choice import power_of_two
from dsjax.kernels.few_rows import SwiGLU, padded, whole
from dsjax.kernels.mixture_step import DEPTH, Chosen

_WIDTH = 64  # columns of a program
_STAGES = 4  # parts of a matrix that are on their way
_EXPERTS = 4  # whose outputs a program adds up


def hidden_states(
    x_MD: jax.Array, chosen: Chosen, swiglu: SwiGLU, *, interpret: bool = False
) -> jax.Array:
    """Computes what `mixture_step.hidden_states` does of every expert that a row chose: [M, E * F +
    X]; of experts that no row chose, anything.
    """
    _, E, _, F = chosen.experts.gate.shape
    width = E * F + chosen.shared_width
    operands = x_MD, chosen.experts_MK, chosen.layer[None], *chosen.into
    return pl.pallas_call(
        functools.partial(_hidden_states, n_experts=E, swiglu=swiglu),
        out_shape=jax.ShapeDtypeStruct((len(x_MD), width), x_MD.dtype),
        grid=(width // _WIDTH,),
        in_specs=[whole(x) for x in operands],
        out_specs=pl.BlockSpec((len(x_MD), width), lambda _: (0, 0)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        name="grouped_hidden_states",
        interpret=interpret,
    )(*operands)


def _hidden_states(x, experts, layer, w_gate, w_up, *rest, n_experts: int, swiglu: SwiGLU) -> None:
    *shared, out = rest
    F = w_gate.shape[2]
    block = pl.program_id(0)

    def compute(read) -> None:
        def add(number, sums):
            depth = pl.ds(number * DEPTH, DEPTH)
            x_RX = _rows(x, number * DEPTH)
            return tuple(
                total + jnp.dot(x_RX, matrix, preferred_element_type=jnp.float32)
                for total, matrix in zip(sums, read(depth), strict=True)
            )

        nothing = jnp.zeros((padded(x.shape[0]), _WIDTH), jnp.float32)
        sums = lax.fori_loop(0, x.shape[1] // DEPTH, add, (nothing, nothing))
        gate, up = (total.astype(x.dtype).astype(jnp.float32) for total in sums)
        row_RW, column_RW = (lax.broadcasted_iota(jnp.int32, gate.shape, dim) for dim in (0, 1))
        own = out.at[row_RW, block * _WIDTH + column_RW]
        triton.store(own, swiglu(gate, up).astype(out.dtype), mask=row_RW < x.shape[0])

    expert = lax.div(block, F // _WIDTH)

    is_chosen_RK = _choices(experts, -1) == expert

    @pl.when(is_chosen_RK.astype(jnp.int32).sum(axis=1).sum(axis=0) > 0)
    def _():
        columns = pl.ds(lax.rem(block, F // _WIDTH) * _WIDTH, _WIDTH)
        number = layer[0] * n_experts + expert
        compute(lambda depth: [w[number, depth, columns] for w in (w_gate, w_up)])

    if shared:

        @pl.when(expert >= n_experts)
        def _():
            columns = pl.ds((block - n_experts * (F // _WIDTH)) * _WIDTH, _WIDTH)
            compute(lambda depth: [w[layer[0], depth, columns] for w in shared])


def mixed(
    x_MD: jax.Array, hidden_MX: jax.Array, chosen: Chosen, *, interpret: bool = False
) -> jax.Array:
    """Computes what `mixture_step.mixed` does of what `hidden_states` returns here."""
    (M, D), E = x_MD.shape, chosen.experts.down.shape[1]
    choices = chosen.experts_MK, chosen.weights_MK, chosen.layer[None]
    operands = hidden_MX, *choices, *chosen.out
    shape = (pl.cdiv(E, _EXPERTS) + len(chosen.out) - 1, M, D)
    parts_XMD = pl.pallas_call(
        functools.partial(_mixed, n_experts=E),
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=(shape[0], D // _WIDTH),
        in_specs=[whole(x) for x in operands],
        out_specs=pl.BlockSpec(shape, lambda *_: (0, 0, 0)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        name="grouped_mixed",
        interpret=interpret,
    )(*operands)
    return (x_MD.astype(jnp.float32) + parts_XMD.sum(axis=0)).astype(x_MD.dtype)


def _mixed(hidden, experts, weights, layer, w_down, *rest, n_experts: int) -> None:
    *shared, out = rest
    F = w_down.shape[1]
    part, start = pl.program_id(0), pl.program_id(1) * _WIDTH
    columns = pl.ds(start, _WIDTH)
    nothing = jnp.zeros((padded(hidden.shape[0]), _WIDTH), jnp.float32)

    def product(n_turns, first, read):
        def add(number, total_RW):
            h_RX = _rows(hidden, first + number * DEPTH)
            matrix = read(pl.ds(number * DEPTH, DEPTH))
            return total_RW + jnp.dot(h_RX, matrix, preferred_element_type=jnp.float32)

        return lax.fori_loop(0, n_turns, add, nothing)

    def write(total_RW) -> None:
        row_RW, column_RW = (lax.broadcasted_iota(jnp.int32, nothing.shape, dim) for dim in (0, 1))
        own = out.at[part, row_RW, start + column_RW]
        triton.store(own, total_RW, mask=row_RW < hidden.shape[0])

    def add_chosen(number, total_RW):
        expert = part * _EXPERTS + number
        # The last program's last numbers may be of no expert: no row chose them.
        is_chosen_RK = _choices(experts, -1) == expert
        times_R = is_chosen_RK.astype(jnp.int32).sum(axis=1)
        weights_R = jnp.where(is_chosen_RK, _choices(weights, 0.0), 0.0).sum(axis=1)
        n_turns = jnp.minimum(times_R.sum(axis=0), 1) * (F // DEPTH)
        matrix = layer[0] * n_experts + expert
        out_RW = product(n_turns, expert * F, lambda depth: w_down[matrix, depth, columns])
        # A row may not be able to represent what an expert that it did not choose makes of it.
        return total_RW + jnp.where(times_R[:, None] > 0, weights_R[:, None] * out_RW, 0.0)

    n_parts = -(-n_experts // _EXPERTS)

    @pl.when(part < n_parts)
    def _():
        write(lax.fori_loop(0, _EXPERTS, add_chosen, nothing))

    for w in shared:

        @pl.when(part == n_parts)
        def _(w=w):
            n_turns = w.shape[1] // DEPTH
            write(product(n_turns, n_experts * F, lambda depth: w[layer[0], depth, columns]))


def _rows(array, start):
    """Reads a part of every row, [R, 64]; rows that are not there are zeros."""
    shape = padded(array.shape[0]), DEPTH
    row_RX, column_RX = (lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
    return triton.load(array.at[row_RX, start + column_RX], mask=row_RX < array.shape[0], other=0.0)


def _choices(array_MK, other):
    """Reads one number for each choice, [R, power of two]; `other` for those that are not there."""
    M, K = array_MK.shape
    shape = padded(array_MK.shape[0]), power_of_two(K)
    row_RK, choice_RK = (lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (0, 1))
    is_choice_RK = (row_RK < M) & (choice_RK < K)
    return triton.load(array_MK.at[row_RK, choice_RK], mask=is_choice_RK, other=other)
