"""Grouped matrix products on Hopper GPUs (H100, H200), in Mosaic GPU: operands of two bytes, sums in
float32.

One program for each multiprocessor walks over tiles of the result. A warpgroup brings slices of the
operands through four buffers, two others multiply them, each its half of the tile's columns.

* `matmul`: the rows of a tile belong to one group. A tile starts at the group's first row, rounded
  down to a multiple of 8, where a copy may begin; so it may hold rows of the group before, and at
  the group's end rows of the next. They are computed and not written. Copies have fixed sizes, so
  what is left of a tile is written in pieces of 2^i rows. Rows after the last group are zeros.
* `outer`: a tile of one group's matrix sums over the group's rows, in slices that begin at a
  multiple of 8 too; other groups' rows in the first and in the last slice are set to 0.

Nothing is padded or transposed in memory, and a step takes as long with many groups as with few.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

_ROWS, _COLUMNS, _SLICE = 128, 256, 64  # of a tile, and of K at once
_STAGES, _WARPGROUPS = 4, 2
_PIECE = 64  # rows that a warpgroup writes at once
_ALIGNMENT = 8
_SWIZZLE = 128  # bytes


def fits(x: jax.Array, y: jax.Array) -> bool:
    """Whether the kernels take these operands: of two bytes, widths of whole 128 bytes."""
    two_bytes = x.dtype == y.dtype and x.dtype in (jnp.bfloat16, jnp.float16)
    return two_bytes and all(width % 64 == 0 for width in (x.shape[1], *y.shape[1:]))


class _Tiles(NamedTuple):
    """int32 [tiles]; a tile without rows, first == end, is none."""

    group: jax.Array
    start: jax.Array
    first: jax.Array  # counted from `start`, the first row that is the group's
    end: jax.Array  # and the first that is not any more

    @classmethod
    def of(cls, sizes_E: jax.Array, n_rows: int) -> _Tiles:
        """The tiles of all groups, and of the rows that are left, as group E."""
        ends = jnp.cumsum(sizes_E)
        starts, ends = jnp.append(ends - sizes_E, ends[-1]), jnp.append(ends, n_rows)
        aligned = starts // _ALIGNMENT * _ALIGNMENT
        n_tiles = jnp.where(ends > starts, pl.cdiv(ends - aligned, _ROWS), 0)
        last = jnp.cumsum(n_tiles)
        # A group has at most as many tiles as its rows and one incomplete tile at each end fill.
        most = (n_rows + len(starts) * (_ROWS + _ALIGNMENT - 2)) // _ROWS
        tile = jnp.arange(most, dtype=jnp.int32)
        group = jnp.searchsorted(last, tile, side="right", method="compare_all")
        group = jnp.minimum(group, len(starts) - 1)
        start = aligned[group] + (tile - (last - n_tiles)[group]) * _ROWS
        first, end = (jnp.clip(edge[group] - start, 0, _ROWS) for edge in (starts, ends))
        end = jnp.where(tile < last[-1], end, first)
        return cls(*(x.astype(jnp.int32) for x in (group, start, first, end)))


def matmul(
    x_AD: jax.Array,
    w_EDF: jax.Array,
    sizes_E: jax.Array,
    dtype: DTypeLike,
    *,
    transpose_w: bool = False,
) -> jax.Array:
    """Each group's rows times its matrix, [D, F], or [F, D] with `transpose_w`: [A, F]."""
    (A, D), E, F = x_AD.shape, len(w_EDF), w_EDF.shape[1 if transpose_w else 2]
    tiles = _Tiles.of(sizes_E, A)
    w_block = (_COLUMNS, _SLICE) if transpose_w else (_SLICE, _COLUMNS)

    def tile(row_tile, column_tile, x, w, group, start, first, end, out, *, run):
        first_row, end_row = first[row_tile], end[row_tile]

        @pl.when(first_row < end_row)
        def _():
            begin = pl.multiple_of(start[row_tile], _ALIGNMENT)
            number = group[row_tile]

            def multiply(_, x_smem, w_smem, acc):
                half = pl.ds(lax.axis_index("warpgroup") * (_COLUMNS // 2), _COLUMNS // 2)
                w_half = _transposed(w_smem.at[half]) if transpose_w else w_smem.at[:, half]
                plgpu.wgmma(acc, x_smem, w_half)
                plgpu.wgmma_wait(0)
                return acc

            def rows_of(piece):
                return tuple(jnp.clip(row - piece * _PIECE, 0, _PIECE) for row in (first_row, end_row))

            run(
                multiply,
                jnp.where(number == E, 0, pl.cdiv(D, _SLICE)),
                (lambda k: (0, k), (lambda k: (column_tile, k)) if transpose_w else (lambda k: (k, column_tile))),
                (x.at[pl.ds(begin, _ROWS)], w.at[jnp.minimum(number, E - 1)]),
                out.at[pl.ds(begin, _ROWS)],
                column_tile,
                rows_of,
            )

    return _launch(
        tile,
        (len(tiles.group), pl.cdiv(F, _COLUMNS)),
        (x_AD, w_EDF, *tiles),
        ((_ROWS, _SLICE), w_block),
        jax.ShapeDtypeStruct((A, F), dtype),
        "grouped_matmul",
    )


def outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Sums x^T y over each group's rows: float32 [E, D, F]; rows after the last group's are not
    read.
    """
    D, F, E = x_AD.shape[1], y_AF.shape[1], len(sizes_E)
    ends = jnp.cumsum(sizes_E).astype(jnp.int32)
    starts = ends - sizes_E
    n_rows = x_AD.shape[0]

    def tile(index, column_tile, x, y, starts, ends, out, *, run):
        group, d_tile = lax.div(index, pl.cdiv(D, _ROWS)), lax.rem(index, pl.cdiv(D, _ROWS))
        start, end = starts[group], ends[group]
        begin = pl.multiple_of(lax.div(start, _ALIGNMENT) * _ALIGNMENT, _ALIGNMENT)
        n_slices = jnp.where(end > start, lax.div(end - begin + _SLICE - 1, _SLICE), 0)

        def multiply(indices, x_smem, y_smem, acc):
            half = pl.ds(lax.axis_index("warpgroup") * (_COLUMNS // 2), _COLUMNS // 2)
            row = begin + indices[0] * _SLICE

            @pl.when((row < start) | (row + _SLICE > end))
            def _():
                rows = row + lax.broadcasted_iota(jnp.int32, (_SLICE, _COLUMNS // 2), 0)
                y_half = y_smem[:, half]
                y_smem[:, half] = jnp.where(
                    (rows >= start) & (rows < end), y_half, jnp.zeros_like(y_half)
                )
                plgpu.commit_smem()

            plgpu.wgmma(acc, _transposed(x_smem), y_smem.at[:, half])
            plgpu.wgmma_wait(0)
            return acc

        run(
            multiply,
            n_slices,
            (lambda k: (k, d_tile), lambda k: (k, column_tile)),
            (x.at[pl.ds(begin, n_rows)], y.at[pl.ds(begin, n_rows)]),
            out.at[group, pl.ds(d_tile * _ROWS, _ROWS)],
            column_tile,
            lambda piece: None,
        )

    return _launch(
        tile,
        (E * pl.cdiv(D, _ROWS), pl.cdiv(F, _COLUMNS)),
        (x_AD, y_AF, starts.astype(jnp.int32), ends),
        ((_SLICE, _ROWS), (_SLICE, _COLUMNS)),
        jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        "grouped_outer",
    )


def _transposed(ref: Any) -> Any:
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def _smem(shape: tuple[int, ...], dtype: Any, tiling: int) -> Any:
    transforms = (
        plgpu.TilingTransform((tiling, _SWIZZLE // jnp.dtype(dtype).itemsize)),
        plgpu.SwizzleTransform(_SWIZZLE),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _launch(tile, grid, operands, blocks, out: jax.ShapeDtypeStruct, name: str) -> jax.Array:
    """Runs `tile` for every row tile and column tile of the grid, neighbours at the same time."""
    wide = _SWIZZLE // jnp.dtype(out.dtype).itemsize

    def pipeline(body, n_slices, index_maps, write):
        specs = [
            plgpu.BlockSpec(
                block,
                index_map,
                transforms=(
                    plgpu.TilingTransform((8, _SWIZZLE // operand.dtype.itemsize)),
                    plgpu.SwizzleTransform(_SWIZZLE),
                ),
            )
            for block, index_map, operand in zip(blocks, index_maps, operands[:2], strict=True)
        ]
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(n_slices,),
            memory_registers=40,
            in_specs=specs,
            wg_axis="warpgroup",
            num_compute_wgs=_WARPGROUPS,
            max_concurrent_steps=_STAGES,
            compute_context=write,
        )

    def kernel(*refs):
        x, y = refs[:2]
        nothing = lambda *_, **__: None
        allocations = pipeline(
            nothing, jnp.int32(1), (lambda k: (0, k), lambda k: (k, 0)), nothing
        ).get_allocations(x, y if y.ndim == 2 else y.at[0])

        @functools.partial(
            pl.run_scoped,
            buffers=allocations,
            pieces=_smem((_WARPGROUPS, 2, _PIECE, wide), out.dtype, 1),
            collective_axes="warpgroup",
        )
        def _(buffers, pieces):
            warpgroup = lax.axis_index("warpgroup")

            def run(multiply, n_slices, index_maps, inputs, result, column_tile, rows_of):
                def write(sum_up):
                    @functools.partial(
                        pl.run_scoped, acc=plgpu.ACC((_ROWS, _COLUMNS // 2), jnp.float32)
                    )
                    def _(acc):
                        sum_up(acc)
                        sums = acc[...].astype(out.dtype)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        for i in range(_ROWS // _PIECE):
                            for j in range(_COLUMNS // 2 // wide):
                                slot = (i * (_COLUMNS // 2 // wide) + j) % 2
                                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                                piece = pieces.at[warpgroup, slot]
                                piece[...] = sums[
                                    i * _PIECE : (i + 1) * _PIECE, j * wide : (j + 1) * wide
                                ]
                                plgpu.commit_smem()
                                column = (
                                    column_tile * _COLUMNS + warpgroup * (_COLUMNS // 2) + j * wide
                                )
                                _write(
                                    piece,
                                    result.at[pl.ds(i * _PIECE, _PIECE), pl.ds(column, wide)],
                                    rows_of(i),
                                )

                pipeline(multiply, n_slices, index_maps, write)(*inputs, allocations=buffers)

            @plgpu.nd_loop(grid, collective_axes="multiprocessor")
            def _(loop):
                tile(*loop.index, *refs, run=run)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(_multiprocessors(),),
        grid_names=("multiprocessor",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(*operands)


def _write(piece, result, rows) -> None:
    """Copies rows [first, end) of a piece to where they belong, all of them unless given: one group
    of copies, be it an empty one.
    """
    if rows is None:
        plgpu.copy_smem_to_gmem(piece, result)
        return
    first, end = rows
    size = end - first

    @pl.when(size == _PIECE)
    def _():
        plgpu.copy_smem_to_gmem(piece, result, commit_group=False)

    @pl.when((size > 0) & (size < _PIECE))
    def _():
        begin = first
        for power in range(_PIECE.bit_length() - 2, -1, -1):
            some = 2**power

            @pl.when(size & some != 0)
            def _(begin=begin, some=some):
                rows = pl.ds(begin, some)
                plgpu.copy_smem_to_gmem(piece.at[rows], result.at[rows], commit_group=False)

            begin += size & some

    plgpu.commit_smem_to_gmem_group()


def _multiprocessors() -> int:
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 132
