"""The block quantiser, bit for bit against an oracle that knows neither JAX nor ml_dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsjax.checkpoint import store
from dsjax.precision import fp8
from dsjax.precision.fp8 import BlockScaled, quantize_block, round_trip
from tests.closeness import EXACT, assert_close
from tests.oracles import fp8 as oracle

BLOCKS = [(1, 128), (128, 1), (128, 128)]
KINDS = ["fp32", "pow2"]


_round_trip = jax.jit(round_trip, static_argnums=(1, 2))


def _codes(quantized: BlockScaled) -> np.ndarray:
    return np.asarray(quantized.values).view(np.uint8)


def _random(shape, seed=0) -> np.ndarray:
    """Rows of very different sizes, as tokens are."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.uniform(-12, 9, (*shape[:-1], 1)))
    return (rng.normal(size=shape) * sizes).astype(np.float32)


def _assert_equals_oracle(quantized: BlockScaled, x: np.ndarray, kind: str) -> None:
    codes, scales = oracle.quantize(x, quantized.block, kind)
    assert_close(quantized.scales, scales, EXACT, "scales")
    is_nan = np.isnan(oracle.VALUES[codes])
    np.testing.assert_array_equal(np.isnan(oracle.VALUES[_codes(quantized)]), is_nan)
    got = np.where(is_nan, 0, _codes(quantized)).astype(np.uint8)
    assert_close(got, np.where(is_nan, 0, codes).astype(np.uint8), EXACT, "codes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(200, 300), (2, 130, 1), (1, 576)])
def test_quantize_equals_oracle(shape, block, kind):
    x = _random(shape)
    eager = quantize_block(x, block, kind)
    _assert_equals_oracle(eager, x, kind)
    want = oracle.dequantize(_codes(eager), np.asarray(eager.scales), block)
    assert_close(eager.dequantize(), want, EXACT, "dequantized")
    # Inside a larger program XLA sees more to rewrite.
    fused, emulated = jax.jit(
        lambda x: (
            -quantize_block(-x, block, kind).dequantize(),
            round_trip(x, block, kind),
        )
    )(x)
    assert_close(fused, want, EXACT, "dequantized, fused")
    assert_close(emulated, want, EXACT, "without E4M3 numbers between")


def _tile_of_scale_one(values) -> np.ndarray:
    """Rows of 128 whose first element, 448, makes the scale 1."""
    values = np.asarray(values, np.float32)
    values = np.pad(values, (0, -len(values) % 127)).reshape(-1, 127)
    return np.concatenate([np.full((len(values), 1), 448, np.float32), values], axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_a_fixed_point(kind):
    numbers = oracle.VALUES[~np.isnan(oracle.VALUES)]
    x = _tile_of_scale_one(numbers)
    quantized = quantize_block(x, (1, 128), kind)
    np.testing.assert_array_equal(quantized.scales, 1)
    assert_close(quantized.dequantize(), x, EXACT, "numbers, the sign of zero too")
    assert_close(_round_trip(x, (1, 128), kind), x, EXACT, "without E4M3 numbers between")


@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_even_code_and_their_neighbours_do_not(kind):
    sizes = oracle.VALUES[:127].astype(np.float32)
    ties = (sizes[1:] + sizes[:-1]) / 2
    numbers = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    x = _tile_of_scale_one(np.concatenate([numbers, -numbers]))
    quantized = quantize_block(x, (1, 128), kind)
    _assert_equals_oracle(quantized, x, kind)
    assert_close(_round_trip(x, (1, 128), kind), quantized.dequantize(), EXACT, "round trip")
    assert np.all(_codes(quantized)[:1, 1:64] % 2 == 0)
    # From the fact sheet: half the smallest number is none, one and a half is the smallest.
    worked = quantize_block(_tile_of_scale_one([2**-10, 1.5 * 2**-9, 2**-9, 447]), (1, 128), kind)
    np.testing.assert_array_equal(_codes(worked)[0, 1:5], [0, 2, 1, 126])


def test_division_is_exact_where_a_reciprocal_is_not():
    """Ties of scales that are odd whole numbers: x * (1 / scale) misses hundreds of them."""
    ties = (oracle.VALUES[1:127] + oracle.VALUES[:126]) / 2
    scales = np.arange(3, 2048, 2, dtype=np.float64)[:, None]
    x = np.concatenate([448 * scales, ties * scales], axis=1).astype(np.float32)
    misses = oracle.encode(x * (np.float32(1) / scales.astype(np.float32))) != oracle.encode(
        x / scales.astype(np.float32)
    )
    assert misses.sum() > 100
    for block, array in [((1, 128), x), ((128, 1), x.T)]:
        quantized = quantize_block(array, block)
        np.testing.assert_array_equal(quantized.scales.reshape(-1), scales[:, 0])
        _assert_equals_oracle(quantized, array, "fp32")
        emulated = _round_trip(jnp.asarray(array), block, "fp32")
        assert_close(emulated, quantized.dequantize(), EXACT, "round trip")


def test_published_examples():
    tile = np.array([[1.0, 0.3, -0.07, 0.0019]], np.float32)
    fp32 = quantize_block(tile, (1, 128), "fp32")
    np.testing.assert_array_equal(fp32.values.astype(jnp.float32), [[448, 128, -32, 0.875]])
    np.testing.assert_allclose(fp32.scales, 0.002232143, rtol=1e-6)
    pow2 = quantize_block(tile, (1, 128), "pow2")
    np.testing.assert_array_equal(pow2.values.astype(jnp.float32), [[256, 80, -18, 0.5]])
    np.testing.assert_array_equal(pow2.dequantize(), [[1.0, 0.3125, -0.0703125, 0.001953125]])


@pytest.mark.parametrize(
    ("amax", "exponent"),
    [(1, -8), (448, 0), (449, 1), (896, 1), (np.nextafter(np.float32(448), 500), 1), (1e-4, -22)],
)
def test_power_of_two_scale_rounds_up(amax, exponent):
    scale = quantize_block(np.full((1, 4), amax, np.float32), (1, 128), "pow2").scales
    np.testing.assert_array_equal(scale, [[2.0**exponent]])


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_neither_overflow_nor_vanish(kind):
    largest = 1.7e38
    x = np.array([[largest, -largest, 1.0], [0.0, -0.0, 1e-45], [1e-4, -1e-4, 1e-7]], np.float32)
    quantized = quantize_block(x, (1, 128), kind)
    _assert_equals_oracle(quantized, x, kind)
    assert np.all(np.isfinite(quantized.dequantize()))
    assert_close(_round_trip(x, (1, 128), kind), quantized.dequantize(), EXACT, "round trip")
    assert quantized.scales[1, 0] > 0  # the floor: a block of zeros has a scale to divide by


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_input_becomes_nan_in_its_place_alone(bad, kind):
    clean = _random((128, 256))
    clean[3, 7] = 0.0
    x = clean.copy()
    x[3, 7] = bad
    for block in BLOCKS:
        quantized, without = quantize_block(x, block, kind), quantize_block(clean, block, kind)
        _assert_equals_oracle(quantized, x, kind)
        want = np.array(without.dequantize())
        want[3, 7] = np.nan
        np.testing.assert_array_equal(quantized.dequantize(), want)
        np.testing.assert_array_equal(_round_trip(x, block, kind), want)


def test_block_of_nothing_finite_has_the_floor_as_scale():
    quantized = quantize_block(np.full((1, 128), np.nan, np.float32), (1, 128))
    np.testing.assert_array_equal(quantized.scales, np.float32(1e-4) / np.float32(448))


def test_bfloat16_input_quantises_as_its_float32_value():
    x = jnp.asarray(_random((130, 200)), jnp.bfloat16)
    quantized = quantize_block(x)
    _assert_equals_oracle(quantized, np.asarray(x, np.float32), "fp32")
    assert quantized.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


def test_block_scaled_is_a_pytree_with_a_static_block():
    x = _random((4, 256, 192))
    quantized = jax.jit(lambda x: quantize_block(x, (128, 128)))(x)
    assert [leaf.dtype for leaf in jax.tree.leaves(quantized)] == [fp8.E4M3, jnp.float32]
    assert jax.tree.map(lambda leaf: leaf, quantized).block == (128, 128)
    assert quantized.values.shape == x.shape and quantized.scales.shape == (4, 2, 2)
    turned = quantized.mT
    assert turned.block == (128, 128) and quantize_block(x, (1, 128)).mT.block == (128, 1)
    assert_close(turned.dequantize(), quantized.dequantize().mT, EXACT, "dimensions exchanged")
    # A stack of layers quantises as its layers do, and scan takes it apart.
    _, layers = jax.lax.scan(lambda _, layer: (None, layer.dequantize()), None, quantized)
    assert_close(layers[2], quantize_block(x[2]).dequantize(), EXACT, "third layer")


def test_sharded_array_quantises_as_a_whole_one_does_and_is_stored_so(tmp_path):
    """Over eight devices, and through a checkpoint back onto them."""
    x = _random((256, 512))
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("data", "tensor"))
    sharded = jax.device_put(x, sharding)
    quantize = jax.jit(
        lambda x: {
            f"{rows} x {columns}": quantize_block(x, (rows, columns)) for rows, columns in BLOCKS
        },
        out_shardings=sharding,
    )
    quantized = quantize(sharded)
    for got in quantized.values():
        assert got.values.sharding == got.scales.sharding == sharding
        _assert_equals_oracle(got, x, "fp32")
    checkpoints = store.Store(tmp_path, keep=1)
    checkpoints.save(1, quantized, {"step": 1})
    checkpoints.close()
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), quantized
    )
    restored = store.restore(tmp_path, 1, abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(quantized)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(quantized), strict=True):
        assert got.sharding == want.sharding
        assert_close(got, want, EXACT, "what came back")


