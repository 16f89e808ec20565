"""The definition of the block-scaled product against float64, broken variants of it, and the tensor
core's sums against one-number-at-a-time integers.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.fp8_gemm import (
    e4m3_product,
    float32_product,
    scaled_grouped_matmul,
    scaled_grouped_outer,
    scaled_matmul,
)
from dsjax.kernels.grouped_matmul import align_groups
from tests.closeness import F32, FP8, assert_close, relative_l2
from tests.oracles import fp8 as oracle
from tests.oracles.tensor_core import tensor_core_product

F8 = jnp.float8_e4m3fn
M, K, N = 48, 1000, 200


def _matrices(seed=0, k=K):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(M, k)) * np.exp2(rng.uniform(-3, 3, (M, 1)))
    return a.astype(np.float32), rng.normal(size=(k, N)).astype(np.float32)


def _quantized(a, b):
    """Values and scales of a in 1 x 128 tiles and of b in 128 x 128 blocks."""
    (a_codes, a_scales), (b_codes, b_scales) = (
        oracle.quantize(a, (1, 128), "fp32"),
        oracle.quantize(b, (128, 128), "fp32"),
    )
    columns = np.repeat(b_scales, 128, axis=1)[:, :N]
    return jnp.asarray(a_codes.view(F8)), a_scales, jnp.asarray(b_codes.view(F8)), columns


@pytest.mark.parametrize("product", [float32_product, e4m3_product])
def test_scaled_matmul_equals_float64_product_of_the_quantised_numbers(product):
    a, b = _matrices()
    a8, a_scales, b8, b_scales = _quantized(a, b)
    exact_a = np.asarray(a8, np.float64) * np.repeat(a_scales, 128, axis=1)[:, :K]
    exact_b = np.asarray(b8, np.float64) * np.repeat(b_scales, 128, axis=0)[:K]
    got = scaled_matmul(a8, a_scales, b8, b_scales, product=product)
    assert_close(got, exact_a @ exact_b, F32, "product")
    assert_close(got, a.astype(np.float64) @ b, FP8, "product of the unquantised")


def _dropped_slice(a, a_scales, b, b_scales):
    return a[:, :-128], a_scales[:, :-1], b[:-128], b_scales[:-1]


def _wrong_scale(a, a_scales, b, b_scales):
    b_scales = b_scales.copy()
    b_scales[1, :128] *= 2
    return a, a_scales, b, b_scales


def _transposed_tile(a, a_scales, b, b_scales):
    square = a.astype(jnp.float32)[:48, :48].T.astype(F8)
    return a.at[:48, :48].set(square), a_scales, b, b_scales


def _scales_of_the_neighbour(a, a_scales, b, b_scales):
    return a, np.roll(a_scales, 1, axis=0), b, b_scales


@pytest.mark.parametrize(
    "broken", [_dropped_slice, _wrong_scale, _transposed_tile, _scales_of_the_neighbour]
)
def test_broken_products_leave_the_fp8_band(broken):
    a, b = _matrices(k=1024)
    want = a.astype(np.float64) @ b
    operands = _quantized(a, b)
    assert relative_l2(scaled_matmul(*operands), want) < FP8.bound
    assert relative_l2(scaled_matmul(*broken(*operands)), want) > 2 * FP8.bound


def test_grouped_products_are_those_of_each_group():
    sizes = [30, 0, 140]
    rng = np.random.default_rng(1)
    a = rng.normal(size=(170, 160)).astype(np.float32)
    b = rng.normal(size=(3, 160, 136)).astype(np.float32)
    sizes_E = jnp.asarray(sizes, jnp.int32)
    (aligned,), aligned_E = align_groups((jnp.asarray(a),), sizes_E, 128)
    a8, b8, rows8 = (
        oracle.quantize(x, block, "fp32")
        for x, block in [(a, (1, 128)), (b, (128, 128)), (np.asarray(aligned), (128, 1))]
    )

    @jax.jit
    def both(a8, b8, rows8):
        return (
            scaled_grouped_matmul(*a8, *b8, sizes_E),
            scaled_grouped_outer(*rows8, *rows8, aligned_E),
        )

    product, outer = both(*((codes.view(F8), scales) for codes, scales in (a8, b8, rows8)))
    exact_a, exact_b, exact_rows = (
        oracle.dequantize(*quantized, block).astype(np.float64)
        for quantized, block in [(a8, (1, 128)), (b8, (128, 128)), (rows8, (128, 1))]
    )
    for e, (rows, aligned_rows) in enumerate(
        zip(_parts(sizes), _parts(np.asarray(aligned_E)), strict=True)
    ):
        assert_close(product[rows], exact_a[rows] @ exact_b[e], F32, f"group {e}")
        mine = exact_rows[aligned_rows]
        assert_close(outer[e], mine.T @ mine, F32, f"outer product of group {e}")


def _parts(sizes) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _cut(x: Fraction, last_bit: Fraction) -> Fraction:
    return math.trunc(x / last_bit) * last_bit


def _last_bit(size: Fraction) -> Fraction:
    exponent = 0
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    return Fraction(2) ** (exponent - 13)


def _dot_on_a_tensor_core(a: np.ndarray, b: np.ndarray) -> float:
    """Sums in exact fractions what the unit keeps."""
    register = Fraction(0)
    for start in range(0, len(a), 32):
        pairs = zip(a[start : start + 32], b[start : start + 32], strict=True)
        terms = [Fraction(float(x)) * Fraction(float(y)) for x, y in pairs] + [register]
        size = max(map(abs, terms))
        total = sum((_cut(term, _last_bit(size)) for term in terms), Fraction(0)) if size else size
        register = _cut(total, _last_bit(abs(total))) if total else Fraction(0)
    return float(register)


def test_tensor_core_product_equals_sums_of_fractions():
    a, b = _matrices(k=200)
    a8, b8 = jnp.asarray(a[:5] * 20, F8), jnp.asarray(b[:, :6] * 20, F8)
    a8 = a8.at[0].set(jnp.zeros(200, F8))
    want = [
        [_dot_on_a_tensor_core(row, column) for column in np.asarray(b8, np.float64).T]
        for row in np.asarray(a8, np.float64)
    ]
    np.testing.assert_array_equal(jax.jit(tensor_core_product)(a8, b8), want)


@pytest.mark.heavy
def test_promotion_bounds_the_error_of_a_short_register():
    """The report's reason to promote: nearly 2 % at K = 4096 without, a fraction of it with."""
    rng = np.random.default_rng(0)
    a8, b8 = (jnp.asarray(rng.normal(size=s), F8) for s in [(64, 4096), (4096, 64)])
    want = np.asarray(a8, np.float64) @ np.asarray(b8, np.float64)

    def worst(promote_every):
        ones = jnp.ones((64, 4096 // promote_every))
        got = scaled_matmul(
            a8, ones, b8, ones.T, promote_every=promote_every, product=tensor_core_product
        )
        return np.max(np.abs(np.asarray(got, np.float64) - want)) / np.sqrt(np.mean(want**2))

    never, every_512, every_128 = worst(4096), worst(512), worst(128)
    assert 0.01 < never < 0.03
    assert every_128 < every_512 / 2 < never / 8
