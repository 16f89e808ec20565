"""Block-scaled E4M3 products for Hopper GPUs (H100, H200), in Triton: each slice's sums are scaled
and added up in registers, and leave them once.

`dsjax.kernels.fp8_gemm` says what is computed. Both operands are read along K; so the second is
given with its columns as rows. A program sums one tile of the result.

Triton widens E4M3 to float16 in registers, exactly, and multiplies that by `mma.sync` with float32
sums, as its code for sm_90a shows. JAX's Pallas does not let it use the unit's own E4M3 product,
whose accumulator has 14 bits. So operands take a byte per element of memory traffic and sums are
float32's, but the rate is at most that of float16, and without the faster `wgmma`.

* `grouped_matmul`: a tile's rows are of one group. It starts at one of the group's rows, and what
  is behind the group's end is not written. Nothing is padded or moved in memory but the last slice.
* `grouped_outer`: a tile of one group's matrix sums over the group's slices of rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike

from dsjax.kernels.few_rows import whole
from dsjax.kernels.fp8_gemm import SLICE, fill_up

_ROWS, _COLUMNS = 128, 128  # of a tile
_PARAMETERS = triton.CompilerParams(num_warps=8, num_stages=4)


def matmul(
    a_MK: jax.Array,
    a_scales_MX: jax.Array,
    b_NK: jax.Array,
    b_scales_NX: jax.Array,
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies a by b's transpose.

    Args:
      a_MK, b_NK: float8_e4m3fn.
      a_scales_MX, b_scales_NX: float32, of each row's slices of 128; X is ceil(K / 128).

    Returns:
      [M, N], summed in float32.
    """
    operands = a_MK, a_scales_MX, b_NK[None], b_scales_NX[None], None
    return grouped_matmul(*operands, dtype, interpret=interpret)


