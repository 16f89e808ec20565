"""Eight- and four-bit weights: what rounding costs, block by block, and products that read them."""

import contextlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from dsjax.kernels.target import Target
from dsjax.parallel.mesh import make_mesh
from dsjax.precision import small_weights
from dsjax.precision.fp8 import BlockScaled, quantize_block
from dsjax.precision.matmul import grouped_linear, linear, vocabulary_logits
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import bits_per_weight, block_size, quantize, quantize_e4m3
from tests.closeness import BF16, EXACT, F32, assert_close, relative_l2

INT8, INT4 = np.dtype(np.int8), np.dtype(ml_dtypes.int4)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
INTEGERS, TYPES = [INT8, INT4], [INT8, INT4, FP8]
D, F, E = 96, 40, 5
SIZES = [7, 0, 33, 1, 20]


def matrix(depth=D, width=F, seed=0):
    """With columns of very different size, an outlier and a block of zeros."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(depth, width)) * 10.0 ** rng.integers(-4, 4, width)
    w[3, 2] *= 50
    w[:32, 1] = 0
    return w.astype(np.float32)


def small(w, dtype, block=32):
    """Quantises a matrix, or a stack of them."""
    if dtype == FP8:
        # As on a device whose share ends within a block of 128.
        scaled = quantize_block(w)
        D, F = w.shape[-2:]
        scales = scaled.scales[..., np.arange(0, D, 32)[:, None] // 128, np.arange(0, F, 8) // 128]
        return BlockScaled(scaled.values, scales, (32, 8))
    if w.ndim == 2:
        return jax.tree.map(jnp.asarray, quantize(w, dtype, block))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(small(m, dtype, block) for m in w))


def dequantized(w: BlockScaled) -> np.ndarray:
    """In float64, by the format's definition alone."""
    scales = np.asarray(w.scales).astype(np.float64)
    for axis, size in zip((-2, -1), w.block, strict=True):
        scales = np.repeat(scales, size, axis=axis)
    return np.asarray(w.values).astype(np.float64) * scales


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("block", [8, 16, 32])
def test_rounding_is_at_most_half_a_step_of_its_block(dtype, block):
    w = matrix()
    got = quantize(w, dtype, block)
    assert got.values.dtype == dtype and got.values.shape == (D, F)
    assert got.scales.dtype == ml_dtypes.bfloat16 and got.scales.shape == (D // block, F)
    step = np.abs(np.repeat(np.asarray(got.scales, np.float64), block, axis=0))
    error = np.abs(dequantized(got) - w)
    blocks = np.abs(w).reshape(D // block, block, F)
    largest = np.repeat(blocks.max(axis=1), block, axis=0)
    steps = 127 if dtype == INT8 else 8
    # The scale is rounded to bfloat16, so that the largest number may lie beyond the last step.
    assert np.all(step <= largest / steps * (1 + 2**-8))
    # With four bits, 8 is not there: what is opposite to the extreme may be a whole step off.
    most = np.where(np.abs(w) > 7.5 * step, 1.0, 0.5) if dtype == INT4 else 0.5
    assert np.all(error <= most * step + largest * 2**-8)
    assert np.all(error[:32, 1] == 0)


@pytest.mark.parametrize(("dtype", "low", "high"), [(INT8, 4e-3, 7e-3), (INT4, 7e-2, 1.05e-1)])
def test_gaussian_weights_lose_what_ggufs_types_of_that_size_lose(dtype, low, high):
    """llama.cpp's Q8_0 and Q4_0 are 5.4e-3 and 8.7e-2 off."""
    w = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    assert low < relative_l2(dequantized(quantize(w, dtype, 32)), w) < high


def test_four_bits_use_all_sixteen_values():
    w = np.random.default_rng(0).normal(size=(4096, 4)).astype(np.float32)
    values = np.unique(np.asarray(quantize(w, INT4, 32).values).astype(int))
    assert values.tolist() == list(range(-8, 8))
    assert np.asarray(quantize(w, INT8, 32).values).min() == -127


def test_numbers_that_integers_cannot_hold_are_refused():
    w = matrix()
    w[5, 5], w[70, 7] = np.nan, -np.inf
    for dtype in INTEGERS:
        with pytest.raises(ValueError, match=f"2 of {D * F} weights are not finite, which {dtype}"):
            quantize(w, dtype, 32)
    with pytest.raises(ValueError, match=f"2 of {D * F} weights are not finite, which float8"):
        quantize_e4m3(w)


def test_e4m3_is_that_of_training_to_the_bit():
    """In blocks of the whole matrix, the last ones smaller; ties, tiny numbers and zeros too."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(300, 200)) * 10.0 ** rng.integers(-9, 3, (300, 200))).astype(np.float32)
    w[:128, :128] = rng.integers(-900, 900, (128, 128)) / 2  # many are halfway
    w[128:256, :128] = 0
    got, want = quantize_e4m3(w), quantize_block(w)
    assert got.block == want.block
    assert_close(
        np.asarray(got.values).view(np.uint8), np.asarray(want.values).view(np.uint8), EXACT
    )
    assert_close(got.scales, want.scales, EXACT)


@pytest.mark.parametrize(
    ("depth", "block"), [(7168, 32), (112, 16), (40, 8), (36, None), (7, None)]
)
def test_blocks_divide_the_dimension(depth, block):
    assert block_size(depth) == block


def test_bits_per_weight_include_the_scales():
    assert (bits_per_weight(INT8, (32, 1)), bits_per_weight(INT4, (32, 1))) == (8.5, 4.5)
    assert bits_per_weight(INT4, (8, 1)) == 6
    assert bits_per_weight(FP8, (128, 128)) == 8 + 32 / 128**2


def on(kind):
    """A kernel of a TPU runs under JAX's interpreter."""
    return pltpu.force_tpu_interpret_mode() if kind == "tpu" else contextlib.nullcontext()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "compute", "level"),
    [
        ("cpu", jnp.float32, F32),
        ("gpu", jnp.float32, F32),
        ("tpu", jnp.float32, F32),
        ("cpu", jnp.bfloat16, BF16),
    ],
    ids=str,
)
def test_products_equal_those_of_the_dequantized_weight(dtype, kind, compute, level):
    w = small(matrix(), dtype)
    policy = Policy(compute, Target(kind))
    for rows in ((2, 2), (3, 4)):  # few and many on a GPU
        x = jnp.asarray(np.random.default_rng(1).normal(size=(*rows, D)), compute)
        want = np.asarray(x, np.float64) @ dequantized(w)
        with on(kind):
            y = jax.jit(lambda x, w: linear(x, w, policy))(x, w)
            logits = jax.jit(lambda x, w: vocabulary_logits(x, w, policy))(x, w)
        assert y.dtype == compute and logits.dtype == jnp.float32
        for name, got in (("linear", y), ("logits", logits)):
            # Column by column: they differ in size by eight orders of magnitude.
            size = np.abs(want).max(axis=(0, 1)) + 1e-30
            assert_close(np.asarray(got, np.float64) / size, want / size, level, name)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("cpu", SIZES),
        ("cpu", [0, 0, 0, 0, 1]),
        ("cpu", [300, 5, 0, 0, 9]),
        ("gpu", SIZES),
        ("tpu", SIZES),
    ],
    ids=str,
)
def test_grouped_products_equal_those_of_the_dequantized_weights(dtype, sizes, kind):
    rng = np.random.default_rng(2)
    w = small(rng.normal(size=(E, D, F)).astype(np.float32), dtype)
    x = jnp.asarray(rng.normal(size=(sum(sizes), D)), jnp.float32)
    policy = Policy(jnp.float32, Target(kind))
    with on(kind):
        got = jax.jit(lambda x, w, s: grouped_linear(x, w, s, policy))(x, w, jnp.asarray(sizes))
    group = np.repeat(np.arange(E), sizes)
    want = np.einsum("ad,adf->af", np.asarray(x, np.float64), dequantized(w)[group])
    assert_close(got, want, F32)


