"""Products of few rows in one kernel, interpreted, against a norm and products of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels.few_rows import Norm, few_row_products, few_row_swiglu, fits
from dsjax.kernels.target import HOPPER, Target
from dsjax.model.layers import rms_norm
from dsjax.precision.activations import limited, swiglu
from tests.closeness import BF16, F32, assert_close
from tests.golden.ours import QUICK
from tests.kernels.hopper import INTERPRETED

L, D = 3, 192
LEVELS = {jnp.float32: F32, jnp.bfloat16: BF16}
EPS = 0.5  # not small beside the mean square


@functools.partial(jax.jit, static_argnames="multiprocessors", compiler_options=QUICK)
def interpreted(x, matrices, layer, weight=None, residual=None, multiprocessors=132):
    return few_row_products(
        x,
        matrices,
        layer,
        norm=None if weight is None else Norm(weight, EPS),
        residual_MF=residual,
        multiprocessors=multiprocessors,
        interpret=INTERPRETED,
    )


def arrays(n_rows, widths, dtype, depth=D):
    rng = np.random.default_rng(n_rows)
    shapes = (n_rows, depth), (L, depth), *((L, depth, width) for width in widths)
    x, weight, *matrices = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return 3 * x, weight, matrices


def defined(x, matrices, layer, weight):
    """In float32."""
    x, weight, *matrices = (each.astype(jnp.float32) for each in (x, weight, *matrices))
    normed = rms_norm(x, weight[layer], EPS)
    return [np.asarray(normed) @ np.asarray(w[layer]) for w in matrices]


# Less than a matrix unit's rows, all of them, more.
@pytest.mark.parametrize("n_rows", [1, 16, 17])
@pytest.mark.parametrize("dtype", LEVELS, ids=lambda dtype: dtype.__name__)
def test_normed_rows_times_matrices_of_different_widths(n_rows, dtype):
    x, weight, matrices = arrays(n_rows, (48, 32, 16), dtype)
    got = interpreted(x, matrices, jnp.int32(1), weight)
    for own, want in zip(got, defined(x, matrices, 1, weight), strict=True):
        assert own.dtype == dtype
        assert_close(own, want, LEVELS[dtype], f"product {want.shape}")


# Blocks as deep as one sum, two and four; wide programs where narrow ones are too many.
@pytest.mark.parametrize(("depth", "multiprocessors"), [(64, 132), (128, 2), (256, 1)])
def test_product_with_the_residual(depth, multiprocessors):
    x, _, (w,) = arrays(3, (128,), jnp.float32, depth)
    residual = jnp.asarray(np.random.default_rng(1).normal(size=(3, 128)), jnp.float32)
    (got,) = interpreted(x, [w], jnp.int32(2), residual=residual, multiprocessors=multiprocessors)
    assert_close(got, np.asarray(residual) + np.asarray(x) @ np.asarray(w[2]), F32, "sum")


@pytest.mark.parametrize("dtype", LEVELS, ids=lambda dtype: dtype.__name__)
def test_normed_rows_times_two_matrices_in_swiglu(dtype):
    x, weight, (gate, up) = arrays(17, (48, 48), dtype)
    run = functools.partial(
        few_row_swiglu,
        norm=Norm(weight, EPS),
        swiglu=lambda gate, up: swiglu(*limited(gate, up, 9.0)),
        multiprocessors=132,
        interpret=INTERPRETED,
    )
    got = jax.jit(run, compiler_options=QUICK)(x, gate, up, jnp.int32(1))
    products = defined(x, (gate, up), 1, weight)
    assert np.abs(products).max() > 9  # some are limited
    assert got.dtype == dtype
    assert_close(got, swiglu(*limited(*products, 9.0)), LEVELS[dtype], "hidden")


def test_only_one_layer_is_read():
    x, weight, matrices = arrays(2, (32,), jnp.float32)
    spoilt = [each.at[jnp.asarray([0, 2])].set(jnp.nan) for each in (weight, *matrices)]
    (got,) = interpreted(x, spoilt[1:], jnp.int32(1), spoilt[0])
    assert np.isfinite(got).all()


def test_operands_that_fit():
    _, _, (w,) = arrays(1, (48,), jnp.bfloat16)
    assert fits(64, [w, w], jnp.bfloat16, HOPPER)
    assert not fits(65, [w], jnp.bfloat16, HOPPER)
    assert not fits(1, [w], jnp.bfloat16, Target("gpu", (8, 0)))
    assert not fits(1, [w, w[:, :, :40]], jnp.bfloat16, HOPPER)  # no whole blocks of columns
    assert not fits(1, [w[:, :96]], jnp.bfloat16, HOPPER)  # nor of depth
    assert not fits(1, [w, {"values": w}], jnp.bfloat16, HOPPER)  # small weights
    assert not fits(1, [w.astype(jnp.float32)], jnp.bfloat16, HOPPER)
    assert not fits(1, [w.astype(jnp.float32)], jnp.float32, HOPPER)
