"""Products with matrices of few bits, a band of columns at a time, against the whole in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsjax.precision import bands
from dsjax.precision.bands import as_factor, band_width, matmul_in_bands
from dsjax.precision.float_bits import FloatBits
from dsjax.precision.fp8 import BlockScaled
from dsjax.precision.matmul import linear, vocabulary_logits
from dsjax.precision.nibbles import Nibbles, packed
from dsjax.precision.policy import Policy
from dsjax.precision.small_weights import quantize, quantize_e4m3
from tests.closeness import BF16, F32, assert_close

KINDS = ["bfloat16", "fp8", "int8", "int4", "nibbles"]


def stored(w: np.ndarray, kind: str):
    """The matrix as it is stored, and its numbers in float64."""
    if kind == "bfloat16":
        codes = w.astype(ml_dtypes.bfloat16).view(np.uint16)
        kept = FloatBits(jnp.asarray(codes), np.dtype(ml_dtypes.bfloat16))
        return kept, w.astype(ml_dtypes.bfloat16).astype(np.float64)
    integers = np.dtype("int8" if kind == "int8" else ml_dtypes.int4)
    kept = quantize_e4m3(w) if kind == "fp8" else quantize(w, integers, 32)
    scales = np.asarray(kept.scales).astype(np.float64)
    for axis, size in zip((0, 1), kept.block, strict=True):
        scales = np.repeat(scales, size, axis=axis)
    numbers = np.asarray(kept.values).astype(np.float64) * scales[: len(w), : w.shape[1]]
    if kind == "nibbles":
        codes = packed(np.asarray(kept.values))
        kept = BlockScaled(Nibbles(jnp.asarray(codes)), kept.scales, kept.block)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(jnp.asarray, kept), numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2,), (1, 3)], ids=str)
@pytest.mark.parametrize("width", [384, 200], ids=str)
def test_bands_are_the_whole_product(kind, shape, width, monkeypatch):
    """384 columns are three bands; of 200, blocks of 128 do not divide, so they stay whole."""
    monkeypatch.setattr(bands, "_LARGEST", 64 * 128)
    rng = np.random.default_rng(0)
    w, x = (
        rng.normal(size=(64, width)) * 10.0 ** rng.integers(-2, 2, width),
        rng.normal(size=(*shape, 64)),
    )
    w, x = w.astype(np.float32), x.astype(np.float32)
    kept, numbers = stored(w, kind)
    assert (band_width(kept) == 128) == (width == 384)
    got = jax.jit(matmul_in_bands, static_argnums=2)(x, kept, jnp.float32)
    assert got.dtype == jnp.float32
    assert_close(got, x.astype(np.float64) @ numbers, F32, kind)


@pytest.mark.parametrize("compute", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_layers_multiply_by_bits_as_by_the_array(compute):
    rng, policy = np.random.default_rng(0), Policy(compute)
    w, x = (rng.normal(size=size).astype(np.float32) for size in ((64, 40), (3, 64)))
    bits, _ = stored(w, "bfloat16")
    for layer, dtype in ((linear, compute), (vocabulary_logits, jnp.float32)):
        got, want = (layer(jnp.asarray(x), each, policy) for each in (bits, jnp.asarray(bits)))
        assert got.dtype == want.dtype == dtype
        assert_close(got, want, F32 if dtype == jnp.float32 else BF16, str(layer))


@pytest.mark.parametrize("columns, block, want", [
    (8192, (32, 1), 256),  # 512 x 256 numbers
    (1408, (32, 1), 176),
    (1408, (128, 128), 128),  # 256 columns do not divide
    (200, (32, 1), 200),  # small enough
    (8191, (32, 1), 8191),  # a prime
    (1000, (128, 128), 1000),
])  # fmt: skip
def test_widths_of_bands(columns, block, want):
    D = 512
    shape = (-(-D // block[0]), -(-columns // block[1]))
    values, scales = jnp.zeros((D, columns), jnp.int8), jnp.zeros(shape, jnp.float32)
    assert band_width(BlockScaled(values, scales, block)) == want


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_is_its_matrix(kind):
    rng = np.random.default_rng(0)
    w, x = (rng.normal(size=size).astype(np.float32) for size in ((64, 40), (3, 64)))
    kept, numbers = stored(w, kind)
    got = jax.jit(lambda x, w: x @ as_factor(w, jnp.float32))(x, kept)
    assert_close(got, x.astype(np.float64) @ numbers, F32, kind)


def test_a_band_alone_is_widened():
    """In a loop that multiplies by it again and again, no matrix is widened whole."""
    D, F = 512, 4096
    w, _ = stored(np.random.default_rng(0).normal(size=(D, F)).astype(np.float32), "bfloat16")

    def steps(w, x):
        return jax.lax.fori_loop(0, 3, lambda _, x: matmul_in_bands(x, w, jnp.float32)[:, :D], x)

    analysis = jax.jit(steps).lower(w, jnp.ones((1, D))).compile().memory_analysis()
    assert analysis is not None
    assert 4 * D * 256 <= analysis.temp_size_in_bytes < 4 * D * F // 4
