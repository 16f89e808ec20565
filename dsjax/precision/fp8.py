"""Block-scaled FP8: arrays of E4M3 numbers with a float32 scale per small block.

Paper: DeepSeek-V3 (arXiv:2412.19437) section 3.3; the ISCA paper (arXiv:2505.09343) section 3.

Format. A float8_e4m3fn number has a sign, four exponent bits and three mantissa bits. Its largest
value is 448, the smallest normal one 2^-6, the smallest one 2^-9; it has a NaN but no infinity.
Four significant bits over 18 binary orders of magnitude are too few for a whole tensor: a single
outlier would push the ordinary values down to where they vanish. So each block has its own scale,
which maps its largest magnitude (amax) to 448:

    scale = max(amax, 1e-4) / 448        value = e4m3(clip(x / scale, -448, 448))

and `value * scale` recovers the number. Published checkpoints store this very multiplier, under the
name `weight_scale_inv`. Amax is taken online from the block at hand, not from earlier steps.

E4M3 everywhere. The usual hybrid gives gradients E5M2 for its range, at the cost of a mantissa bit.
With a scale per block, the exponents in a block share one offset, range is no longer short, and the
mantissa bit is worth more.

Blocks. A tensor core sums over K internally, so a scale may change between slices of K only where
the partial sum leaves the core anyway: every 128 elements, where DeepSeek promotes it to float32.
Across rows and columns of the result a scale may change freely. Hence:

* activations and their gradients: 1 x 128, that is 128 channels of a token. Outliers belong to
  tokens, so a token must not share its scale. (The report tried 128 x 128 blocks for activation
  gradients: the 16B model diverged.)
* weights: 128 x 128. They have few outliers, and one scale per block serves both the forward
  product and the input gradient, whose K is the other dimension, without quantising twice.
* the weight gradient sums over tokens, so both of its operands are activations in 128 x 1 tiles,
  quantised again from the original values, not transposed from the 1 x 128 tiles.

Not quantised: embedding, head, router, norms and the attention core, as in the report.

Scales. "fp32" is the formula above. "pow2" (UE8M0) first rounds the scale up to a power of two,
then quantises with it; up, so that nothing overflows. That wastes up to one bit of range but no
mantissa bit, and it moves between layouts without error: an E4M3 number times a power of two is
exactly a bfloat16, which makes exact emulation cheap.

Products. Matrix units that take E4M3 multiply the numbers of `quantize_block` (native); other
machines multiply those of `round_trip`, the same numbers times their scales (emulation).
`dsjax.precision.matmul` has both; `dsjax.kernels.target` says which machine is which.

Departures from the report, and what it leaves open:

1. It has no floor for amax. 1e-4 is that of DeepSeek's later kernels: a block of zeros has the
   scale 1e-4 / 448, and a block far below the floor vanishes.
2. It uses power-of-two scales for dispatched and cached activations only; here one choice holds for
   the whole run.
3. It does not mention NaN and infinity. Here either becomes a NaN in its place and does not enter
   amax: clipping an infinity to 448 would hide that a run has diverged, and an infinite amax would
   wipe out the rest of the block.
4. Where a dimension is not a multiple of the block, the last block is smaller. The report's are
   multiples, except for the 576 rows of the latent projection.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

Scale = Literal["fp32", "pow2"]

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4

# Tiles of an activation for a product over channels and for one over tokens; blocks of a weight.
CHANNEL_TILE = (1, 128)
TOKEN_TILE = (128, 1)
WEIGHT_BLOCK = (128, 128)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["block"],
)
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A quantised array; a pytree of two leaves, so jit, scan, sharding and checkpoints take it.

    values: float8_e4m3fn [..., rows, columns]; int8 or int4 in `dsjax.precision.small_weights`. For
      a CPU that decodes, E4M3 may be `FloatBits` and int4 `Nibbles`, which index and widen alike.
    scales: float32, for integers bfloat16, [..., ceil(rows / block[0]), ceil(columns / block[1])],
      multipliers.
    block: rows and columns that share a scale; static. Leading dimensions never do.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def __getitem__(self, index: Any) -> BlockScaled:
        """Indexes leading dimensions."""
        return BlockScaled(self.values[index], self.scales[index], self.block)

    @property
    def mT(self) -> BlockScaled:  # the name that arrays give it
        """Swaps the last two dimensions."""
        rows, columns = self.block
        return BlockScaled(self.values.mT, self.scales.mT, (columns, rows))

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Returns value * scale in `dtype`, computed in the wider of that and the scales' type."""
        return _dequantize(self.values, self.scales, self.block, jnp.dtype(dtype))


