"""Quantising by Hopper's kernels against its definition, to the bit.

On a GPU: JAX_PLATFORMS=cuda,cpu python -m pytest tests/precision/test_hopper_quantize.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.grouped_matmul import align_groups
from dsjax.kernels.varying import shipped_promotion
from dsjax.precision.fp8 import CHANNEL_TILE, TOKEN_TILE, WEIGHT_BLOCK, quantize_block
from dsjax.precision.hopper_quantize import quantize_rows, quantize_weights
from tests.kernels.hopper import INTERPRETED

BOTH = (CHANNEL_TILE, TOKEN_TILE)


def numbers(*shape, dtype=jnp.bfloat16):
    """Of very different sizes in every row and column; with zeros, and some that are not finite."""
    rng = np.random.default_rng(len(shape))
    x = rng.normal(size=shape) * np.exp2(rng.uniform(-9, 9, (*shape[:-1], 1)))
    x *= np.exp2(rng.uniform(-9, 9, (*shape[:-2], 1, shape[-1])))
    x[..., :2, :] = 0
    x[..., -1, 3], x[..., -2, 3], x[..., 5, -1] = np.nan, np.inf, -np.inf
    return jnp.asarray(x, dtype)


def run(kernel, *operands, **options):
    call = functools.partial(kernel, **options, interpret=INTERPRETED)
    with shipped_promotion():
        return jax.jit(call)(*operands)


def assert_same(got, want):
    assert got.block == want.block and got.dtype == want.dtype
    np.testing.assert_array_equal(got.scales, want.scales)
    got_bits, want_bits = (np.asarray(x.values).view(np.uint8) for x in (got, want))
    np.testing.assert_array_equal(got_bits, want_bits)


defined = jax.jit(quantize_block, static_argnums=(1, 2))


@pytest.mark.parametrize(
    ("shape", "scale"), [((9, 128), "fp32"), ((200, 300), "fp32"), ((200, 300), "pow2")], ids=str
)
def test_rows_are_quantised_as_defined(shape, scale):
    x = numbers(*shape)
    for blocks in (BOTH, BOTH[:1], BOTH[1:]):
        found = run(quantize_rows, x, blocks=blocks, scale=scale)
        for got, block in zip(found, blocks, strict=True):
            assert_same(got, defined(x, block, scale))


# Groups that end inside a tile, of no rows at either end and in the middle, of more than one tile,
# and of whole ones; and rows after the last group.
@pytest.mark.parametrize("sizes", [[0, 130, 3, 0], [5, 0, 259], [128, 256], [40, 7]], ids=str)
@pytest.mark.parametrize("left", [0, 150])
def test_token_tiles_are_of_one_group(sizes, left):
    x, sizes_E = numbers(sum(sizes) + left, 150), jnp.asarray(sizes, jnp.int32)
    channels, tokens = run(quantize_rows, x, sizes_E, blocks=BOTH, scale="fp32")
    assert_same(channels, defined(x, CHANNEL_TILE, "fp32"))
    (aligned,), _ = align_groups((x,), sizes_E, TOKEN_TILE[0])
    assert_same(tokens, defined(aligned, TOKEN_TILE, "fp32"))


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
@pytest.mark.parametrize("turned", [False, True])
def test_weights_are_quantised_as_defined(turned, scale):
    w = numbers(2, 300, 150, dtype=jnp.float32)
    assert_same(
        run(quantize_weights, w, turned=turned, scale=scale), defined(w, WEIGHT_BLOCK, scale)
    )
