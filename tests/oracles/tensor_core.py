"""How a Hopper tensor core sums E4M3 products: a model of the unit, to study why DeepSeek promotes
partial sums to float32 every 128 elements (`docs/fp8_accumulation.md`).

Papers: DeepSeek-V3 (arXiv:2412.19437) section 3.3.2; the register's width is from the ISCA paper
(arXiv:2505.09343) section 3.1. Both describe the unit only in words; this is a reading of them, not
a measurement:

1. An instruction multiplies 32 elements of K. The products and the accumulator are shifted right to
   the largest exponent among them, and what falls below the 13th fraction bit is cut off, not
   rounded.
2. Their sum returns to the accumulator, a register with 13 fraction bits, and is cut off again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_INSTRUCTION = 32
_FRACTION_BITS = 13


def tensor_core_product(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """a @ b of E4M3 numbers as a Hopper tensor core sums it: [M, N] float32."""
    padding = (0, -len(b_KN) % _INSTRUCTION), (0, 0)
    a_XCM, b_XCN = (
        jnp.pad(x.astype(jnp.float32), padding).reshape(-1, _INSTRUCTION, x.shape[1])
        for x in (a_MK.T, b_KN)
    )

    def step(register_MN, inputs):
        a_CM, b_CN = inputs
        products_CMN = a_CM[:, :, None] * b_CN[:, None, :]  # exact: 8 significant bits
        terms = jnp.concatenate([products_CMN, register_MN[None]])
        last_bit_MN = _last_bit(jnp.max(jnp.abs(terms), axis=0))
        total_MN = jnp.sum(_cut(terms, last_bit_MN[None]), axis=0)  # exact: below 2^20 last bits
        return _cut(total_MN, _last_bit(jnp.abs(total_MN))), None

    zeros = jnp.zeros((a_MK.shape[0], b_KN.shape[1]), jnp.float32)
    return lax.scan(step, zeros, (a_XCM, b_XCN))[0]


def _last_bit(size: jax.Array) -> jax.Array:
    """The weight of the last fraction bit that a number of this size keeps; 1 for zero."""
    _, exponent = jnp.frexp(size)  # size is in [1/2, 1) * 2^exponent
    bit = jnp.ldexp(jnp.float32(1), exponent - 1 - _FRACTION_BITS)
    return jnp.where(size > 0, bit, 1.0)


def _cut(x: jax.Array, last_bit: jax.Array) -> jax.Array:
    """Cuts off what lies below `last_bit`, towards zero."""
    return jnp.trunc(x / last_bit) * last_bit
