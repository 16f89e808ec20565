"""Grouped matrix products: rows sorted by group, one weight matrix a group.

`grouped_matmul(x_AD, w_EDF, sizes_E)` multiplies the first `sizes[0]` rows with `w[0]`, the next `sizes[1]` with `w[1]`,
and so on: what the experts of a mixture do. `grouped_outer` is the product that its weight gradient needs.
Every row belongs to a group (the sizes sum to A), so nothing is dropped and nothing is left uninitialised.

Three ways, the same numbers, chosen by `platform`, the kind of machine that the program is compiled for:

* tpu: the Mosaic kernel that ships with JAX (megablox). `lax.ragged_dot` turns into a dense masked product on v5e, v6e
  and tpu7x, E times the useful work.
* cpu: plain XLA, blocks of rows inside a loop over groups. Work grows with rows plus half a block a group, and each
  weight is read once.
* gpu: `lax.ragged_dot`.

Groups are walked in order and a block may run past the end of its group: the rows there are rewritten when their own
group's turn comes. That is why no padding between groups is needed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_MIN_BLOCK_ROWS, _MAX_BLOCK_ROWS = 32, 256


def grouped_matmul(
    x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, platform: str
) -> jax.Array:
    """Multiplies each group's rows with its matrix.

    Args:
      x_AD: rows sorted by group, any float dtype.
      w_EDF: one matrix a group, same dtype as x.
      sizes_E: int32 rows in each group, summing to A.

    Returns:
      [A, F] in x's dtype, accumulated in float32.
    """
    matmul = {"cpu": _blocked_matmul, "gpu": _ragged_matmul, "tpu": _megablox_matmul}[platform]
    return matmul(x_AD, w_EDF, sizes_E)


def grouped_outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array, platform: str) -> jax.Array:
    """Sums x^T y over each group's rows: [A, D], [A, F] -> [E, D, F] float32."""
    outer = {"cpu": _blocked_outer, "gpu": _ragged_outer, "tpu": _megablox_outer}[platform]
    return outer(x_AD, y_AF, sizes_E)


def reference_matmul(x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The definition, one gathered matrix a row: the slow reference of `grouped_matmul`."""
    group_A = _group_of_row(x_AD.shape[0], sizes_E)
    return jnp.einsum(
        "AD,ADF->AF", x_AD, w_EDF[group_A], preferred_element_type=jnp.float32
    ).astype(x_AD.dtype)


def reference_outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The definition of `grouped_outer`, through a one-hot of the groups."""
    group_A = _group_of_row(x_AD.shape[0], sizes_E)
    onehot_AE = jax.nn.one_hot(group_A, sizes_E.shape[0], dtype=x_AD.dtype)
    return jnp.einsum("AE,AD,AF->EDF", onehot_AE, x_AD, y_AF, preferred_element_type=jnp.float32)


def _group_of_row(rows: int, sizes_E: jax.Array) -> jax.Array:
    return jnp.searchsorted(
        jnp.cumsum(sizes_E), jnp.arange(rows, dtype=sizes_E.dtype), side="right"
    )


def _block_rows(rows: int, groups: int) -> int:
    """A power of two near the mean group: larger blocks run the GEMM faster, smaller ones waste fewer rows."""
    mean = max(rows // groups, 1)
    return min(max(1 << (mean.bit_length() - 1), _MIN_BLOCK_ROWS), _MAX_BLOCK_ROWS)


def _blocked_matmul(x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    rows, block = x_AD.shape[0], _block_rows(x_AD.shape[0], w_EDF.shape[0])
    padded_x = jnp.pad(x_AD, ((0, block), (0, 0)))
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def group(out, group_inputs):
        w_DF, start, size = group_inputs

        def one_block(i, out):
            offset = start + i * block
            x_block = lax.dynamic_slice_in_dim(padded_x, offset, block)
            y_block = jnp.matmul(x_block, w_DF, preferred_element_type=jnp.float32)
            return lax.dynamic_update_slice_in_dim(out, y_block.astype(out.dtype), offset, 0)

        return lax.fori_loop(0, -(-size // block), one_block, out), None

    out = jnp.zeros((rows + block, w_EDF.shape[2]), x_AD.dtype)
    return lax.scan(group, out, (w_EDF, starts_E, sizes_E))[0][:rows]


def _blocked_outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    block = _block_rows(x_AD.shape[0], sizes_E.shape[0])
    padded_x = jnp.pad(x_AD, ((0, block), (0, 0)))
    padded_y = jnp.pad(y_AF, ((0, block), (0, 0)))
    starts_E = jnp.cumsum(sizes_E) - sizes_E

    def group(_, group_inputs):
        start, size = group_inputs

        def one_block(i, total):
            offset = start + i * block
            x_block = lax.dynamic_slice_in_dim(padded_x, offset, block)
            y_block = lax.dynamic_slice_in_dim(padded_y, offset, block)
            mine = (jnp.arange(block, dtype=jnp.int32) + i * block < size)[:, None]
            y_block = jnp.where(mine, y_block, jnp.zeros_like(y_block))
            return total + jnp.matmul(x_block.T, y_block, preferred_element_type=jnp.float32)

        zeros = jnp.zeros((x_AD.shape[1], y_AF.shape[1]), jnp.float32)
        return None, lax.fori_loop(0, -(-size // block), one_block, zeros)

    return lax.scan(group, None, (starts_E, sizes_E))[1]


def _ragged_matmul(x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    out = lax.ragged_dot(x_AD, w_EDF, sizes_E, preferred_element_type=jnp.float32)
    return out.astype(x_AD.dtype)


def _ragged_outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(x_AD, y_AF, sizes_E, numbers, preferred_element_type=jnp.float32)


def _megablox_matmul(x_AD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    rows = x_AD.shape[0]
    x_AD, tile = _pad_rows(x_AD)
    tiling = (tile, min(512, w_EDF.shape[1]), min(512, w_EDF.shape[2]))
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # the kernel's own code needs it
        return gmm(x_AD, w_EDF, sizes_E, preferred_element_type=x_AD.dtype, tiling=tiling)[:rows]


def _megablox_outer(x_AD: jax.Array, y_AF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x_AD, tile = _pad_rows(x_AD)
    y_AF, _ = _pad_rows(y_AF)
    tiling = (tile, min(512, x_AD.shape[1]), min(512, y_AF.shape[1]))
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # the kernel's own code needs it
        out = tgmm(x_AD.T, y_AF, sizes_E, preferred_element_type=jnp.float32, tiling=tiling)
    # The kernel leaves the matrix of an empty group unwritten.
    return jnp.where((sizes_E > 0)[:, None, None], out, jnp.zeros_like(out))


def _pad_rows(x_AD: jax.Array, tile: int = 512) -> tuple[jax.Array, int]:
    """Rows filled up to a multiple of the kernel's tile, which it asks for; the filling belongs to no group."""
    return jnp.pad(x_AD, ((0, -x_AD.shape[0] % tile), (0, 0))), tile
