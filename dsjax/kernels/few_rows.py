"""Products of a decoding step's few rows with one layer's matrices, for Hopper GPUs, in Triton.

The matrices are read in place from the stacks of all layers, which XLA copies a layer out of before
it multiplies several rows; and for a single row it has no product but a sum in parts, which takes a
kernel more. A norm before the products and the residual after one are part of the kernel: there,
starting kernels takes the time.

A program computes a few columns, and reads all of their depth. A matrix unit takes 16 rows, of
which most are zeros; reading the matrices takes the time. Products are added up in a few sums by
turns, since each waits for the one before it in its own sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.target import Target
from dsjax.kernels.varying import by_hand

MOST_ROWS = 64
FEWEST_ROWS = 16  # of a matrix unit
_DEPTH = 64  # of what is read at once
_SUMS = 4
_WIDTHS = 64, 32, 16  # columns of a program
_STAGES = 3  # reads that are under way

SwiGLU = Callable[[jax.Array, jax.Array], jax.Array]


class Norm(NamedTuple):
    """The root mean square norms of all layers."""

    weight_LD: Any
    eps: float


def fits(n_rows: int, matrices: Sequence[Any], dtype: Any, target: Target) -> bool:
    """Returns whether the kernel takes these operands here: few rows, bfloat16, whole blocks, and
    no mesh axis left to the compiler.

    Args:
      matrices: stacks of matrices [L, D, F].
      dtype: of the rows.
    """
    return (
        target.is_hopper
        and by_hand()
        and n_rows <= MOST_ROWS
        and dtype == jnp.bfloat16
        # Small weights are no arrays.
        and all(isinstance(w, jax.Array) and w.dtype == dtype for w in matrices)
        and all(w.shape[1] % _DEPTH == 0 and w.shape[2] % _WIDTHS[-1] == 0 for w in matrices)
    )


def padded(n_rows: int) -> int:
    """Returns how many rows a matrix unit is given for so many."""
    return max(1 << (n_rows - 1).bit_length(), FEWEST_ROWS)


def few_row_products(
    x_MD: jax.Array,
    matrices: Sequence[jax.Array],
    layer: jax.Array,
    *,
    norm: Norm | None = None,
    residual_MF: jax.Array | None = None,
    multiprocessors: int,
    interpret: bool = False,
) -> list[jax.Array]:
    """Multiplies rows by one matrix of each of some stacks [L, D, F], which may differ in F.

    Args:
      layer: int32 scalar.
      norm: of the rows, before they are multiplied.
      residual_MF: is added to the product with the only matrix.
      interpret: whether to interpret the kernel, on any machine.

    Returns:
      [M, F] for each stack, summed in float32, in the rows' dtype.
    """
    M = x_MD.shape[0]
    width = columns_of_program([w.shape[2] for w in matrices], multiprocessors)
    counts = [w.shape[2] // width for w in matrices]
    beside = ([norm.weight_LD] if norm else []) + ([] if residual_MF is None else [residual_MF])
    operands = [layer[None], x_MD, *matrices, *beside]
    results = [jax.ShapeDtypeStruct((M, w.shape[2]), x_MD.dtype) for w in matrices]
    return pl.pallas_call(
        functools.partial(
            _kernel, counts=counts, width=width, eps=norm.eps if norm else None,
            adds=residual_MF is not None,
        ),
        out_shape=results,
        grid=(sum(counts),),
        in_specs=[whole(each) for each in operands],
        out_specs=[whole(each) for each in results],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        name="few_row_products",
        interpret=interpret,
    )(*operands)  # fmt: skip


def few_row_swiglu(
    x_MD: jax.Array,
    gate_LDF: jax.Array,
    up_LDF: jax.Array,
    layer: jax.Array,
    norm: Norm,
    swiglu: SwiGLU,
    *,
    multiprocessors: int,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies normed rows by one matrix of each of two stacks, and combines both products.

    Args:
      layer: int32 scalar.
      swiglu: of two float32 arrays.
      interpret: whether to interpret the kernel, on any machine.

    Returns:
      [M, F] in the rows' dtype.
    """
    M, F = x_MD.shape[0], gate_LDF.shape[2]
    width = columns_of_program([F], multiprocessors)
    operands = layer[None], x_MD, gate_LDF, up_LDF, norm.weight_LD
    result = jax.ShapeDtypeStruct((M, F), x_MD.dtype)
    return pl.pallas_call(
        functools.partial(_swiglu_kernel, width=width, eps=norm.eps, swiglu=swiglu),
        out_shape=result,
        grid=(F // width,),
        in_specs=[whole(each) for each in operands],
        out_specs=whole(result),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=_STAGES),
        name="few_row_swiglu",
        interpret=interpret,
    )(*operands)


