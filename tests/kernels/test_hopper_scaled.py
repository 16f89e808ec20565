"""The block-scaled E4M3 products of Hopper GPUs against their definition.

On a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels/test_hopper_scaled.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import hopper_scaled as hopper
from dsjax.kernels.fp8_gemm import scaled_grouped_matmul, scaled_grouped_outer, scaled_matmul
from dsjax.kernels.grouped_matmul import align_groups
from dsjax.kernels.varying import shipped_promotion
from dsjax.precision.fp8 import CHANNEL_TILE, TOKEN_TILE, WEIGHT_BLOCK, quantize_block
from tests.closeness import BF16, F32, assert_close
from tests.kernels.hopper import INTERPRETED

# Groups that end inside a tile, of no rows at either end and in the middle, of more than one tile,
# and of whole ones.
SIZES = [[0, 130, 3, 0], [5, 0, 259], [128, 256]]
K, N = 300, 150  # neither whole slices nor whole tiles


def run(kernel, *operands):
    with shipped_promotion():
        return functools.partial(kernel, interpret=INTERPRETED)(*operands)


def rows_of(seed, rows, width):
    """Rows of very different sizes, so that a wrong scale shows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) * np.exp2(rng.uniform(-6, 6, (rows, 1)))
    return jnp.asarray(x, jnp.float32)


def weights_of(groups):
    rng = np.random.default_rng(groups)
    w = rng.normal(size=(groups, K, N)) * np.exp2(rng.uniform(-6, 6, (groups, K, 1)))
    return quantize_block(jnp.asarray(w, jnp.float32), WEIGHT_BLOCK)


def columns_of(w):
    """The operand as the kernels take it: columns as rows, a scale for each."""
    scales = jnp.repeat(w.scales, WEIGHT_BLOCK[1], axis=-1)[..., : w.shape[-1]]
    return w.values.mT, scales.mT


def by_rows(got, want):
    """Scaled to the same size, so that small rows count as much as large ones."""
    size = np.maximum(np.abs(np.asarray(want, np.float64)).max(axis=-1, keepdims=True), 1e-30)
    return np.asarray(got, np.float64) / size, np.asarray(want, np.float64) / size


@pytest.mark.parametrize("rows", [1, 200, 256])
@pytest.mark.parametrize(("dtype", "level"), [(jnp.float32, F32), (jnp.bfloat16, BF16)])
def test_matmul_equals_definition(rows, dtype, level):
    x, w = quantize_block(rows_of(0, rows, K), CHANNEL_TILE), weights_of(1)[0]
    columns, scales = columns_of(w)
    got = run(hopper.matmul, x.values, x.scales, columns, scales, dtype)
    assert got.dtype == dtype
    want = scaled_matmul(x.values, x.scales, w.values, scales.mT)
    assert_close(*by_rows(got, want), level, "product")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_matmul_equals_definition(sizes):
    x, w = quantize_block(rows_of(1, sum(sizes), K), CHANNEL_TILE), weights_of(len(sizes))
    sizes_E = jnp.asarray(sizes, jnp.int32)
    got = run(hopper.grouped_matmul, x.values, x.scales, *columns_of(w), sizes_E, jnp.float32)
    want = scaled_grouped_matmul(x.values, x.scales, w.values, w.scales, sizes_E)
    assert_close(*by_rows(got, want), F32, "product")


def test_tiles_may_run_in_any_order(monkeypatch):
    """On a GPU they do; interpreted, a row that a tile must not write may be written again."""
    sizes_E = jnp.asarray(SIZES[0], jnp.int32)
    x, w = quantize_block(rows_of(1, sum(SIZES[0]), K), CHANNEL_TILE), weights_of(len(SIZES[0]))
    operands = x.values, x.scales, *columns_of(w), sizes_E, jnp.float32
    want = run(hopper.grouped_matmul, *operands)
    tiles = hopper.tiles_of_groups
    monkeypatch.setattr(
        hopper, "tiles_of_groups", lambda *sizes: tuple(each[::-1] for each in tiles(*sizes))
    )
    assert (run(hopper.grouped_matmul, *operands) == want).all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_outer_equals_definition(sizes):
    """Rows after the last group's are there, as `align_groups` leaves them."""
    x, dy = rows_of(2, sum(sizes), K), rows_of(3, sum(sizes), N)
    (x, dy), aligned_E = align_groups((x, dy), jnp.asarray(sizes, jnp.int32), TOKEN_TILE[0])
    x, dy = quantize_block(x, TOKEN_TILE), quantize_block(dy, TOKEN_TILE)
    operands = x.values, x.scales, dy.values, dy.scales
    got = run(hopper.grouped_outer, *(each.mT for each in operands), aligned_E)
    assert got.dtype == jnp.float32
    want = scaled_grouped_outer(*operands, aligned_E)
    for group, (own, defined) in enumerate(zip(got, want, strict=True)):
        if sizes[group]:
            assert_close(own, defined, F32, f"outer product of group {group}")
        else:
            assert not own.any()


def test_every_row_is_written_by_one_tile():
    rng = np.random.default_rng(0)
    tiles = jax.jit(hopper.tiles_of_groups, static_argnums=1)
    for _ in range(50):
        ends = np.sort(rng.choice([0, 1, 5, 127, 128, 129, 300, 512, 700], 4))
        sizes = np.diff(ends, prepend=0, append=700)
        written = np.full(700, -1)
        found = map(np.asarray, tiles(jnp.asarray(sizes, jnp.int32), 700))
        for group, start, end in zip(*found, strict=True):
            own = np.arange(start, max(start, min(start + 128, end)))
            assert (written[own] == -1).all()
            written[own] = group
        assert (written == np.repeat(np.arange(5), sizes)).all()
