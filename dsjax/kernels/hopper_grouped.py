"""Grouped matrix products for Hopper GPUs (H100, H200), in Mosaic GPU: two-byte operands, sums in
float32.

One program per multiprocessor walks over tiles of the result. One warpgroup loads slices of the
operands through four buffers; two others multiply them, each half of the tile's columns.

* `matmul`: a tile belongs to one group. It starts at the group's first row, rounded down to a
  multiple of 8, as copies require; so it may include rows of the group before, and at the group's
  end rows of the next. Those are computed and not written. Copies have fixed sizes, so a partial
  tile is written in pieces of 2^i rows. Rows after the last group are zeros.
* `outer`: a tile of one group's matrix sums over the group's rows, in slices that also start at a
  multiple of 8; other groups' rows in the first and the last slice are set to 0.

Nothing is padded or transposed in memory, and the cost per tile does not depend on the number of
groups. The tests run these kernels under the interpreter of jax 0.11 and later, or on a GPU.
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

_ROWS, _COLUMNS, _SLICE = 128, 256, 64  # of a tile of the result; elements of K per step
_BUFFERS, _WARPGROUPS = 4, 2
_HALF = _COLUMNS // _WARPGROUPS
_PIECE = 64  # rows per write of a warpgroup
_ALIGNMENT = 8
_SWIZZLE = 128  # bytes


def fits(x: jax.Array | jax.ShapeDtypeStruct, y: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Returns whether the kernels take these operands: two-byte, widths in multiples of 64."""
    two_bytes = x.dtype == y.dtype and x.dtype in (jnp.bfloat16, jnp.float16)
    return two_bytes and all(width % 64 == 0 for width in (x.shape[1], *y.shape[1:]))


class Tiles(NamedTuple):
    """Where each tile of `matmul` starts and which rows it writes: int32 [tiles]."""

    group: jax.Array
    start: jax.Array
    first: jax.Array  # of the group's rows, counted from `start`
    end: jax.Array  # one past the last; a tile with end == first is unused

    @classmethod
    def of(cls, sizes_E: jax.Array, n_rows: int) -> Tiles:
        """Returns the tiles of all groups, and of the rows after them as group E."""
        ends = jnp.cumsum(sizes_E)
        starts, ends = jnp.append(ends - sizes_E, ends[-1]), jnp.append(ends, n_rows)
        aligned = starts // _ALIGNMENT * _ALIGNMENT
        n_tiles = jnp.where(ends > starts, pl.cdiv(ends - aligned, _ROWS), 0)
        last = jnp.cumsum(n_tiles)
        # Besides its own rows, a group's tiles hold at most 7 rows before its start and 127 after
        # its end.
        most = (n_rows + len(starts) * (_ALIGNMENT - 1 + _ROWS - 1)) // _ROWS
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
    first_group: jax.Array | int = 0,
    multiprocessors: int,
) -> jax.Array:
    """Multiplies each group's rows by its matrix, [D, F], or [F, D] with `transpose_w`: [A, F].

    Args:
      first_group: number of the first group's matrix, where `w_EDF` holds those of others too.
    """
    (A, D), E, F = x_AD.shape, len(sizes_E), w_EDF.shape[1 if transpose_w else 2]
    tiles = Tiles.of(sizes_E, A)
    # Rows after the last group have no matrix.
    matrices = jnp.where(tiles.group == E, -1, tiles.group + first_group)
    tiles = tiles._replace(group=matrices)

    def tile(row_tile, column_tile, x, w, matrix, start, first, end, out, *, run):
        first_row, end_row, number = first[row_tile], end[row_tile], matrix[row_tile]
        begin = pl.multiple_of(start[row_tile], _ALIGNMENT)

        def multiply(_, x_smem, w_smem, acc):
            half = _half()
            w_half = _transposed(w_smem.at[half]) if transpose_w else w_smem.at[:, half]
            plgpu.wgmma(acc, x_smem, w_half)
            plgpu.wgmma_wait(0)
            return acc

        def written(piece):
            return tuple(jnp.clip(row - piece * _PIECE, 0, _PIECE) for row in (first_row, end_row))

        @pl.when(first_row < end_row)
        def _():
            run(
                multiply,
                # Rows after the last group take no products, so zeros are written.
                jnp.where(number < 0, 0, pl.cdiv(D, _SLICE)),
                (x.at[pl.ds(begin, _ROWS)], w.at[jnp.maximum(number, 0)]),
                (
                    lambda k: (0, k),
                    lambda k: (column_tile, k) if transpose_w else (k, column_tile),
                ),
                out.at[pl.ds(begin, _ROWS)],
                column_tile,
                written,
            )

    return _launch(
        "grouped_matmul",
        tile,
        (len(tiles.group), pl.cdiv(F, _COLUMNS)),
        (x_AD, w_EDF, *tiles),
        ((_ROWS, _SLICE), (_COLUMNS, _SLICE) if transpose_w else (_SLICE, _COLUMNS)),
        jax.ShapeDtypeStruct((A, F), dtype),
        multiprocessors,
    )


