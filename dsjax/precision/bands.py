"""Products with matrices of few bits on a CPU, a band of columns at a time.

XLA's CPU compiler multiplies float32 alone. A matrix that is widened whole goes through memory
three times, at four bytes a number, and is kept for all steps of a loop: the memory that few bits
should have saved. A band stays in a core's cache until it is multiplied.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsjax.kernels.varying import vary_as
from dsjax.precision.float_bits import FloatBits, bits_of
from dsjax.precision.fp8 import BlockScaled
from dsjax.precision.nibbles import Nibbles

_LARGEST = 1 << 17  # numbers of a band: half of the cache of a core, in float32
_NARROWEST = 64  # columns


class AlternateRows(NamedTuple):
    """A matrix as its even rows and its odd ones, which arrays multiply as they do an array."""

    even: jax.Array
    odd: jax.Array

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        return x[..., 0::2] @ self.even + x[..., 1::2] @ self.odd


def as_factor(
    w_DF: jax.Array | FloatBits | BlockScaled, dtype: DTypeLike
) -> jax.Array | AlternateRows:
    """Returns a matrix in `dtype` as what can stand on the right of a product."""
    if not isinstance(w_DF, BlockScaled):
        return w_DF.astype(dtype)
    if not isinstance(w_DF.values, Nibbles):
        return w_DF.dequantize(dtype)
    half = w_DF.block[0] // 2, w_DF.block[1]
    parts = (BlockScaled(rows, w_DF.scales, half) for rows in w_DF.values.even_odd)
    return AlternateRows(*(part.dequantize(dtype) for part in parts))


def matmul_in_bands(x: jax.Array, w_DF: FloatBits | BlockScaled, compute: DTypeLike) -> jax.Array:
    """Multiplies x[..., D] by a matrix: float32 [..., F], summed in float32.

    Args:
      compute: the type that both operands are rounded to.
    """
    rows_MD = x.astype(compute).astype(jnp.float32).reshape(-1, x.shape[-1])
    width, w_DF = band_width(w_DF), jax.tree.map(bits_of, w_DF)

    def product(band: FloatBits | BlockScaled) -> jax.Array:
        factor = as_factor(band, compute)
        return rows_MD @ jax.tree.map(lambda part: part.astype(jnp.float32), factor)

    def run(index: jax.Array, out_MF: jax.Array) -> jax.Array:
        def columns(leaf: jax.Array) -> jax.Array:
            share = leaf.shape[-1] * width // w_DF.shape[-1]
            return lax.dynamic_slice_in_dim(leaf, index * share, share, axis=-1)

        out = product(jax.tree.map(columns, w_DF))
        return lax.dynamic_update_slice_in_dim(out_MF, out, index * width, axis=-1)

    F = w_DF.shape[-1]
    if width == F:
        out_MF = product(w_DF)
    else:
        out_MF = jnp.zeros((len(rows_MD), F), jnp.float32)
        out_MF = vary_as(out_MF, rows_MD, *jax.tree.leaves(w_DF))
        out_MF = lax.fori_loop(0, F // width, run, out_MF)
    return out_MF.reshape(*x.shape[:-1], F)


def band_width(w_DF: FloatBits | BlockScaled) -> int:
    """Returns the columns of a band: a divisor of their number, all of them if none is suitable.
    Blocks with a scale of their own stay whole.
    """
    depth, columns = w_DF.shape
    step = w_DF.block[1] if isinstance(w_DF, BlockScaled) else 1
    if depth * columns <= _LARGEST or columns % step:
        return columns
    widths = [width for width in range(step, columns, step) if columns % width == 0]
    widths = [width for width in widths if width >= _NARROWEST]
    narrow = [width for width in widths if depth * width <= _LARGEST]
    return max(narrow) if narrow else min(widths, default=columns)