def grouped_matmul(
    a_AK: jax.Array,
    a_scales_AX: jax.Array,
    b_ENK: jax.Array,
    b_scales_ENX: jax.Array,
    sizes_E: jax.Array | None,
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies each group's rows by the transpose of its matrix.

    Args:
      a_AK, b_ENK: float8_e4m3fn; the former's rows are sorted by group.
      a_scales_AX, b_scales_ENX: float32, of each row's slices of 128; X is ceil(K / 128).
      sizes_E: int32, the number of rows in each group; they sum to A. None: all are of one.

    Returns:
      [A, N], summed in float32.
    """
    A, (E, N) = len(a_AK), b_ENK.shape[:2]
    a_AK, b_ENK = (fill_up(x, x.ndim - 1, SLICE) for x in (a_AK, b_ENK))
    operands = (
        *tiles_of_groups(sizes_E, A), a_AK, a_scales_AX.T,
        b_ENK.reshape(E * N, -1), b_scales_ENX.reshape(E * N, -1).T,
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(_matmul, width=N),
        out_shape=jax.ShapeDtypeStruct((A, N), dtype),
        grid=(len(operands[0]), pl.cdiv(N, _COLUMNS)),
        in_specs=[whole(x) for x in operands],
        out_specs=pl.BlockSpec((A, N), lambda *_: (0, 0)),
        compiler_params=_PARAMETERS,
        name="scaled_grouped_matmul",
        interpret=interpret,
    )(*operands)


def grouped_outer(
    a_DA: jax.Array,
    a_scales_DT: jax.Array,
    b_FA: jax.Array,
    b_scales_FT: jax.Array,
    sizes_E: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies each group's columns of a by the transpose of its columns of b.

    Args:
      a_DA, b_FA: float8_e4m3fn; columns sorted by group.
      a_scales_DT, b_scales_FT: float32, of each row's slices of 128; T is A / 128.
      sizes_E: int32, the number of columns in each group, multiples of 128.

    Returns:
      float32 [E, D, F].
    """
    D, F, E = len(a_DA), len(b_FA), len(sizes_E)
    ends_E = (jnp.cumsum(sizes_E) // SLICE).astype(jnp.int32)
    starts_E = ends_E - (sizes_E // SLICE).astype(jnp.int32)
    operands = starts_E, ends_E, a_DA, a_scales_DT.T, b_FA, b_scales_FT.T
    return pl.pallas_call(
        _outer,
        out_shape=jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        grid=(E, pl.cdiv(D, _ROWS), pl.cdiv(F, _COLUMNS)),
        in_specs=[whole(x) for x in operands],
        out_specs=pl.BlockSpec((E, D, F), lambda *_: (0, 0, 0)),
        compiler_params=_PARAMETERS,
        name="scaled_grouped_outer",
        interpret=interpret,
    )(*operands)


def tiles_of_groups(sizes_E: jax.Array | None, n_rows: int) -> tuple[jax.Array, ...]:
    """Returns of each tile of 128 rows its group, its first row, and one past the last row that
    belongs to it: int32 [tiles]. A group's first tile starts with it; rows after the last group
    count as part of it. Tiles that are not needed start at their end or behind it.

    Args:
      sizes_E: int32, the number of rows in each group. None: one group.
    """
    if sizes_E is None:
        start_T = jnp.arange(0, n_rows, _ROWS, dtype=jnp.int32)
        return jnp.zeros_like(start_T), start_T, jnp.full_like(start_T, n_rows)
    ends_E = jnp.cumsum(sizes_E).at[-1].set(n_rows)
    starts_E = jnp.append(0, ends_E[:-1])
    tiles_E = pl.cdiv(ends_E - starts_E, _ROWS)
    last_tiles_E = jnp.cumsum(tiles_E)
    most = n_rows // _ROWS + len(sizes_E)  # at most one tile of each group is not full
    tile_T = jnp.arange(most, dtype=sizes_E.dtype)
    # A search would be a loop of kernels; these comparisons are one.
    group_T = jnp.sum(tile_T[:, None] >= last_tiles_E[None, :-1], axis=1, dtype=jnp.int32)
    number_T = tile_T - (last_tiles_E - tiles_E)[group_T]
    found = group_T, starts_E[group_T] + number_T * _ROWS, ends_E[group_T]
    return tuple(x.astype(jnp.int32) for x in found)


def _matmul(groups, starts, ends, a, a_scales, b, b_scales, out, *, width: int) -> None:
    tile, column_tile = pl.program_id(0), pl.program_id(1)
    group, start, end = groups[tile], starts[tile], ends[tile]

    @pl.when(start < end)
    def _():
        row_R = start + lax.iota(jnp.int32, _ROWS)
        column_C = column_tile * _COLUMNS + lax.iota(jnp.int32, _COLUMNS)
        # What is not there is computed from what is, and not written.
        own_R = jnp.minimum(row_R, end - 1)
        own_C = group * width + jnp.minimum(column_C, width - 1)
        sums = _summed((a, a_scales, own_R), (b, b_scales, own_C), 0, len(a_scales))
        _write(out, (), row_R, column_C, end, width, sums)


def _outer(starts, ends, a, a_scales, b, b_scales, out) -> None:
    group = pl.program_id(0)
    row_R = pl.program_id(1) * _ROWS + lax.iota(jnp.int32, _ROWS)
    column_C = pl.program_id(2) * _COLUMNS + lax.iota(jnp.int32, _COLUMNS)
    height, width = len(a), len(b)
    own_R, own_C = jnp.minimum(row_R, height - 1), jnp.minimum(column_C, width - 1)
    sums = _summed((a, a_scales, own_R), (b, b_scales, own_C), starts[group], ends[group])
    _write(out, (group,), row_R, column_C, height, width, sums)


def _summed(a: Any, b: Any, start: jax.Array | int, end: jax.Array | int) -> jax.Array:
    """Sums slices [start, end) of a tile: float32 [R, C].

    Args:
      a, b: an operand, its scales, and the tile's rows of it.
    """

    def slice_of(operand, number):
        values, scales, rows = operand
        shape = len(rows), SLICE
        row = lax.broadcast_in_dim(rows, shape, (0,))
        place = number * SLICE + lax.broadcasted_iota(jnp.int32, shape, 1)
        return triton.load(values.at[row, place]), triton.load(scales.at[number, rows])

    def add(number, total_RC):
        (a_RX, a_scale_R), (b_CX, b_scale_C) = (slice_of(x, number) for x in (a, b))
        sums_RC = lax.dot_general(
            a_RX, b_CX, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return total_RC + sums_RC * (a_scale_R[:, None] * b_scale_C[None, :])

    return lax.fori_loop(start, end, add, jnp.zeros((_ROWS, _COLUMNS), jnp.float32))


def _write(out, matrix, row_R, column_C, height, width, sums_RC) -> None:
    shape = sums_RC.shape
    row, column = (lax.broadcast_in_dim(x, shape, (i,)) for i, x in enumerate((row_R, column_C)))
    own = out.at[(*matrix, row, column)]
    triton.store(own, sums_RC.astype(out.dtype), mask=(row < height) & (column < width))
