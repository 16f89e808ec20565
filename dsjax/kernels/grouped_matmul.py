"""Grouped matrix products: rows sorted by group, one weight matrix per group.

`grouped_matmul(x_AD, w_EDF, sizes_E)` multiplies the first `sizes[0]` rows with `w[0]`, the next
`sizes[1]` with `w[1]`, and so on, as the experts of a mixture do. `grouped_outer` is the product
that the weight gradient needs. Every row belongs to a group (the sizes sum to A), so no row is
dropped and none is left uninitialised.

The target chooses among three implementations:

* tpu: the Mosaic kernel that ships with JAX (megablox). `lax.ragged_dot` turns into a dense masked
  product on v5e, v6e and tpu7x, E times the useful work.
* cpu: plain XLA, blocks of rows inside a loop over groups. Large blocks keep the product fast,
  small ones finish a group, so at most one small block per group is wasted; each weight is read
  once.
* gpu: `dsjax.kernels.hopper_grouped` on a Hopper, for operands of two bytes and widths in multiples
  of 64; else the kernel that tokamax chooses, where it is installed; else `lax.ragged_dot_general`.

On the CPU groups are processed in order, and a block may run past the end of its group: those rows
are overwritten when their own group is processed. So no padding between groups is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsjax.kernels import hopper_grouped
from dsjax.kernels.target import Target, tokamax
from dsjax.kernels.varying import call_shipped, vary_as

_LARGE_BLOCK, _SMALL_BLOCK = 256, 32
_MEGABLOX_TILE = 512


def grouped_matmul(
    x_AD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    target: Target,
    *,
    transpose_w: bool = False,
    dtype: DTypeLike | None = None,
    first: jax.Array | None = None,
) -> jax.Array:
    """Multiplies each group's rows by its matrix.

    Args:
      x_AD: rows sorted by group, any float dtype.
      w_EDF: one matrix per group, of x's dtype; [E, F, D] with `transpose_w`.
      sizes_E: int32, the number of rows in each group; they sum to A.
      dtype: of the result; x's by default.
      first: int32, which of w's matrices is the first group's, if w holds more of them, such as
        those of all layers. On a TPU the kernel then reads those it needs where they lie; to take
        them out would copy them.

    Returns:
      [A, F], accumulated in float32.
    """
    if first is not None:
        if target.kind == "tpu":
            return _megablox_matmul(x_AD, w_EDF, sizes_E, transpose_w, dtype or x_AD.dtype, first)
        w_EDF = lax.dynamic_slice_in_dim(w_EDF, first, len(sizes_E))
    gpu = functools.partial(_gpu_matmul, target)
    matmul = {"cpu": _blocked_matmul, "gpu": gpu, "tpu": _megablox_matmul}[target.kind]
    return matmul(x_AD, w_EDF, sizes_E, transpose_w, dtype or x_AD.dtype)


def grouped_outer(
    x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array, target: Target
) -> jax.Array:
    """Sums x^T y over each group's rows: [A, D], [A, F] -> [E, D, F] float32.

    Rows after the last group's are left out; they must be finite.
    """
    gpu = functools.partial(_gpu_outer, target)
    outer = {"cpu": _blocked_outer, "gpu": gpu, "tpu": _megablox_outer}[target.kind]
    return outer(x_AD, y_AF, sizes_E)


def align_groups(
    rows: tuple[jax.Array, ...], sizes_E: jax.Array, tile: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Moves each group to start at a multiple of `tile` rows, with zeros in the gaps, so that no
    tile of rows holds two groups.

    Args:
      rows: arrays [A, ...] of rows sorted by group.

    Returns:
      the arrays with (A // tile + E) * tile rows, and the groups' sizes including their gaps,
      int32 [E]; rows after the last group are zeros.
    """
    count = (rows[0].shape[0] // tile + sizes_E.shape[0]) * tile
    aligned_E = aligned_sizes(sizes_E, tile)
    starts_E, aligned_starts_E = jnp.cumsum(sizes_E) - sizes_E, jnp.cumsum(aligned_E) - aligned_E
    row = jnp.arange(count, dtype=sizes_E.dtype)
    group = jnp.minimum(group_of_row(count, aligned_E), sizes_E.shape[0] - 1)
    offset = row - aligned_starts_E[group]
    source = jnp.where(offset < sizes_E[group], starts_E[group] + offset, rows[0].shape[0])
    gather = functools.partial(jnp.take, indices=source, axis=0, mode="fill", fill_value=0)
    return tuple(gather(array) for array in rows), aligned_E


def aligned_sizes(sizes_E: jax.Array, tile: int) -> jax.Array:
    """Returns the groups' sizes including the gaps that `align_groups` leaves: int32 [E]."""
    return -(-sizes_E // tile) * tile


def aligned_rows(rows: int, sizes_E: jax.Array, tile: int) -> jax.Array:
    """Returns the row that `align_groups` moves each row to: int32 [rows]."""
    aligned_E = aligned_sizes(sizes_E, tile)
    shifts_E = (jnp.cumsum(aligned_E) - aligned_E) - (jnp.cumsum(sizes_E) - sizes_E)
    row = jnp.arange(rows, dtype=sizes_E.dtype)
    return row + shifts_E[group_of_row(rows, sizes_E)]


def group_of_row(rows: int, sizes_E: jax.Array) -> jax.Array:
    """Returns each row's group, int32 [rows]; E for rows after the last group."""
    return jnp.searchsorted(
        jnp.cumsum(sizes_E), jnp.arange(rows, dtype=sizes_E.dtype), side="right"
    )


def _for_each_block(size: jax.Array, body: Callable[[Any, jax.Array, int], Any], start: Any) -> Any:
    """Folds body(carry, first row, rows) over a group's rows; the last block may run past them."""
    n_large = size // _LARGE_BLOCK
    done = n_large * _LARGE_BLOCK
    n_small = -((done - size) // _SMALL_BLOCK)
    carry = lax.fori_loop(0, n_large, lambda i, c: body(c, i * _LARGE_BLOCK, _LARGE_BLOCK), start)
    return lax.fori_loop(
        0, n_small, lambda i, c: body(c, done + i * _SMALL_BLOCK, _SMALL_BLOCK), carry
    )


def _with_overhang(x_AD: jax.Array, block: int = _SMALL_BLOCK) -> jax.Array:
    """Adds the rows that the last group's last block, of that many rows, may run into."""
    rows = x_AD.shape[0]
    # A large block must fit even where there are fewer rows: both loops are compiled.
    return jnp.pad(x_AD, ((0, max(block, _LARGE_BLOCK - rows)), (0, 0)))


def _blocked_matmul(
    x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, transpose_w: bool, dtype: DTypeLike
) -> jax.Array:
    padded_x = _with_overhang(x_AD)
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def group(out, group_inputs):
        w, start, size = group_inputs
        w_DF = w.T if transpose_w else w

        def block(out, row, rows):
            x_block = lax.dynamic_slice_in_dim(padded_x, start + row, rows)
            y_block = jnp.matmul(x_block, w_DF, preferred_element_type=jnp.float32)
            return lax.dynamic_update_slice_in_dim(out, y_block.astype(out.dtype), start + row, 0)

        return _for_each_block(size, block, out), None

    width = w_EDF.shape[1 if transpose_w else 2]
    out = vary_as(jnp.zeros((padded_x.shape[0], width), dtype), x_AD, w_EDF, sizes_E)
    return lax.scan(group, out, (w_EDF, starts_E, sizes_E))[0][: x_AD.shape[0]]


def _blocked_outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    # About a group's rows at once: each further block adds up whole matrices.
    usual = max(x_AD.shape[0] // sizes_E.shape[0], 1)
    first = min(max(1 << (usual.bit_length() - 1), _SMALL_BLOCK), _LARGE_BLOCK)
    padded_x, padded_y = _with_overhang(x_AD, first), _with_overhang(y_AF, first)
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def group(_, group_inputs):
        start, size = group_inputs

        def product(row, rows, whole):
            x_block = lax.dynamic_slice_in_dim(padded_x, start + row, rows)
            y_block = lax.dynamic_slice_in_dim(padded_y, start + row, rows)
            if not whole:
                mine = (jnp.arange(rows, dtype=jnp.int32) + row < size)[:, None]
                y_block = jnp.where(mine, y_block, jnp.zeros_like(y_block))
            return jnp.matmul(x_block.T, y_block, preferred_element_type=jnp.float32)

        def block(total, row, rows):
            # Only small blocks run past their group.
            return total + product(first + row, rows, whole=rows == _LARGE_BLOCK)

        rest = jnp.maximum(size - first, 0)
        return None, _for_each_block(rest, block, product(0, first, whole=False))

    return lax.scan(group, None, (starts_E, sizes_E))[1]


def _gpu_matmul(
    target: Target,
    x_AD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    transpose_w: bool,
    dtype: DTypeLike,
) -> jax.Array:
    if target.is_hopper and hopper_grouped.fits(x_AD, w_EDF):
        multiply = functools.partial(
            hopper_grouped.matmul,
            dtype=dtype,
            transpose_w=transpose_w,
            multiprocessors=target.multiprocessors,
        )
        # Without a barrier XLA computes the product twice: for its users, and to keep it for the
        # backward pass.
        return lax.optimization_barrier(call_shipped(multiply, x_AD, w_EDF, sizes_E))
    contracted = ((1,), (2 if transpose_w else 1,))
    return _ragged_dot(x_AD, w_EDF, sizes_E, contracted, [0], dtype)


def _gpu_outer(target: Target, x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    if target.is_hopper and hopper_grouped.fits(x_AD, y_AF):
        sum_up = functools.partial(hopper_grouped.outer, multiprocessors=target.multiprocessors)
        return call_shipped(sum_up, x_AD, y_AF, sizes_E)
    return _ragged_dot(x_AD, y_AF, sizes_E, ((0,), (0,)), [], jnp.float32)


def _ragged_dot(
    x, y, sizes_E: jax.Array, contracted: Any, groups: list[int], dtype: DTypeLike
) -> jax.Array:
    """Multiplies x's rows, in groups, by y; `groups` lists y's group dimension, if it has one."""
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(contracted, ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=groups,
    )
    if not (installed := tokamax()):
        out = lax.ragged_dot_general(x, y, sizes_E, numbers, preferred_element_type=jnp.float32)
        return out.astype(dtype)
    # Its kernels sum in float32 and round once, to the type that they write.
    multiply = functools.partial(
        installed.ragged_dot_general,
        ragged_dot_dimension_numbers=numbers,
        preferred_element_type=dtype,
    )
    return call_shipped(multiply, x, y, sizes_E)


def _megablox_matmul(
    x_AD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    transpose_w: bool,
    dtype: DTypeLike,
    first: jax.Array | int = 0,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    dim, width = w_EDF.shape[1:][::-1] if transpose_w else w_EDF.shape[1:]

    def multiply(
        x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, first: jax.Array
    ) -> jax.Array:
        # The kernel's offset is the group of the first matrix: here before the first group.
        return gmm(
            x_AD,
            w_EDF,
            sizes_E,
            jnp.dtype(dtype),
            _tiling(dim, width),
            -first,
            transpose_rhs=transpose_w,
        )

    out = call_shipped(multiply, _fill_tiles(x_AD), w_EDF, sizes_E, jnp.int32(first))
    return out[: x_AD.shape[0]]


def _megablox_outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    out = call_shipped(
        functools.partial(
            tgmm,
            preferred_element_type=jnp.float32,
            tiling=_tiling(x_AD.shape[1], y_AF.shape[1]),
        ),
        _fill_tiles(x_AD).T,
        _fill_tiles(y_AF),
        sizes_E,
    )
    # The kernel does not write the matrix of an empty group.
    return jnp.where((sizes_E > 0)[:, None, None], out, jnp.zeros_like(out))


def _tiling(dim: int, width: int) -> tuple[int, int, int]:
    return _MEGABLOX_TILE, min(_MEGABLOX_TILE, dim), min(_MEGABLOX_TILE, width)


def _fill_tiles(x_AD: jax.Array) -> jax.Array:
    """Pads rows to whole tiles, as the kernel requires; the padding belongs to no group."""
    return jnp.pad(x_AD, ((0, -x_AD.shape[0] % _MEGABLOX_TILE), (0, 0)))