def test_the_product_of_a_weight_that_is_off_by_one_step_in_a_block_is_told_apart():
    w = small(matrix(), INT8)
    wrong = BlockScaled(w.values, jnp.roll(w.scales, 1, axis=0), w.block)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, D)), jnp.float32)
    policy = Policy(jnp.float32)
    assert relative_l2(linear(x, wrong, policy), np.asarray(x) @ dequantized(w)) > 1e-2


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_products_are_the_same_over_a_mesh(dtype):
    """Columns split over `tensor`, and rows, as whole blocks, over `fsdp`."""
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    w = small(np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32), dtype)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.float32)
    policy = Policy(jnp.float32)
    one = linear(x, w, policy)
    split = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, P("fsdp", "tensor"))), w
    )
    with jax.set_mesh(mesh):
        many = jax.jit(lambda x, w: linear(x, w, policy))(x, split)
    assert_close(many, one, F32)


def test_what_is_small_stays_small_where_it_is_indexed():
    w = small(np.random.default_rng(0).normal(size=(4, 64, 16)).astype(np.float32), INT4)
    assert w.shape == (4, 64, 16) and w.ndim == 3 and w.dtype == INT4
    assert_close(w[2].dequantize(), w.dequantize()[2], EXACT)
    assert_close(small_weights.at_use(w, jnp.float32), w.dequantize(), EXACT)
    plain = jnp.ones((2, 2), jnp.float32)
    assert small_weights.at_use(plain, jnp.bfloat16).dtype == jnp.bfloat16
