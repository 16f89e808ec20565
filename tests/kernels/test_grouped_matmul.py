"""Every backend of the grouped product against its one-matrix-a-row definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from dsjax.kernels import grouped_matmul as kernel
from dsjax.kernels.target import Target
from tests.closeness import BF16, F32, assert_close
from tests.oracles.kernels import reference_matmul, reference_outer

grouped_matmul = jax.jit(kernel.grouped_matmul, static_argnames=("target", "dtype"))
grouped_outer = jax.jit(kernel.grouped_outer, static_argnames="target")
align_groups = jax.jit(kernel.align_groups, static_argnums=2)


def _operands(sizes, dim=24, width=40, dtype=jnp.float32):
    rng = np.random.default_rng(len(sizes))
    rows = int(sum(sizes))
    x_AD = jnp.asarray(rng.normal(size=(rows, dim)), dtype)
    w_EDF = jnp.asarray(rng.normal(size=(len(sizes), dim, width)), dtype)
    y_AF = jnp.asarray(rng.normal(size=(rows, width)), dtype)
    return x_AD, w_EDF, y_AF, jnp.asarray(sizes, jnp.int32)


# Groups that end inside a block, empty ones at either end and in the middle, all rows in one group;
# a last one much smaller than the others, after whose rows its block would end.
SIZES = [[5, 70, 33, 20], [0, 0, 128, 0], [64, 0, 1, 0, 63], [0, 3, 0], [600, 20]]


@pytest.mark.parametrize("target", [Target("cpu"), Target("gpu")], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_matmul_equals_definition(target, sizes):
    x_AD, w_EDF, y_AF, sizes_E = _operands(sizes)
    got = grouped_matmul(x_AD, w_EDF, sizes_E, target)
    assert_close(got, reference_matmul(x_AD, w_EDF, sizes_E), F32, "product")
    got = grouped_outer(x_AD, y_AF, sizes_E, target)
    assert_close(got, reference_outer(x_AD, y_AF, sizes_E), F32, "outer product")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=3, max_size=3))
def test_blocked_matmul_equals_definition_for_any_sizes(cuts):
    x_AD, w_EDF, y_AF, sizes_E = _operands(np.diff([0, *sorted(cuts), 90]))
    assert_close(
        grouped_matmul(x_AD, w_EDF, sizes_E, Target("cpu")),
        reference_matmul(x_AD, w_EDF, sizes_E),
        F32,
        "product",
    )
    assert_close(
        grouped_outer(x_AD, y_AF, sizes_E, Target("cpu")),
        reference_outer(x_AD, y_AF, sizes_E),
        F32,
        "outer product",
    )


def test_megablox_equals_definition_under_the_interpreter():
    x_AD, w_EDF, y_AF, sizes_E = _operands([130, 0, 200, 54], dim=128, width=128)
    with pltpu.force_tpu_interpret_mode():
        product = grouped_matmul(x_AD, w_EDF, sizes_E, Target("tpu"))
        outer = grouped_outer(x_AD, y_AF, sizes_E, Target("tpu"))
    assert_close(product, reference_matmul(x_AD, w_EDF, sizes_E), F32, "product")
    assert_close(outer, reference_outer(x_AD, y_AF, sizes_E), F32, "outer product")


@pytest.mark.parametrize("target", [Target("cpu"), Target("gpu"), Target("tpu")], ids=str)
@pytest.mark.parametrize("first", [0, 3, 7])
def test_groups_find_their_matrices_among_those_of_all_layers(target, first):
    x_AD, w_EDF, _, sizes_E = _operands([130, 0, 200, 54], dim=128, width=128)
    others = jnp.asarray(np.random.default_rng(9).normal(size=(7, *w_EDF.shape[1:])), jnp.float32)
    stack = jnp.concatenate([others[:first], w_EDF, others[first:]])
    with pltpu.force_tpu_interpret_mode():
        got = grouped_matmul(x_AD, stack, sizes_E, target, first=jnp.int32(first))
    assert_close(got, reference_matmul(x_AD, w_EDF, sizes_E), F32, "product")


def test_bfloat16_rows_accumulate_in_float32():
    x_AD, w_EDF, y_AF, sizes_E = _operands([700, 900], dtype=jnp.bfloat16)
    exact = [jnp.asarray(a, jnp.float32) for a in (x_AD, w_EDF, y_AF)]
    outer = grouped_outer(x_AD, y_AF, sizes_E, Target("cpu"))
    assert outer.dtype == jnp.float32
    assert_close(outer, reference_outer(exact[0], exact[2], sizes_E), F32, "outer product")
    product = grouped_matmul(x_AD, w_EDF, sizes_E, Target("cpu"))
    assert product.dtype == jnp.bfloat16
    assert_close(product, reference_matmul(exact[0], exact[1], sizes_E), BF16, "product")


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_aligned_groups_keep_their_rows_and_share_no_tile(sizes):
    x_AD, _, y_AF, sizes_E = _operands(sizes)
    (x_aligned, y_aligned), aligned_E = align_groups((x_AD, y_AF), sizes_E, 16)
    assert np.all(aligned_E % 16 == 0) and np.all(aligned_E - sizes_E < 16)
    starts = np.cumsum(sizes) - sizes
    aligned_starts = np.cumsum(aligned_E) - aligned_E
    want = np.zeros(x_aligned.shape, np.float32)
    for start, aligned, size in zip(starts, aligned_starts, sizes, strict=True):
        want[aligned : aligned + size] = x_AD[start : start + size]
    np.testing.assert_array_equal(x_aligned, want)
    np.testing.assert_array_equal(x_aligned[kernel.aligned_rows(len(x_AD), sizes_E, 16)], x_AD)
    for target in (Target("cpu"), Target("gpu")):
        got = grouped_outer(x_aligned, y_aligned, aligned_E, target)
        assert_close(got, reference_outer(x_AD, y_AF, sizes_E), F32, "outer product")
    with pltpu.force_tpu_interpret_mode():
        got = grouped_outer(x_aligned, y_aligned, aligned_E, Target("tpu"))
    assert_close(got, reference_outer(x_AD, y_AF, sizes_E), F32, "outer product")


@pytest.mark.parametrize("target", [Target("cpu"), Target("gpu")], ids=str)
def test_grouped_matmul_returns_the_dtype_asked_for(target):
    x_AD, w_EDF, _, sizes_E = _operands(SIZES[0], dtype=jnp.bfloat16)
    got = grouped_matmul(x_AD, w_EDF, sizes_E, target, dtype=jnp.float32)
    assert got.dtype == jnp.float32
    exact = [jnp.asarray(a, jnp.float32) for a in (x_AD, w_EDF)]
    assert_close(got, reference_matmul(*exact, sizes_E), F32, "product")
