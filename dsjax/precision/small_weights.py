"""Weights of eight or four bits, for inference: FP8 or integers with a scale per block.

Decoding reads every weight that a token uses, so a device is as fast as its memory, and what fits
on it depends on the bytes per weight. Here a weight is stored as E4M3, int8 or int4 and widened
where it is multiplied; activations stay as they are.

FP8. Values and scales are those of a published checkpoint, or come by the rule that training has
(`dsjax.precision.fp8`): 128 x 128 numbers share a float32 scale, 8.002 bits per weight.

Integers. A block is 32 numbers along the dimension that products sum over, in one column of the
matrix. Its scale is bfloat16: 8.5 and 4.5 bits per weight.

    int8: scale = amax / 127              value = round(x / scale) in -127 .. 127
    int4: scale = -extreme / 8            value = round(x / scale) in -8 .. 7

`extreme` is the number of largest magnitude, with its sign: it becomes -8, so that all sixteen
values are used. These are the rules of GGUF's Q8_0 and Q4_0; only the scales' type differs, since
TPUs have bfloat16 and no float16. Numbers are rounded by the scale as stored, so its own rounding
costs next to nothing.

Products. An integer times its scale is exact in float32, E4M3 times a float32 scale is rounded
there; either is rounded once in bfloat16.

* TPU: a kernel widens a block of the matrix at a time (`dsjax.kernels.small_matmul`). Where a mesh
  splits the product, which the compiler does, v5e and v5p fuse the widening into it, while v6e and
  tpu7x write the widened matrix to memory first; the experts have the kernel there too.
* GPU: for a few rows, products are multiplied and summed, which XLA can fuse with the widening; for
  many, where arithmetic takes the time, the matrix is widened first.
* CPU: a band of columns at a time is widened in a core's cache (`dsjax.precision.bands`), and an
  expert when its turn comes. int4 lies two to a byte (`dsjax.precision.nibbles`). Where a mesh
  splits the product, XLA widens the matrix into memory before it multiplies.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dsjax.kernels import grouped_matmul as kernels
from dsjax.kernels import small_matmul
from dsjax.kernels.varying import by_hand, vary_as
from dsjax.precision.bands import matmul_in_bands
from dsjax.precision.float_bits import FloatBits, bits_of
from dsjax.precision.fp8 import AMAX_FLOOR, E4M3, E4M3_MAX, WEIGHT_BLOCK, BlockScaled
from dsjax.precision.policy import Policy

BLOCK = 32
# Fewer numbers per scale would save little. Where a device's share of a dimension does not divide
# into blocks of at least these, the matrix stays as it is.
_SMALLEST_BLOCK = 8
_SCALE = np.dtype(ml_dtypes.bfloat16)
_FEW_ROWS = 4  # on a GPU; each row reads the matrix anew, from the cache as far as it goes

Weight = jax.Array | FloatBits | BlockScaled


def _per_column(w: BlockScaled) -> jax.Array:
    """Returns a scale for each column of a block, which the kernel takes: of E4M3, 3 % more bytes
    than the weights have.
    """
    return jnp.repeat(w.scales, w.block[1], axis=-1)


def block_size(depth: int, most: int = BLOCK) -> int | None:
    """Returns the numbers per block for a dimension of size `depth`: the largest divisor that
    divides `most` too; None if that is below 8.
    """
    block = math.gcd(depth, most)
    return block if block >= _SMALLEST_BLOCK else None


def scale_type(dtype: np.dtype) -> np.dtype:
    """Returns the type of the scales of an element type."""
    return np.dtype(np.float32) if dtype == E4M3 else _SCALE


def bits_per_weight(dtype: np.dtype, block: tuple[int, int]) -> float:
    scale = 8 * scale_type(dtype).itemsize / math.prod(block)
    return (4 if dtype == ml_dtypes.int4 else 8) + scale


def quantize_e4m3(w_DF: np.ndarray) -> BlockScaled:
    """Quantises a float32 matrix on the host to what `fp8.quantize_block` gives by default.

    Returns:
      NumPy arrays: values [D, F], scales [ceil(D / 128), ceil(F / 128)].

    Raises:
      ValueError: a weight is not finite.
    """
    (D, F), (r, c) = w_DF.shape, WEIGHT_BLOCK
    padded = np.pad(w_DF, ((0, -D % r), (0, -F % c)))
    blocks = padded.reshape(len(padded) // r, r, padded.shape[1] // c, c)
    amax = np.abs(blocks).max(axis=(1, 3), keepdims=True)
    if not np.isfinite(amax).all():
        raise _not_finite(w_DF, np.dtype(E4M3))
    scales = np.maximum(amax, np.float32(AMAX_FLOOR)) / np.float32(E4M3_MAX)
    values = np.clip(blocks / scales, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    return BlockScaled(values.reshape(padded.shape)[:D, :F], scales[:, 0, :, 0], WEIGHT_BLOCK)  # pyright: ignore[reportArgumentType]


def quantize(w_DF: np.ndarray, dtype: np.dtype, block: int) -> BlockScaled:
    """Quantises a matrix on the host.

    Args:
      w_DF: float32; D divides into blocks.
      dtype: int8 or int4.

    Returns:
      NumPy arrays: values [D, F], scales [D / block, F].

    Raises:
      ValueError: a weight is not finite, which no integer can say.
    """
    D, F = w_DF.shape
    blocks = w_DF.reshape(D // block, block, F)
    if dtype == ml_dtypes.int4:
        low, high = -8, 7
        at = np.abs(blocks).argmax(axis=1, keepdims=True)
        scales = np.take_along_axis(blocks, at, axis=1) / -8
    else:
        low, high = -127, 127
        scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    if not np.isfinite(scales).all():
        raise _not_finite(w_DF, dtype)
    stored = scales.astype(_SCALE)
    scales = stored.astype(np.float32)
    scales[scales == 0] = 1  # a block of zeros
    values = np.clip(np.rint(blocks / scales), low, high).astype(np.int8)
    return BlockScaled(values.reshape(D, F).astype(dtype), stored[:, 0], (block, 1))  # pyright: ignore[reportArgumentType]


def _not_finite(w_DF: np.ndarray, dtype: np.dtype) -> ValueError:
    return ValueError(
        f"{int((~np.isfinite(w_DF)).sum())} of {w_DF.size} weights are not finite, which "
        f"{np.dtype(dtype)} cannot hold; the checkpoint is damaged, or its training diverged"
    )


def at_use(w: Weight, dtype: DTypeLike) -> jax.Array:
    """Returns a weight as an array of `dtype`, whichever way it is stored."""
    return w.dequantize(dtype) if isinstance(w, BlockScaled) else w.astype(dtype)


def matmul(x: jax.Array, w_DF: BlockScaled, policy: Policy, dtype: DTypeLike) -> jax.Array:
    """Multiplies x[..., D] by a small matrix: [..., F] in `dtype`, summed in float32."""
    n_rows, D = math.prod(x.shape[:-1]), x.shape[-1]
    if policy.target.kind == "tpu" and small_matmul.fits(D, w_DF.block[0]):
        rows, sizes_1 = x.reshape(n_rows, D).astype(policy.compute), jnp.full(1, n_rows, jnp.int32)
        out = small_matmul.small_grouped_matmul(
            rows, w_DF.values[None], _per_column(w_DF)[None], sizes_1, dtype
        )
        return out.reshape(*x.shape[:-1], -1)
    if policy.target.kind == "gpu" and n_rows <= _FEW_ROWS:
        w = w_DF.dequantize(policy.compute).astype(jnp.float32)
        out = (x.astype(jnp.float32)[..., None] * w.reshape((1,) * (x.ndim - 1) + w.shape)).sum(-2)
        return out.astype(dtype)
    if policy.target.kind == "cpu" and by_hand():
        return matmul_in_bands(x, w_DF, policy.compute).astype(dtype)
    wide = jnp.float32 if policy.compute == jnp.float32 else dtype
    w = w_DF.dequantize(policy.compute)
    return jnp.matmul(x.astype(policy.compute), w, preferred_element_type=wide).astype(dtype)


def grouped_matmul(
    x_AD: jax.Array, w_EDF: BlockScaled, sizes_E: jax.Array, policy: Policy
) -> jax.Array:
    """Multiplies each group's rows by its small matrix: [A, F] in the compute type.

    Args:
      x_AD: rows sorted by group.
      sizes_E: int32, the number of rows in each group; they sum to A.
    """
    x_AD, (E, D, F) = x_AD.astype(policy.compute), w_EDF.shape
    if policy.target.kind == "tpu" and small_matmul.fits(D, w_EDF.block[0]):
        return small_matmul.small_grouped_matmul(
            x_AD, w_EDF.values, _per_column(w_EDF), sizes_E, policy.compute
        )
    if policy.target.kind == "gpu":
        # A loop of unknown length goes to the host at every turn.
        w = w_EDF.dequantize(policy.compute)
        return kernels.grouped_matmul(x_AD, w, sizes_E, policy.target, dtype=policy.compute)
    tile = small_matmul.tile_rows(x_AD.shape[0], E)
    (rows,), aligned_E = kernels.align_groups((x_AD,), sizes_E, tile)
    group_T = kernels.group_of_row(rows.shape[0] // tile, aligned_E // tile)
    on_cpu = policy.target.kind == "cpu"
    w_EDF = jax.tree.map(bits_of, w_EDF) if on_cpu else w_EDF

    def product(tile_TD: jax.Array, w_DF: BlockScaled) -> jax.Array:
        if on_cpu:
            return matmul_in_bands(tile_TD, w_DF, policy.compute)
        w = w_DF.dequantize(policy.compute)
        return jnp.matmul(tile_TD, w, preferred_element_type=jnp.float32)

    def multiply(index: jax.Array, out: jax.Array) -> jax.Array:
        w_DF = jax.tree.map(
            lambda leaf: lax.dynamic_index_in_dim(leaf, group_T[index], keepdims=False), w_EDF
        )
        tile_TD = lax.dynamic_slice_in_dim(rows, index * tile, tile)
        y = product(tile_TD, w_DF)
        return lax.dynamic_update_slice_in_dim(out, y.astype(out.dtype), index * tile, 0)

    out = jnp.zeros((rows.shape[0], F), policy.compute)
    out = vary_as(out, x_AD, sizes_E, *jax.tree.leaves(w_EDF))
    out = lax.fori_loop(0, aligned_E.sum() // tile, multiply, out)
    return out[kernels.aligned_rows(x_AD.shape[0], sizes_E, tile)]