def quantize_block(
    x: ArrayLike, block: Sequence[int] = WEIGHT_BLOCK, scale: Scale = "fp32"
) -> BlockScaled:
    """Quantises the last two dimensions of `x` block by block.

    Args:
      x: [..., rows, columns], float32 or a type that converts to it exactly.
      block: rows and columns per block; blocks at the far edges may be smaller.
      scale: "fp32", or "pow2" for scales rounded up to a power of two.

    Raises:
      ValueError: x has fewer than two dimensions or is not of a floating type, `block` is not two
        positive sizes, or `scale` is unknown.
    """
    x = jnp.asarray(x)
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"quantize_block takes floating arrays of two or more dimensions, not {x.dtype} of "
            f"shape {x.shape}; reshape or convert it first"
        )
    block = _two_sizes(block)
    if scale not in ("fp32", "pow2"):
        raise ValueError(f"scale={scale!r} is not a kind of scale; use 'fp32' or 'pow2'")
    values, scales = _quantize(x, block, scale)
    return BlockScaled(values, scales, block)


def _two_sizes(block: Sequence[int]) -> tuple[int, int]:
    try:
        rows, columns = map(operator.index, block)
    except (TypeError, ValueError):  # one number alone, a fraction, or more or fewer than two
        rows = columns = 0
    if min(rows, columns) < 1:
        raise ValueError(f"block={block} is not two positive sizes; the report's is (128, 128)")
    return rows, columns