def outer(
    x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array, *, multiprocessors: int
) -> jax.Array:
    """Sums x^T y over each group's rows: float32 [E, D, F]. Other rows must be finite."""
    (A, D), F = x_AD.shape, y_AF.shape[1]
    n_tall = pl.cdiv(D, _ROWS)
    ends_E = jnp.cumsum(sizes_E).astype(jnp.int32)
    starts_E = ends_E - sizes_E.astype(jnp.int32)

    def tile(tall, column_tile, x, y, starts, ends, out, *, run):
        group, row_tile = lax.div(tall, n_tall), lax.rem(tall, n_tall)
        start, end = starts[group], ends[group]
        begin = pl.multiple_of(lax.div(start, _ALIGNMENT) * _ALIGNMENT, _ALIGNMENT)
        rows = pl.ds(begin, A)

        def multiply(indices, x_smem, y_smem, acc):
            half = _half()
            row = begin + indices[0] * _SLICE

            # The first and the last slice may hold rows of other groups.
            @pl.when((row < start) | (row + _SLICE > end))
            def _():
                here = row + lax.broadcasted_iota(jnp.int32, (_SLICE, _HALF), 0)
                y_half = y_smem[:, half]
                mine = (here >= start) & (here < end)
                y_smem[:, half] = jnp.where(mine, y_half, jnp.zeros_like(y_half))
                plgpu.commit_smem()

            plgpu.wgmma(acc, _transposed(x_smem), y_smem.at[:, half])
            plgpu.wgmma_wait(0)
            return acc

        run(
            multiply,
            jnp.where(end > start, lax.div(end - begin + _SLICE - 1, _SLICE), 0),
            (x.at[rows], y.at[rows]),
            (lambda k: (k, row_tile), lambda k: (k, column_tile)),
            out.at[group, pl.ds(row_tile * _ROWS, _ROWS)],
            column_tile,
            None,
        )

    return _launch(
        "grouped_outer",
        tile,
        (len(sizes_E) * n_tall, pl.cdiv(F, _COLUMNS)),
        (x_AD, y_AF, starts_E, ends_E),
        ((_SLICE, _ROWS), (_SLICE, _COLUMNS)),
        jax.ShapeDtypeStruct((len(sizes_E), D, F), jnp.float32),
        multiprocessors,
    )


def _half() -> Any:
    """Returns the columns of a tile that this warpgroup computes."""
    return pl.ds(lax.axis_index("warpgroup") * _HALF, _HALF)


def _transposed(ref: Any) -> Any:
    # Versions of JAX that have the method deprecate the function.
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))


