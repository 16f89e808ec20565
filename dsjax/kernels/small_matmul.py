"""Grouped products of rows with small weights (E4M3 or integers, a scale per block), for TPUs.

A Mosaic kernel: rows are sorted by group and cut into tiles of one group each. Per tile, the
group's matrix comes in blocks from memory as it is stored and is widened next to the matrix unit,
so no wide matrix exists anywhere. A dense product is one of a single group.

XLA needs no kernel on v5e and v5p, where it fuses the widening into a product; on v6e and tpu7x it
writes the widened matrix to memory first.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from dsjax.kernels.grouped_matmul import align_groups, aligned_rows, group_of_row
from dsjax.kernels.varying import by_hand, call_shipped

_DEPTH, _WIDTH = 512, 1024  # of a block of the matrix
_FEWEST_SCALES = 8  # of a column of it, or the compiler cannot cut them out
_DEEPEST = 4096  # a matrix that does not divide into blocks is one block deep, up to this depth
_SMALLEST_TILE, _LARGEST_TILE = 16, 256  # rows


def fits(depth: int, per_scale: int) -> bool:
    """Returns whether the kernel takes matrices of this depth here: where no mesh axis is left to
    the compiler, which cannot split a kernel.

    Args:
      per_scale: rows that share a scale.
    """
    return by_hand() and (depth % _block_depth(per_scale) == 0 or depth <= _DEEPEST)


def _block_depth(per_scale: int) -> int:
    return max(_DEPTH, _FEWEST_SCALES * per_scale)


def tile_rows(n_rows: int, n_groups: int) -> int:
    """Returns the rows per tile: about those of a group, so that few tiles are part empty."""
    power = 1 << max(-(-n_rows // n_groups) - 1, 0).bit_length()
    return min(max(power, _SMALLEST_TILE), _LARGEST_TILE)


def small_grouped_matmul(
    x_AK: jax.Array,
    values_EKN: jax.Array,
    scales_EXN: jax.Array,
    sizes_E: jax.Array,
    dtype: DTypeLike,
) -> jax.Array:
    """Multiplies each group's rows by its matrix, values times scales: [A, N] in `dtype`, summed in
    float32.

    Args:
      x_AK: rows sorted by group; the widened matrix is rounded to their dtype.
      values_EKN: float8_e4m3fn, int8 or int4.
      scales_EXN: float32 or bfloat16; X divides K, and K / X rows share a scale per column.
      sizes_E: int32, the number of rows in each group; they sum to A.
    """
    A, E = x_AK.shape[0], len(values_EKN)
    tile = tile_rows(A, E)
    (rows,), aligned_E = align_groups((x_AK,), sizes_E, tile)
    group_T = group_of_row(rows.shape[0] // tile, aligned_E // tile)
    used_1 = (aligned_E.sum() // tile)[None]
    launch = functools.partial(_launch, tile=tile, dtype=dtype)
    out = call_shipped(
        launch, jnp.minimum(group_T, E - 1).astype(jnp.int32), used_1.astype(jnp.int32), rows,
        values_EKN, scales_EXN,
    )  # fmt: skip
    return out[aligned_rows(A, sizes_E, tile)]


def _launch(
    group_T: jax.Array,
    used_1: jax.Array,
    rows_AK: jax.Array,
    values_EKN: jax.Array,
    scales_EXN: jax.Array,
    *,
    tile: int,
    dtype: DTypeLike,
) -> jax.Array:
    _, K, N = values_EKN.shape
    per_scale = K // scales_EXN.shape[1]
    depth = _block_depth(per_scale)
    depth = depth if K % depth == 0 else K
    width, n_deep = min(_WIDTH, N), K // depth

    # What lies after the last used tile is not computed: its blocks are those that are there.
    def place(tile_: Any, k: Any, used: Any) -> tuple[Any, Any]:
        inside = tile_ < used[0]
        return jnp.where(inside, tile_, used[0] - 1), jnp.where(inside, k, n_deep - 1)

    def of_rows(n: Any, tile_: Any, k: Any, group: Any, used: Any) -> tuple[Any, ...]:
        return place(tile_, k, used)

    def of_matrix(n: Any, tile_: Any, k: Any, group: Any, used: Any) -> tuple[Any, ...]:
        row, slice_ = place(tile_, k, used)
        return group[row], slice_, n

    return pl.pallas_call(
        functools.partial(_kernel, n_deep=n_deep, per_scale=per_scale),
        out_shape=jax.ShapeDtypeStruct((rows_AK.shape[0], N), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(N, width), len(group_T), n_deep),
            in_specs=[
                pl.BlockSpec((tile, depth), of_rows),
                pl.BlockSpec((1, depth, width), of_matrix),
                pl.BlockSpec((1, depth // per_scale, width), of_matrix),
            ],
            out_specs=pl.BlockSpec((tile, width), lambda n, tile_, k, group, used: (tile_, n)),
            scratch_shapes=[pltpu.VMEM((tile, width), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        name="small_grouped_matmul",
    )(group_T, used_1, rows_AK, values_EKN, scales_EXN)


def _kernel(group, used, x, values, scales, out, total, *, n_deep: int, per_scale: int) -> None:
    k = pl.program_id(2)

    @pl.when(pl.program_id(1) < used[0])
    def _():
        @pl.when(k == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        wide = values[0].astype(jnp.float32)
        blocks = wide.reshape(-1, per_scale, wide.shape[1])
        blocks = blocks * scales[0].astype(jnp.float32)[:, None, :]
        w = blocks.reshape(wide.shape).astype(x.dtype)
        total[...] += lax.dot_general(
            x[...], w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

        @pl.when(k == n_deep - 1)
        def _():
            out[...] = total[...].astype(out.dtype)