def round_trip(
    x: jax.Array, block: tuple[int, int], scale: Scale, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Returns `quantize_block(x, block, scale).dequantize(dtype)` to the bit, in two passes over x.

    Emulated products multiply these. No E4M3 array is made on the way: few machines read or write
    one fast.
    """
    blocks = split_blocks(x.astype(jnp.float32), block)
    scales = _scales_of_blocks(blocks, scale)
    # Rounding turns an infinity into a NaN; finite numbers cannot exceed 448 after their scale.
    values = _round_to_e4m3(_divide(blocks, scales, scale))
    return join_blocks(values * scales, x.shape).astype(dtype)


@partial(jax.jit, static_argnums=(1, 2), inline=True)
def _quantize(x: jax.Array, block: tuple[int, int], scale: Scale) -> tuple[jax.Array, jax.Array]:
    blocks = split_blocks(x.astype(jnp.float32), block)
    scales = _scales_of_blocks(blocks, scale)
    return join_blocks(values_of(blocks, scales, scale), x.shape), scales[..., 0, :, 0]


def _scales_of_blocks(blocks: jax.Array, scale: Scale) -> jax.Array:
    return scales_of(jnp.max(magnitudes(blocks), axis=(-3, -1), keepdims=True), scale)


def magnitudes(x: jax.Array) -> jax.Array:
    """Returns what enters amax: |x|, and 0 where x is not finite."""
    return jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)


def scales_of(amax: jax.Array, scale: Scale) -> jax.Array:
    """Returns the scales of blocks with these amax, float32 of any shape."""
    amax = jnp.maximum(amax, AMAX_FLOOR)
    if scale == "pow2":
        return power_of_two_scale(amax, E4M3_MAX)
    # XLA turns a division by a constant into a product with its reciprocal, whose last bit differs;
    # at a tie that changes the code. A divisor that depends on the data prevents it.
    # Both of a fixed type: Pallas takes a scalar's type from the condition otherwise.
    return amax / jnp.where(amax > 0, np.float32(E4M3_MAX), np.float32(np.nan))


def values_of(x: jax.Array, scales: jax.Array, scale: Scale) -> jax.Array:
    """Returns the E4M3 numbers of float32 x for scales that broadcast to it."""
    values = jnp.where(jnp.isfinite(x), _divide(x, scales, scale), jnp.nan)
    # JAX casts values above 464 to NaN where torch saturates. Amax / scale is at most 448, but a
    # machine with a less accurate division may exceed it.
    return jnp.clip(values, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def _divide(blocks: jax.Array, scales: jax.Array, scale: Scale) -> jax.Array:
    if scale == "pow2":
        return blocks * (1.0 / scales)  # exact
    # A divisor per element, since XLA would multiply by the reciprocal of a broadcast one too.
    return blocks / jnp.where(jnp.isnan(blocks), jnp.nan, scales)


def _round_to_e4m3(x: jax.Array) -> jax.Array:
    """Rounds float32 numbers to the nearest E4M3, ties to even; those above 448 in size give NaN.

    A float32 sum rounds to the spacing of float32 numbers near it. Near 2^20 times the power of two
    below |x|, that spacing is E4M3's near x.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    sign, exponent = bits & np.int32(-(2**31)), bits & np.int32(0xFF << 23)
    power = jnp.maximum(lax.bitcast_convert_type(exponent, jnp.float32), 2.0**-6)
    rounded = (jnp.abs(x) + power * 2.0**20) - power * 2.0**20
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(rounded, jnp.int32) | sign, jnp.float32
    )


def power_of_two_scale(amax: jax.Array, largest: float) -> jax.Array:
    """Returns 2 ** ceil(log2(amax / largest)), exactly.

    The bits of a positive float32, read as an integer, are 2^23 times its exponent plus its
    mantissa, so the difference of two such integers, divided by 2^23 and rounded up, is the
    exponent of the quotient rounded up to a power of two.
    """
    bits, largest_bits = (
        lax.bitcast_convert_type(amax, jnp.int32),
        np.float32(largest).view(np.int32),
    )
    exponent = -((largest_bits - bits) >> 23)
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


@partial(jax.jit, static_argnums=(2, 3), inline=True)
def _dequantize(
    values: jax.Array, scales: jax.Array, block: tuple[int, int], dtype: DTypeLike
) -> jax.Array:
    # Integers times bfloat16 scales need no float32 for bfloat16: one rounding either way.
    wide = max(scales.dtype, jnp.dtype(dtype), key=lambda each: each.itemsize)
    blocks = split_blocks(values.astype(wide), block)
    scales = scales.astype(wide)[..., :, None, :, None]
    return join_blocks(blocks * scales, values.shape).astype(dtype)


def split_blocks(x: jax.Array, block: tuple[int, int]) -> jax.Array:
    """Reshapes [..., R, C] to [..., R / r, r, C / c, c], padding the last blocks with zeros.

    A block larger than the array is cut down to it, so that small arrays need no padding.
    """
    (rows, columns), leading = x.shape[-2:], x.shape[:-2]
    r, c = (max(1, min(size, dim)) for size, dim in zip(block, (rows, columns), strict=True))
    if rows % r or columns % c:
        x = jnp.pad(x, [(0, 0)] * len(leading) + [(0, -rows % r), (0, -columns % c)])
    return x.reshape(*leading, x.shape[-2] // r, r, x.shape[-1] // c, c)


def join_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `split_blocks`."""
    *leading, n_r, r, n_c, c = blocks.shape
    return blocks.reshape(*leading, n_r * r, n_c * c)[..., : shape[-2], : shape[-1]]