def test_dequantized_weight_is_rounded_once():
    quantized = quantize_block(_random((576, 300)))
    want = oracle.dequantize(_codes(quantized), np.asarray(quantized.scales), (128, 128))
    rounded = quantized.dequantize(jnp.bfloat16)
    assert_close(rounded, want.astype(jnp.bfloat16), EXACT, "bfloat16 weight")


def test_quantize_rejects_what_it_cannot_tile():
    with pytest.raises(ValueError, match=r"two or more dimensions, not float32 of shape \(128,\)"):
        quantize_block(np.zeros(128, np.float32))
    with pytest.raises(ValueError, match=r"floating arrays.*not int32"):
        quantize_block(np.zeros((2, 2), np.int32))
    for block in (128, (128,), (1, 2, 3), (1.5, 2)):
        with pytest.raises(ValueError, match=r"is not two positive sizes; the report's is"):
            quantize_block(np.zeros((2, 2), np.float32), block)  # pyright: ignore
    sizes = np.array([1, 2]).tolist()
    assert quantize_block(np.zeros((2, 2), np.float32), sizes).block == (1, 2)
    with pytest.raises(ValueError, match=r"block=\(0, 128\) is not two positive sizes"):
        quantize_block(np.zeros((2, 2), np.float32), (0, 128))
    with pytest.raises(ValueError, match="scale='e8m0' is not a kind of scale; use 'fp32' or"):
        quantize_block(np.zeros((2, 2), np.float32), scale="e8m0")  # pyright: ignore
