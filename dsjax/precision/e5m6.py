"""E5M6: twelve-bit numbers in which the backward pass keeps the input of the linear layer after
attention.

Paper: DeepSeek-V3 (arXiv:2412.19437) section 3.3.3. Attention's own backward pass needs its output
too, so the report gives this input three more mantissa bits than FP8 has, in 1 x 128 tiles with
power-of-two scales. Such scales change no digits when the backward pass quantises the numbers again
in 128 x 1 tiles. Nothing more about the format is public. Ours is:

1. Bits. The upper twelve of an IEEE float16: sign, five exponent bits with bias 15, six mantissa
   bits, with subnormals, infinities and NaN. The largest number is 65024, the smallest 2^-20.
2. Rounding. To the nearest, ties to even, in one step from float32.
3. Scales. 2 ** ceil(log2(amax / 65024)) with amax at least 1e-4, as for FP8. A non-finite number
   becomes a NaN in its place and does not enter amax.
4. Layout. Two neighbours a, b in three bytes, low bits first: a[0:8], then a[8:12] below b[0:4],
   then b[4:12]. A tile row of 128 takes 192 bytes and a float32 scale.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsjax.precision.fp8 import (
    AMAX_FLOOR,
    CHANNEL_TILE,
    join_blocks,
    power_of_two_scale,
    split_blocks,
)

E5M6_MAX = 65024.0
_MANTISSA_BITS, _SMALLEST_EXPONENT = 6, -14


@partial(
    jax.tree_util.register_dataclass, data_fields=["packed", "scales"], meta_fields=["columns"]
)
@dataclasses.dataclass(frozen=True)
class PackedE5M6:
    """An array [..., rows, columns] at twelve bits per number.

    packed: uint8 [..., rows, 3 * ceil(columns / 2)].
    scales: float32 [..., rows, ceil(columns / 128)], powers of two, multipliers.
    """

    packed: jax.Array
    scales: jax.Array
    columns: int

    def unpack(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """Returns number * scale, computed in float32 and cast to `dtype`."""
        bytes_ = self.packed.reshape(*self.packed.shape[:-1], -1, 3).astype(jnp.uint16)
        first = bytes_[..., 0] | (bytes_[..., 1] & 0xF) << 8
        second = bytes_[..., 1] >> 4 | bytes_[..., 2] << 4
        codes = jnp.stack([first, second], axis=-1).reshape(*self.packed.shape[:-1], -1)
        numbers = lax.bitcast_convert_type(codes[..., : self.columns] << 4, jnp.float16)
        blocks = split_blocks(numbers.astype(jnp.float32), CHANNEL_TILE)
        return join_blocks(blocks * self.scales[..., :, None, :, None], numbers.shape).astype(dtype)


def pack(x: jax.Array) -> PackedE5M6:
    """Rounds [..., rows, columns] to E5M6, with a power-of-two scale per 1 x 128 tile."""
    blocks = split_blocks(x.astype(jnp.float32), CHANNEL_TILE)
    finite = jnp.isfinite(blocks)
    sizes = jnp.where(finite, jnp.abs(blocks), 0.0)
    amax = jnp.max(sizes, axis=(-3, -1), keepdims=True, initial=AMAX_FLOOR)
    scales = power_of_two_scale(amax, E5M6_MAX)
    rounded = jnp.where(finite, _round(blocks / scales), jnp.nan)
    numbers = join_blocks(rounded, x.shape).astype(jnp.float16)
    codes = lax.bitcast_convert_type(numbers, jnp.uint16) >> 4  # the lower four bits are zeros
    codes = jnp.pad(codes, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
    first, second = codes[..., ::2], codes[..., 1::2]
    triples = jnp.stack([first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4], axis=-1)
    packed = triples.astype(jnp.uint8).reshape(*x.shape[:-1], -1)
    return PackedE5M6(packed, scales[..., 0, :, 0], x.shape[-1])


def _round(x: jax.Array) -> jax.Array:
    """Rounds to six fraction bits or the subnormals' spacing, which float16 holds exactly."""
    exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23 & 0xFF) - 127
    last_bit = jnp.maximum(exponent, _SMALLEST_EXPONENT) - _MANTISSA_BITS
    return jnp.round(x * _power_of_two(-last_bit)) * _power_of_two(last_bit)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
