"""The grouped products of Hopper GPUs: under JAX's interpreter, and as they are on such a GPU.

On a GPU: JAX_PLATFORMS=cuda python -m pytest -m "gpu or not gpu" tests/kernels
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsjax.kernels import hopper_grouped as hopper
from dsjax.kernels.target import Target
from tests.closeness import BF16, F32, assert_close
from tests.oracles.kernels import reference_matmul, reference_outer

# Groups that end inside a tile and inside 8 rows, empty ones at either end and in the middle, one
# of several tiles, rows that are nobody's.
SIZES = [[0, 130, 3, 0, 91, 0], [5, 0, 259], [64, 72]]
ROWS_LEFT = 40

tiles = jax.jit(hopper.Tiles.of, static_argnums=1)


@pytest.fixture
def kernels():
    if Target.here().is_hopper:
        return contextlib.nullcontext()
    if jax.__version_info__ < (0, 11):
        pytest.skip("jax 0.10 has no complete interpreter of GPU kernels")
    return plgpu.force_gpu_interpret_mode()


def matmul(*operands, **options):
    return hopper.matmul(*operands, multiprocessors=_multiprocessors(), **options)


def outer(*operands):
    return hopper.outer(*operands, multiprocessors=_multiprocessors())


def _multiprocessors():
    # Interpreted, one program walks over all tiles, so buffers are used again.
    target = Target.here()
    return target.multiprocessors if target.is_hopper else 1


def _operands(sizes, dtype=jnp.bfloat16, dim=320, width=192):
    rng = np.random.default_rng(len(sizes))
    rows = sum(sizes) + ROWS_LEFT
    shapes = (rows, dim), (len(sizes), dim, width), (rows, width)
    x, w, y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return x, w, y, jnp.asarray(sizes, jnp.int32)


def _float32(*arrays):
    return [array.astype(jnp.float32) for array in arrays]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matmul_equals_definition_and_leaves_no_row_unwritten(sizes, kernels):
    x, w, _, sizes_E = _operands(sizes)
    with kernels:
        got = matmul(x, w, sizes_E, jnp.float32)
    x, w = _float32(x[:-ROWS_LEFT], w)
    assert_close(got[:-ROWS_LEFT], reference_matmul(x, w, sizes_E), F32, "product")
    assert not got[-ROWS_LEFT:].any()


def test_transposed_matmul_equals_definition(kernels):
    _, w, y, sizes_E = _operands(SIZES[0])
    with kernels:
        got = matmul(y, w, sizes_E, jnp.float32, transpose_w=True)
    y, w = _float32(y[:-ROWS_LEFT], w.mT)
    assert_close(got[:-ROWS_LEFT], reference_matmul(y, w, sizes_E), F32, "product")


def test_matmul_reads_its_groups_matrices_from_among_others(kernels):
    x, w, _, sizes_E = _operands(SIZES[0])
    others = jnp.full((4, *w.shape[1:]), jnp.nan, w.dtype)
    with kernels:
        got = matmul(
            x, jnp.concatenate([others, w, others]), sizes_E, jnp.float32, first_group=jnp.int32(4)
        )
        assert (got == matmul(x, w, sizes_E, jnp.float32)).all()


@pytest.mark.parametrize("sizes", SIZES[:2], ids=str)
def test_outer_equals_definition(sizes, kernels):
    x, _, y, sizes_E = _operands(sizes)
    with kernels:
        got = outer(x, y, sizes_E)
    assert got.dtype == jnp.float32
    x, y = _float32(x[:-ROWS_LEFT], y[:-ROWS_LEFT])
    assert_close(got, reference_outer(x, y, sizes_E), F32, "outer product")


def test_results_of_two_bytes_are_rounded_once(kernels):
    x, w, _, sizes_E = _operands([70, 66], jnp.float16, dim=64, width=256)
    with kernels:
        got = matmul(x, w, sizes_E, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    x, w = _float32(x[:-ROWS_LEFT], w)
    assert_close(got[:-ROWS_LEFT], reference_matmul(x, w, sizes_E), BF16, "product")


def test_operands_that_do_not_fit():
    x, w, y, _ = _operands([8])
    assert hopper.fits(x, w) and hopper.fits(x, y)
    assert not hopper.fits(*_float32(x, w))
    assert not hopper.fits(x, w.astype(jnp.float16))
    assert not hopper.fits(x[:, :72], w[:, :72])
    assert not hopper.fits(x, y[:, :100])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=12, max_size=12))
def test_tiles_write_each_row_once_and_for_its_own_group(cuts):
    sizes = np.diff([0, *sorted(cuts)])
    group_of_row = np.repeat(np.arange(13), [*sizes, 1000 - sizes.sum()])
    written = np.zeros(1000, int)
    for group, start, first, end in zip(
        *map(np.asarray, tiles(jnp.asarray(sizes, jnp.int32), 1000)), strict=True
    ):
        assert start % 8 == 0 or first == end
        written[start + first : start + end] += 1
        assert (group_of_row[start + first : start + end] == group).all()
    assert (written == 1).all()


@pytest.mark.gpu
def test_any_sizes_on_the_gpu():
    """What an interpreter cannot show: copies and products that overlap in time."""
    if not Target.here().is_hopper:
        pytest.skip("needs a Hopper GPU")
    rows, n_groups, dim, width = 8192, 24, 512, 512
    rng = np.random.default_rng(0)
    shapes = (rows, dim), (n_groups, dim, width), (rows, width)
    x, w, y = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)

    def products(x, w, y, sizes_E):
        return (
            matmul(x, w, sizes_E, jnp.float32),
            matmul(y, w, sizes_E, jnp.float32, transpose_w=True),
            outer(x, y, sizes_E),
        )

    def definitions(x, w, y, sizes_E):
        ends_E = jnp.cumsum(sizes_E)

        def add(sums, group):
            row = jnp.arange(rows, dtype=jnp.int32)
            mine = (row >= ends_E[group] - sizes_E[group]) & (row < ends_E[group])
            x_here, y_here = (jnp.where(mine[:, None], a, jnp.zeros_like(a)) for a in (x, y))
            matmul = lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32)  # noqa: E731
            product, back = sums
            sums = product + matmul(x_here, w[group]), back + matmul(y_here, w[group].mT)
            return sums, matmul(x_here.mT, y_here)

        start = jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows, dim), jnp.float32)
        (product, back), outer = jax.lax.scan(add, start, jnp.arange(n_groups, dtype=jnp.int32))
        return product, back, outer

    @jax.jit
    def errors(sizes_E):
        got, want = products(x, w, y, sizes_E), definitions(x, w, y, sizes_E)
        norm = jnp.linalg.norm
        return [norm(g - h) / jnp.maximum(norm(h), 1e-30) for g, h in zip(got, want, strict=True)]

    for case in range(1000):
        rng = np.random.default_rng(case)
        sizes = rng.dirichlet(np.full(n_groups, rng.choice([0.05, 0.3, 1, 5])))
        sizes = np.floor(sizes * rng.choice([0.01, 0.5, 1]) * rows).astype(np.int32)
        sizes[rng.integers(n_groups, size=3)] = 0
        worst = max(map(float, errors(jnp.asarray(sizes))))
        assert worst < F32.bound, f"case {case}: {worst}"
