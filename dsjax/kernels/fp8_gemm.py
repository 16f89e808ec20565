"""Block-scaled FP8 matrix products from their definition, and a model of a tensor core's sums.

Slow on purpose. What training runs is the emulation in `dsjax.precision.matmul`; `reference_matmul`
says what it must equal, slice of K by slice of K, each slice's sum brought to float32 and scaled
there. `tensor_core_product` replaces the sum inside a slice by what a Hopper tensor core does, to
study why DeepSeek promotes every 128 elements at all (`docs/fp8_accumulation.md`).

Paper: DeepSeek-V3 (arXiv:2412.19437) sections 3.3.2 and 3.5.2; the register's width is from the
ISCA paper (arXiv:2505.09343) section 3.1. Both describe the unit in words only; this is a reading
of them, not a measurement:

1. An instruction multiplies 32 elements of K. The products and the accumulator are shifted right to
   the largest exponent among them, and what falls below the 13th fraction bit is cut off, not
   rounded.
2. Their sum returns to the accumulator, a register with 13 fraction bits, cut off again.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_INSTRUCTION = 32
_FRACTION_BITS = 13

Product = Callable[[jax.Array, jax.Array], jax.Array]


def float32_product(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """a @ b in float32."""
    a_MK, b_KN = a_MK.astype(jnp.float32), b_KN.astype(jnp.float32)
    return jnp.matmul(a_MK, b_KN, precision=lax.Precision.HIGHEST)


def reference_matmul(
    a_MK: jax.Array,
    a_scales_MX: jax.Array,
    b_KN: jax.Array,
    b_scales_XN: jax.Array,
    *,
    promote_every: int = 128,
    product: Product = float32_product,
) -> jax.Array:
    """Sums slices of K in float32, each multiplied by its row's and its column's scale.

    Args:
      a_MK, b_KN: float8_e4m3fn.
      a_scales_MX, b_scales_XN: float32, a scale for every slice; X is ceil(K / promote_every). The
        scales of 128 x 128 blocks are repeated along the dimension that is not K.
      promote_every: elements of K in a slice, the report's N_C.
      product: how a slice is summed: `float32_product` or `tensor_core_product`.

    Returns:
      [M, N] float32.
    """
    n_slices = -(-a_MK.shape[1] // promote_every)
    a_XMC = _slices(a_MK.T, n_slices, promote_every).swapaxes(1, 2)
    b_XCN = _slices(b_KN, n_slices, promote_every)

    def promote(total_MN, inputs):
        a, a_scale_M, b, b_scale_N = inputs
        return total_MN + product(a, b) * a_scale_M[:, None] * b_scale_N[None, :], None

    zeros = jnp.zeros((a_MK.shape[0], b_KN.shape[1]), jnp.float32)
    return lax.scan(promote, zeros, (a_XMC, a_scales_MX.T, b_XCN, b_scales_XN))[0]


def tensor_core_product(a_MK: jax.Array, b_KN: jax.Array) -> jax.Array:
    """a @ b of E4M3 numbers as a Hopper tensor core sums it: [M, N] float32."""
    n_steps = -(-a_MK.shape[1] // _INSTRUCTION)
    a_XCM = _slices(a_MK.T.astype(jnp.float32), n_steps, _INSTRUCTION)
    b_XCN = _slices(b_KN.astype(jnp.float32), n_steps, _INSTRUCTION)

    def step(register_MN, inputs):
        a_CM, b_CN = inputs
        products_CMN = a_CM[:, :, None] * b_CN[:, None, :]  # exact: 8 significant bits
        terms = jnp.concatenate([products_CMN, register_MN[None]])
        last_bit_MN = _last_bit(jnp.max(jnp.abs(terms), axis=0))
        total_MN = jnp.sum(_cut(terms, last_bit_MN[None]), axis=0)  # exact: below 2^20 last bits
        return _cut(total_MN, _last_bit(jnp.abs(total_MN))), None

    zeros = jnp.zeros((a_MK.shape[0], b_KN.shape[1]), jnp.float32)
    return lax.scan(step, zeros, (a_XCM, b_XCN))[0]


def _slices(x_KN: jax.Array, count: int, size: int) -> jax.Array:
    """[K, N] -> [count, size, N], zeros filling the last slice up."""
    x_KN = jnp.pad(x_KN, ((0, count * size - x_KN.shape[0]), (0, 0)))
    return x_KN.reshape(count, size, -1)


def _last_bit(size: jax.Array) -> jax.Array:
    """The weight of the last fraction bit that a number of this size keeps; 1 for zero."""
    _, exponent = jnp.frexp(size)  # size is in [1/2, 1) * 2^exponent
    bit = jnp.ldexp(jnp.float32(1), exponent - 1 - _FRACTION_BITS)
    return jnp.where(size > 0, bit, 1.0)


def _cut(x: jax.Array, last_bit: jax.Array) -> jax.Array:
    """Cuts off what lies below `last_bit`, towards zero."""
    return jnp.trunc(x / last_bit) * last_bit