def _launch(
    name: str,
    tile: Callable[..., None],
    grid: tuple[int, int],
    operands: tuple[jax.Array, ...],
    blocks: tuple[tuple[int, int], tuple[int, int]],
    out: jax.ShapeDtypeStruct,
    multiprocessors: int,
) -> jax.Array:
    """Calls `tile(row tile, column tile, *references, run=run)` for each tile of the result.

    `run(multiply, n_slices, operands, index maps, rows of the result, column tile, written)` sums a
    tile and writes it. `written` maps a piece's number to the range of its rows to write; None
    writes all.

    Args:
      blocks: the shapes of a slice of the first two operands.
    """
    pipeline = functools.partial(_pipeline, blocks, [x.dtype for x in operands[:2]])
    pieces = (_WARPGROUPS, 2, _PIECE, _wide(out.dtype))

    def kernel(*refs):
        x, y = refs[0], refs[1] if len(refs[1].shape) == 2 else refs[1].at[0]
        nothing: Any = lambda *_, **__: None  # noqa: E731
        anywhere = pipeline(nothing, jnp.int32(1), (lambda k: (0, k), lambda k: (k, 0)), nothing)

        @functools.partial(
            pl.run_scoped,
            buffers=anywhere.get_allocations(x, y),
            pieces=plgpu.SMEM(pieces, out.dtype, transforms=_layout(out.dtype, 1)),
            collective_axes="warpgroup",
        )
        def _(buffers, pieces):
            def run(multiply, n_slices, inputs, index_maps, result, column_tile, written):
                write = functools.partial(_write, pieces, result, column_tile, written)
                pipeline(multiply, n_slices, index_maps, write)(*inputs, allocations=buffers)

            @plgpu.nd_loop(grid, collective_axes="multiprocessor")
            def _(loop):
                tile(*loop.index, *refs, run=run)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(multiprocessors,),
        grid_names=("multiprocessor",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(*operands)


def _wide(dtype: Any) -> int:
    return _SWIZZLE // jnp.dtype(dtype).itemsize


def _layout(dtype: Any, rows: int) -> tuple[Any, Any]:
    """Returns how shared memory holds a matrix: in tiles of `rows` rows, 128 bytes wide."""
    return plgpu.TilingTransform((rows, _wide(dtype))), plgpu.SwizzleTransform(_SWIZZLE)


def _pipeline(blocks, dtypes, multiply, n_slices, index_maps, write) -> Any:
    """Loads slices one after another and calls `multiply` on each, all inside `write`."""
    return plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(n_slices,),
        memory_registers=40,
        in_specs=[
            plgpu.BlockSpec(block, index_map, transforms=_layout(dtype, 8))
            for block, index_map, dtype in zip(blocks, index_maps, dtypes, strict=True)
        ],
        wg_axis="warpgroup",
        num_compute_wgs=_WARPGROUPS,
        max_concurrent_steps=_BUFFERS,
        compute_context=write,
    )


def _write(pieces, result, column_tile, written, sum_up: Callable[[Any], Any]) -> None:
    """Sums a warpgroup's half of a tile and copies it to the result, piece by piece."""
    warpgroup, wide = lax.axis_index("warpgroup"), pieces.shape[-1]
    first_column = column_tile * _COLUMNS + warpgroup * _HALF
    accumulator = plgpu.ACC((_ROWS, _HALF), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]

    @functools.partial(pl.run_scoped, acc=accumulator)
    def _(acc):
        sum_up(acc)
        sums = acc[...].astype(pieces.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        places = [(i, j) for i in range(_ROWS // _PIECE) for j in range(_HALF // wide)]
        for number, (i, j) in enumerate(places):
            # Two pieces take turns; at most the previous one may still be on its way.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            piece = pieces.at[warpgroup, number % 2]
            piece[...] = sums[i * _PIECE : (i + 1) * _PIECE, j * wide : (j + 1) * wide]
            plgpu.commit_smem()
            columns = pl.ds(first_column + j * wide, wide)
            target = result.at[pl.ds(i * _PIECE, _PIECE), columns]
            _copy(piece, target, written and written(i))


def _copy(piece: Any, target: Any, written: tuple[jax.Array, jax.Array] | None) -> None:
    """Copies rows [first, end) of a piece to the result, or all rows, as one group of copies.

    The group may be empty: waiting counts groups.
    """
    if written is None:
        plgpu.copy_smem_to_gmem(piece, target)
        return
    first, end = written
    size = end - first

    @pl.when(size == _PIECE)
    def _():
        plgpu.copy_smem_to_gmem(piece, target, commit_group=False)

    # Copies have static sizes, so a partial piece is copied by powers of two.
    @pl.when((size > 0) & (size < _PIECE))
    def _():
        begin = first
        for power in range(_PIECE.bit_length() - 2, -1, -1):
            some = 2**power

            @pl.when(size & some != 0)
            def _(begin=begin, some=some):
                rows = pl.ds(begin, some)
                plgpu.copy_smem_to_gmem(piece.at[rows], target.at[rows], commit_group=False)

            begin += size & some

    plgpu.commit_smem_to_gmem_group()
