"""Block-scaled FP8 matrix products, as defined: K is cut into slices, and each slice's sum is
converted to float32, scaled, and added to the total.

`scaled_matmul` leaves open how a slice is summed:

* `e4m3_product` is the machine's own E4M3 product. Training uses it where matrix units multiply
  E4M3 (`Target.multiplies_e4m3`), along with `scaled_grouped_matmul` and `scaled_grouped_outer`
  for the experts; not on a Hopper whose program is not split by the compiler, which has kernels of
  its own (`dsjax.kernels.hopper_scaled`). Elsewhere training emulates it
  (`dsjax.precision.matmul`).
* `float32_product` is the reference.

Accuracy: products of E4M3 numbers are exact in float32, so only sums round. Where sums are float32,
as on the CPU, the two differ by the order of summation, 1e-6. A Hopper accumulator of 14 bits is
off by about 0.1 % of the product's root mean square in a slice of 128 (`docs/fp8_accumulation.md`);
the rounding of the operands is 3.7 %.

Cost: each slice's sums leave the matrix unit through memory, at least 12 bytes of traffic per
element of the result and 256 FLOPs. Only a kernel that keeps them in registers could reach the
unit's peak rate. Those for Hopper do, but multiply in float16.

Paper: DeepSeek-V3 (arXiv:2412.19437) sections 3.3.2 and 3.5.2.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsjax.kernels.grouped_matmul import align_groups, aligned_rows, group_of_row
from dsjax.kernels.varying import vary_as

SLICE = 128  # elements of K that share a scale

Product = Callable[[jax.Array, jax.Array], jax.Array]


def float32_product(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """Returns a @ b in float32."""
    a_MK, b_KN = a_MK.astype(jnp.float32), b_KN.astype(jnp.float32)
    return jnp.matmul(a_MK, b_KN, precision=lax.Precision.HIGHEST)


def e4m3_product(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """Returns a @ b as the machine multiplies E4M3 operands, converted to float32."""
    return jnp.matmul(a_MK, b_KN, preferred_element_type=jnp.float32)


def scaled_matmul(
    a_MK: jax.Array,
    a_scales_MX: jax.Array,
    b_KN: jax.Array,
    b_scales_XN: jax.Array,
    *,
    promote_every: int = SLICE,
    product: Product = float32_product,
) -> jax.Array:
    """Sums slices of K in float32, each multiplied by the scales of its row and its column.

    Args:
      a_MK, b_KN: float8_e4m3fn.
      a_scales_MX, b_scales_XN: float32, one scale per slice; X is ceil(K / promote_every). Scales
        of 128 x 128 blocks must be repeated along the dimension that is not K.
      promote_every: elements of K per slice, N_C in the report.
      product: how a slice is summed.

    Returns:
      [M, N] float32.
    """
    a_MK, b_KN = fill_up(a_MK, 1, promote_every), fill_up(b_KN, 0, promote_every)

    def promote(total_MN, inputs):
        start, a_scale_M, b_scale_N = inputs
        a = lax.dynamic_slice_in_dim(a_MK, start, promote_every, axis=1)
        b = lax.dynamic_slice_in_dim(b_KN, start, promote_every, axis=0)
        return total_MN + product(a, b) * a_scale_M[:, None] * b_scale_N[None, :], None

    starts_X = jnp.arange(0, a_MK.shape[1], promote_every, dtype=jnp.int32)
    operands = a_MK, a_scales_MX, b_KN, b_scales_XN
    zeros = vary_as(jnp.zeros((a_MK.shape[0], b_KN.shape[1]), jnp.float32), *operands)
    return lax.scan(promote, zeros, (starts_X, a_scales_MX.T, b_scales_XN))[0]


def scaled_grouped_matmul(
    a_AK: jax.Array,
    a_scales_AX: jax.Array,
    b_EKN: jax.Array,
    b_scales_EXY: jax.Array,
    sizes_E: jax.Array,
) -> jax.Array:
    """Applies `scaled_matmul` with `e4m3_product` to each group's rows and its matrix.

    Rows are cut into tiles of 128, each of one group, so that each slice of K is one batched
    product. Each tile copies its matrix's slice: one byte per element, beside the sums' twelve.

    Args:
      a_AK: float8_e4m3fn, rows sorted by group, in 1 x 128 tiles.
      b_EKN: float8_e4m3fn, one matrix per group, in 128 x 128 blocks.
      a_scales_AX, b_scales_EXY: float32; X is ceil(K / 128), Y is ceil(N / 128).
      sizes_E: int32, the number of rows in each group; they sum to A.

    Returns:
      [A, N] float32.
    """
    (a, a_scales), aligned_E = align_groups((a_AK, a_scales_AX), sizes_E, SLICE)
    group_T = _group_of_tile(a.shape[0], aligned_E)
    a_TRK = fill_up(a, 1, SLICE).reshape(group_T.size, SLICE, -1)
    b_EKN = fill_up(b_EKN, 1, SLICE)
    width = b_EKN.shape[2]

    def promote(total_TRN, inputs):
        start, a_scale_TR, b_scale_EY = inputs
        a = lax.dynamic_slice_in_dim(a_TRK, start, SLICE, axis=2)
        b = lax.dynamic_slice_in_dim(b_EKN, start, SLICE, axis=1)[group_T]
        b_scale_TN = jnp.repeat(b_scale_EY[group_T], SLICE, axis=1)[:, :width]
        scales = a_scale_TR[:, :, None] * b_scale_TN[:, None, :]
        return total_TRN + e4m3_product(a, b) * scales, None

    starts_X = jnp.arange(0, a_TRK.shape[2], SLICE, dtype=jnp.int32)
    a_scales_XTR = a_scales.T.reshape(-1, group_T.size, SLICE)
    zeros = jnp.zeros((group_T.size, SLICE, width), jnp.float32)
    zeros = vary_as(zeros, a, a_scales, b_EKN, b_scales_EXY, sizes_E)
    sums, _ = lax.scan(promote, zeros, (starts_X, a_scales_XTR, b_scales_EXY.swapaxes(0, 1)))
    return sums.reshape(-1, width)[aligned_rows(a_AK.shape[0], sizes_E, SLICE)]


def scaled_grouped_outer(
    a_AD: jax.Array,
    a_scales_TD: jax.Array,
    b_AF: jax.Array,
    b_scales_TF: jax.Array,
    sizes_E: jax.Array,
) -> jax.Array:
    """Sums a^T b over each group's rows, with `e4m3_product` in slices of 128 rows.

    Args:
      a_AD, b_AF: float8_e4m3fn in 128 x 1 tiles, rows sorted by group; rows after the last group
        are zeros.
      a_scales_TD, b_scales_TF: float32; T is A / 128.
      sizes_E: int32, the number of rows in each group, multiples of 128
        (`grouped_matmul.align_groups`).

    Returns:
      [E, D, F] float32.
    """
    group_T = _group_of_tile(a_AD.shape[0], sizes_E)
    a_TRD, b_TRF = (x.reshape(-1, SLICE, x.shape[1]) for x in (a_AD, b_AF))

    def promote(total_EDF, inputs):
        group, a, a_scale_D, b, b_scale_F = inputs
        sums_DF = e4m3_product(a.T, b) * a_scale_D[:, None] * b_scale_F[None, :]
        return total_EDF.at[group].add(sums_DF), None

    zeros = jnp.zeros((sizes_E.shape[0], a_AD.shape[1], b_AF.shape[1]), jnp.float32)
    zeros = vary_as(zeros, a_AD, a_scales_TD, b_AF, b_scales_TF, sizes_E)
    return lax.scan(promote, zeros, (group_T, a_TRD, a_scales_TD, b_TRF, b_scales_TF))[0]


def _group_of_tile(rows: int, sizes_E: jax.Array) -> jax.Array:
    """Returns the group of each tile of aligned rows."""
    # Tiles after the last group hold zeros and count as part of it.
    tiles = group_of_row(rows // SLICE, sizes_E // SLICE)
    return jnp.minimum(tiles, sizes_E.shape[0] - 1)


def fill_up(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Pads a dimension with zeros to a multiple of `size`."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, padding)