def whole(array: Any) -> pl.BlockSpec:
    """Says that every program sees all of an array."""
    return pl.BlockSpec(array.shape, lambda *program: (0,) * len(array.shape))


def columns_of_program(widths: Sequence[int], multiprocessors: int) -> int:
    """Returns the most columns of a program with which all multiprocessors have one, if any."""
    fitting = [width for width in _WIDTHS if all(each % width == 0 for each in widths)]
    busy = [width for width in fitting if sum(widths) // width >= multiprocessors]
    return busy[0] if busy else fitting[-1]


def _kernel(layer, x, *refs, counts, width: int, eps: float | None, adds: bool):
    matrices, rest = refs[: len(counts)], list(refs[len(counts) :])
    norm = rest.pop(0) if eps is not None else None
    residual = rest.pop(0) if adds else None
    block, first = pl.program_id(0), 0
    for w, out, count in zip(matrices, rest, counts, strict=True):
        columns = (block - first) * width

        def compute(w=w, out=out, columns=columns):
            y_RF = product(x, w, norm, layer[0], columns, width, eps).astype(out.dtype)
            places, is_row = places_of(y_RF.shape, x.shape[0], columns)
            if residual is not None:
                y_RF = triton.load(residual.at[places], mask=is_row, other=0.0) + y_RF
            triton.store(out.at[places], y_RF, mask=is_row)

        if len(counts) == 1:
            compute()
        else:
            pl.when((block >= first) & (block < first + count))(compute)
        first += count


def _swiglu_kernel(layer, x, w_gate, w_up, norm, out, *, width: int, eps: float, swiglu: SwiGLU):
    columns = pl.program_id(0) * width
    # Rounded, as products are elsewhere.
    gate_RF, up_RF = (
        product(x, w, norm, layer[0], columns, width, eps).astype(out.dtype).astype(jnp.float32)
        for w in (w_gate, w_up)
    )
    places, is_row = places_of(gate_RF.shape, x.shape[0], columns)
    triton.store(out.at[places], swiglu(gate_RF, up_RF).astype(out.dtype), mask=is_row)


def product(x, w, norm, layer, columns, width: int, eps: float | None):
    """Returns the rows' products with some columns of a layer's matrix, float32 [R, F]."""
    M, D = x.shape
    n_sums = math.gcd(_SUMS, D // _DEPTH)
    part = D // n_sums
    rows = padded(M)

    def read(start):
        places, is_row = places_of((rows, _DEPTH), M, start)
        return triton.load(x.at[places], mask=is_row, other=0.0)

    def turn(step, found):
        sums, squares_RD = found
        added = []
        for number, sum_RF in enumerate(sums):
            start = number * part + step * _DEPTH
            x_RD = read(start)
            if norm is not None:
                x32_RD = x_RD.astype(jnp.float32)
                squares_RD += x32_RD * x32_RD
                # The root mean square divides the sums.
                x32_RD = x32_RD * norm[layer, pl.ds(start, _DEPTH)].astype(jnp.float32)[None]
                x_RD = x32_RD.astype(x_RD.dtype)
            w_DF = w[layer, pl.ds(start, _DEPTH), pl.ds(columns, width)]
            added.append(sum_RF + jnp.dot(x_RD, w_DF, preferred_element_type=jnp.float32))
        return tuple(added), squares_RD

    start = (
        (jnp.zeros((rows, width), jnp.float32),) * n_sums,
        jnp.zeros((rows, _DEPTH), jnp.float32),
    )
    sums, squares_RD = lax.fori_loop(0, part // _DEPTH, turn, start)
    y_RF = functools.reduce(jnp.add, sums)
    if eps is None:
        return y_RF
    return y_RF * lax.rsqrt(squares_RD.sum(axis=1) / D + eps)[:, None]


def places_of(shape: Sequence[int], n_rows: int, start: Any):
    """Returns the indices of a block of columns of all rows, and which are of a row that is one."""
    row_RX, column_RX = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return (row_RX, column_RX + start), row_RX < n_rows
