"""Twelve-bit storage, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.precision import e5m6
from dsjax.precision.fp8 import quantize_block
from tests.closeness import EXACT, assert_close
from tests.oracles import fp8 as oracle

pack = jax.jit(e5m6.pack)
unpack = jax.jit(e5m6.PackedE5M6.unpack, static_argnums=1)


def _codes(packed) -> np.ndarray:
    """Undoes the layout: two codes in three bytes, low bits first."""
    a, b, c = np.moveaxis(np.asarray(packed.packed).reshape(-1, 3).astype(np.uint16), 1, 0)
    codes = np.stack([a | (b & 15) << 8, b >> 4 | c << 4], axis=1)
    rows = np.prod(packed.packed.shape[:-1], dtype=int)
    return codes.reshape(rows, -1)[:, : packed.columns]


def _tiles_of_scale_one(values) -> np.ndarray:
    values = np.asarray(values, np.float32)
    values = np.pad(values, (0, -len(values) % 127)).reshape(-1, 127)
    return np.concatenate([np.full((len(values), 1), 65024, np.float32), values], axis=1)


def test_every_finite_code_is_a_fixed_point():
    values = oracle.e5m6_values()
    x = _tiles_of_scale_one(values[np.isfinite(values)])
    packed = pack(jnp.asarray(x))
    np.testing.assert_array_equal(packed.scales, 1)
    assert_close(unpack(packed), x, EXACT, "numbers")
    assert_close(unpack(packed, jnp.bfloat16).astype(jnp.float32), x, EXACT, "bfloat16 numbers")
    want = oracle.e5m6_encode(x.astype(np.float64)).reshape(len(x), -1)
    np.testing.assert_array_equal(_codes(packed), want)


def test_rounding_is_to_the_nearest_even_in_one_step():
    sizes = oracle.e5m6_values()[: 31 << 6].astype(np.float32)
    ties = (sizes[1:] + sizes[:-1]) / 2
    numbers = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    x = _tiles_of_scale_one(np.concatenate([numbers, -numbers]))
    want = oracle.e5m6_encode(x.astype(np.float64)).reshape(len(x), -1)
    np.testing.assert_array_equal(_codes(pack(x)), want)


def test_layout_is_as_documented():
    # 1 is 01111 000000, -1.5 is 1 01111 100000; the scale 2^-15 moves both up by 15 exponents.
    packed = e5m6.pack(jnp.asarray([[1.0, -1.5]], jnp.float32))
    scale = float(packed.scales[0, 0])
    assert scale == 2.0**-15
    a, b = 30 << 6, 1 << 11 | 30 << 6 | 32
    want = [a & 0xFF, a >> 8 | (b & 15) << 4, b >> 4]
    np.testing.assert_array_equal(packed.packed, [want])


@pytest.mark.parametrize("shape", [(3, 300), (2, 5, 129), (1, 1)])
def test_unpacked_numbers_are_the_nearest_and_packing_them_again_changes_nothing(shape):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * np.exp2(rng.uniform(-9, 9, (*shape[:-1], 1)))).astype(np.float32)
    packed = pack(x)
    assert packed.packed.shape == (*shape[:-1], 3 * -(-shape[-1] // 2))
    spread = np.repeat(np.asarray(packed.scales), 128, axis=-1)[..., : shape[-1]]
    codes = oracle.e5m6_encode(x.astype(np.float64) / spread)
    want = (oracle.e5m6_values()[codes] * spread).astype(np.float32)
    assert_close(unpack(packed), want, EXACT, "numbers")
    np.testing.assert_allclose(unpack(packed), x, rtol=2.0**-7)
    assert_close(pack(unpack(packed)).packed, packed.packed, EXACT, "packed again")


def test_tiles_the_other_way_take_the_numbers_over_without_a_new_rounding_of_scales():
    x = np.random.default_rng(0).normal(size=(128, 128)).astype(np.float32)
    kept = unpack(pack(jnp.asarray(x)))
    turned = quantize_block(kept, (128, 1), "pow2")
    codes, scales = oracle.quantize(np.asarray(kept), (128, 1), "pow2")
    assert_close(turned.scales, scales, EXACT, "scales")
    np.testing.assert_array_equal(np.asarray(turned.values).view(np.uint8), codes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_input_becomes_nan_in_its_place_alone(bad):
    x = np.random.default_rng(0).normal(size=(2, 200)).astype(np.float32)
    x[1, 3] = 0
    clean = np.array(unpack(pack(jnp.asarray(x))))
    x[1, 3], clean[1, 3] = bad, np.nan
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(x))), clean)


def test_zeros_keep_a_scale():
    packed = pack(jnp.zeros((2, 130)))
    assert np.all(np.asarray(packed.scales) > 0)
    np.testing.assert_array_equal(unpack(packed), 0)
