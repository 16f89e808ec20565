"""Block-scaled FP8 on Hopper GPUs (H100, H200), in Triton: what `fp8.quantize_block` returns, to
the bit, with each number read once.

XLA takes one kernel for the greatest magnitudes and another for the numbers, and more to turn what
a product reads along its other dimension. Here a program has a tile of 128 x 128 in registers,
finds its scales and writes its numbers as `dsjax.kernels.hopper_scaled` reads them:

* `quantize_rows`: activations and their gradients, whose 128 rows give 1 x 128 tiles, 128 x 1
  tiles, or both. The latter's numbers lie in memory with columns as rows. Tiles of rows start where
  their group does, so that nothing is aligned beforehand.
* `quantize_weights`: 128 x 128 blocks, lying either way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsjax.kernels.few_rows import whole
from dsjax.kernels.hopper_scaled import tiles_of_groups
from dsjax.precision.fp8 import (
    CHANNEL_TILE,
    E4M3,
    TOKEN_TILE,
    WEIGHT_BLOCK,
    BlockScaled,
    Scale,
    magnitudes,
    scales_of,
    values_of,
)

_SIZE = 128  # rows and columns of a program
_PARAMETERS = triton.CompilerParams(num_warps=8)


def quantize_rows(
    x_AD: jax.Array,
    sizes_E: jax.Array | None = None,
    *,
    blocks: Sequence[tuple[int, int]],
    scale: Scale,
    interpret: bool = False,
) -> tuple[BlockScaled, ...]:
    """Quantises activations in each of `blocks`, reading them once.

    Args:
      x_AD: with `sizes_E`, rows sorted by group.
      sizes_E: int32, the number of rows in each group.
      blocks: `CHANNEL_TILE`, `TOKEN_TILE`, or both.

    Returns:
      what `quantize_block` does; with `sizes_E`, for `TOKEN_TILE` of the rows that
      `grouped_matmul.align_groups` returns for tiles of 128.
    """
    A, D = x_AD.shape
    _, starts, ends = tiles_of_groups(sizes_E, A)
    own_ends = ends if sizes_E is None else jnp.minimum(ends, jnp.sum(sizes_E, dtype=jnp.int32))
    n_tiles, n_slices = len(starts), pl.cdiv(D, _SIZE)
    aligned = A if sizes_E is None else n_tiles * _SIZE
    # As they lie in memory: channel tiles' scales and token tiles' numbers have rows last.
    shapes = {CHANNEL_TILE: ((A, D), (n_slices, A)), TOKEN_TILE: ((D, aligned), (n_tiles, D))}
    operands = starts, ends, own_ends, x_AD
    lying = _launch(
        functools.partial(_quantize_rows, blocks=tuple(blocks), scale=scale),
        "quantize_rows",
        (n_tiles, n_slices),
        operands,
        [shape for block in blocks for shape in shapes[block]],
        interpret,
    )
    found = []
    for block, values, scales in zip(blocks, lying[::2], lying[1::2], strict=True):
        if block == CHANNEL_TILE:
            found.append(BlockScaled(values, scales.T, block))
        else:
            found.append(BlockScaled(values.T, scales, block))
    return tuple(found)


def quantize_weights(
    w_EDF: jax.Array, *, turned: bool, scale: Scale, interpret: bool = False
) -> BlockScaled:
    """Quantises matrices as `quantize_block` does in `WEIGHT_BLOCK`.

    Args:
      turned: whether numbers lie in memory with columns as rows.
    """
    E, D, F = w_EDF.shape
    n_blocks = E, pl.cdiv(D, _SIZE), pl.cdiv(F, _SIZE)
    values, scales = _launch(
        functools.partial(_quantize_weights, turned=turned, scale=scale),
        "quantize_weights",
        n_blocks,
        (w_EDF,),
        [(E, F, D) if turned else (E, D, F), n_blocks],
        interpret,
    )
    return BlockScaled(values.mT if turned else values, scales, WEIGHT_BLOCK)


def _launch(
    kernel: Any,
    name: str,
    grid: tuple[int, ...],
    operands: tuple[jax.Array, ...],
    shapes: list[tuple[int, ...]],
    interpret: bool,
) -> list[jax.Array]:
    """Calls a kernel that writes numbers and scales by turns, in arrays of these shapes."""
    out = [
        jax.ShapeDtypeStruct(shape, jnp.float32 if number % 2 else E4M3)
        for number, shape in enumerate(shapes)
    ]
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        in_specs=[whole(x) for x in operands],
        out_specs=[whole(x) for x in out],
        compiler_params=_PARAMETERS,
        name=name,
        interpret=interpret,
    )(*operands)


def _quantize_rows(starts, ends, own_ends, x, *out, blocks, scale: Scale) -> None:
    tile, column_tile = pl.program_id(0), pl.program_id(1)
    start, end = starts[tile], ends[tile]
    number = lax.iota(jnp.int32, _SIZE)
    row_R, column_C, place_R = start + number, column_tile * _SIZE + number, tile * _SIZE + number
    x_RC = _load(x, (), row_R, column_C, end)
    for block, values, scales in zip(blocks, out[::2], out[1::2], strict=True):
        if block == CHANNEL_TILE:
            scale_R = scales_of(jnp.max(magnitudes(x_RC), axis=1), scale)
            values_RC = values_of(x_RC, scale_R[:, None], scale)
            _store(values, (), row_R, column_C, end, values_RC)
            triton.store(scales.at[column_tile, row_R], scale_R, mask=row_R < end)
        else:
            # Rows after the last group are in no group's tokens.
            own_RC = jnp.where((row_R < own_ends[tile])[:, None], x_RC, 0.0)
            scale_C = scales_of(jnp.max(magnitudes(own_RC), axis=0), scale)
            values_RC = values_of(own_RC, scale_C[None, :], scale)
            _store(values, (), column_C, place_R, len(values), values_RC.T)
            triton.store(scales.at[tile, column_C], scale_C, mask=column_C < x.shape[1])


def _quantize_weights(w, values, scales, *, turned: bool, scale: Scale) -> None:
    matrix, *tiles = (pl.program_id(axis) for axis in range(3))
    row_R, column_C = (each * _SIZE + lax.iota(jnp.int32, _SIZE) for each in tiles)
    w_RC = _load(w, (matrix,), row_R, column_C, w.shape[1])
    own_scale = scales_of(jnp.max(magnitudes(w_RC)), scale)
    values_RC = values_of(w_RC, own_scale, scale)
    if turned:
        _store(values, (matrix,), column_C, row_R, w.shape[2], values_RC.T)
    else:
        _store(values, (matrix,), row_R, column_C, w.shape[1], values_RC)
    triton.store(scales.at[matrix, *tiles], own_scale)


def _load(x, matrix, row_R, column_C, end) -> jax.Array:
    """Loads a tile, float32, with zeros from row `end` and behind the last column."""
    row, column = _places(row_R, column_C)
    here = (row < end) & (column < x.shape[-1])
    return triton.load(x.at[(*matrix, row, column)], mask=here, other=0).astype(jnp.float32)


def _store(out, matrix, row_R, column_C, end, tile_RC) -> None:
    """Stores what of a tile is before row `end` and the last column."""
    row, column = _places(row_R, column_C)
    own = out.at[(*matrix, row, column)]
    triton.store(own, tile_RC, mask=(row < end) & (column < out.shape[-1]))


def _places(row_R: jax.Array, column_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    shape = len(row_R), len(column_C)
    row, column = (lax.broadcast_in_dim(x, shape, (i,)) for i, x in enumerate((row_R, column_C)))
    return row, column
