"""Floating arrays of 8 or 16 bits as the integers of the same bits, for a CPU.

XLA's CPU compiler has no arithmetic of these types, so it widens the operands of each operation,
even of one that only takes a part out of an array. Of a stack of experts a step would so widen all
of them, to read a few; and since that is the same in each step of a loop, it is done ahead of the
loop, into a widened copy of the model. It takes integers as they are: parts are taken out of the
bits, and what was taken is widened.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.typing import DTypeLike

BFLOAT16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
_INTEGERS = {BFLOAT16: np.dtype(np.uint16), E4M3: np.dtype(np.uint8)}


@partial(jax.tree_util.register_dataclass, data_fields=["codes"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class FloatBits:
    """An array of bfloat16 or E4M3; a pytree of one leaf. What changes no number, indexing and
    moving, can be done to the leaf.

    codes: uint16 or uint8.
    dtype: of the numbers.
    """

    codes: jax.Array
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def T(self) -> FloatBits:  # the name that arrays give it
        return FloatBits(self.codes.T, self.dtype)

    def __getitem__(self, index: Any) -> FloatBits:
        return FloatBits(self.codes[index], self.dtype)

    def __jax_array__(self) -> jax.Array:
        return self.astype(self.dtype)

    def astype(self, dtype: DTypeLike) -> jax.Array:
        """Returns the numbers in `dtype`."""
        if jnp.dtype(dtype) == self.dtype:
            return lax.bitcast_convert_type(self.codes, self.dtype)
        widen = _from_bfloat16 if self.dtype == BFLOAT16 else _from_e4m3
        return widen(self.codes).astype(dtype)


def integers_of(dtype: DTypeLike) -> np.dtype | None:
    """Returns the integers that stand for a type's bits; None of types that stay as they are."""
    return _INTEGERS.get(jnp.dtype(dtype))


def bits_of(array: jax.Array) -> jax.Array | FloatBits:
    """Returns an array as `FloatBits` if its type has integers, as it is otherwise."""
    integers = integers_of(array.dtype)
    if integers is None:
        return array
    return FloatBits(lax.bitcast_convert_type(array, integers), array.dtype)


def _from_bfloat16(codes: jax.Array) -> jax.Array:
    """Returns float32, whose upper half these are."""
    return lax.bitcast_convert_type(codes.astype(jnp.uint32) << 16, jnp.float32)


def _from_e4m3(codes: jax.Array) -> jax.Array:
    """Returns float32: the exponent's bias is 7, not 127, and the mantissa has 20 bits less."""
    codes = codes.astype(jnp.int32)
    magnitude, sign = codes & 0x7F, (codes & 0x80) << 24
    normal = lax.bitcast_convert_type((magnitude << 20) + np.int32((127 - 7) << 23), jnp.float32)
    # Below the smallest normal number they are multiples of the smallest one.
    number = jnp.where(magnitude < 8, magnitude.astype(jnp.float32) * 2.0**-9, normal)
    number = jnp.where(magnitude == 0x7F, jnp.nan, number)
    return lax.bitcast_convert_type(lax.bitcast_convert_type(number, jnp.int32) | sign, jnp.float32)
