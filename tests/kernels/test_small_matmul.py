"""The TPU's kernel for small weights: under JAX's interpreter, and as its compiler takes it."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from dsjax.kernels import small_matmul
from dsjax.kernels.small_matmul import fits, small_grouped_matmul, tile_rows
from dsjax.parallel.mesh import make_mesh
from dsjax.plan import topology
from tests.closeness import F32, assert_close

E, BLOCK = 4, 32
TYPES = [np.int8, ml_dtypes.int4, ml_dtypes.float8_e4m3fn]


def operands(rows, depth, width, dtype, seed=0):
    rng = np.random.default_rng(seed)
    low, high = (-8, 8) if dtype == ml_dtypes.int4 else (-127, 128)
    values = rng.integers(low, high, (E, depth, width)).astype(np.int8)
    if dtype == ml_dtypes.float8_e4m3fn:  # all of its numbers, the tiny ones too
        codes = rng.integers(0, 127, values.shape) + 128 * rng.integers(0, 2, values.shape)
        values = codes.astype(np.uint8).view(dtype)
    scales = rng.uniform(0.5, 2, (E, depth // BLOCK, width)).astype(ml_dtypes.bfloat16)
    x = rng.normal(size=(rows, depth)).astype(np.float32)
    wide = values.astype(np.float64) * np.repeat(scales.astype(np.float64), BLOCK, axis=1)
    return jnp.asarray(x), jnp.asarray(values.astype(dtype)), jnp.asarray(scales), wide


def product(x, values, scales, sizes):
    multiply = jax.jit(functools.partial(small_grouped_matmul, dtype=jnp.float32))
    with pltpu.force_tpu_interpret_mode():
        return multiply(x, values, scales, jnp.asarray(sizes, jnp.int32))


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize(
    ("sizes", "depth", "width"),
    [
        ([3, 0, 1, 20], 96, 40),  # a matrix is one block; an expert without rows
        ([0, 0, 0, 5], 64, 8),
        ([70, 1, 0, 200], 64, 24),  # more than one tile for a group
        ([2, 3, 0, 1], 1024, 1100),  # several blocks deep and wide, the last one part empty
    ],
    ids=str,
)
def test_each_groups_rows_are_multiplied_by_its_matrix(sizes, depth, width, dtype):
    x, values, scales, wide = operands(sum(sizes), depth, width, dtype)
    group = np.repeat(np.arange(E), sizes)
    want = np.einsum("ad,adf->af", np.asarray(x, np.float64), wide[group])
    assert_close(product(x, values, scales, sizes), want, F32)


def test_tiles_hold_about_the_rows_of_a_group():
    assert [tile_rows(rows, 8) for rows in (1, 128, 129, 1000, 9999)] == [16, 16, 32, 128, 256]


def test_a_product_that_the_compiler_splits_over_a_mesh_has_no_kernel():
    assert all(fits(depth, 32) for depth in (96, 7168, 1408)) and not fits(18432 + 32, 32)
    assert all(fits(depth, 128) for depth in (2048, 7168, 1408)) and not fits(4096 + 512, 128)
    inside = []
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    with jax.set_mesh(mesh):
        assert not fits(96, 32)
        by_hand = jax.shard_map(
            lambda x: inside.append(fits(96, 32)) or x, in_specs=P(), out_specs=P(), check_vma=False
        )
        jax.jit(by_hand)(jnp.ones(1))
    with jax.set_mesh(make_mesh({"data": 1}, n_devices=1)):
        inside.append(fits(96, 32))
    assert inside and all(inside)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("depth", [7168, 1408])
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_tpus_compiler_takes_it_and_widens_nothing_in_memory(name, depth, dtype, monkeypatch):
    """Experts of V3 and of V2-Lite while decoding. Needs the extra `plan`."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    sharding = SingleDeviceSharding(topology.devices(topology.parse(name))[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    n, width = 16, 2048
    e4m3 = dtype == ml_dtypes.float8_e4m3fn
    block, scale = (128, jnp.float32) if e4m3 else (BLOCK, jnp.bfloat16)
    arguments = (
        array((64, depth), jnp.bfloat16), array((n, depth, width), dtype),
        array((n, depth // block, width), scale), array((n,), jnp.int32),
    )  # fmt: skip
    with jax.default_matmul_precision(None):
        multiply = jax.jit(functools.partial(small_matmul.small_grouped_matmul, dtype=jnp.bfloat16))
        lowered = multiply.trace(*arguments).lower(lowering_platforms=("tpu",))
        memory = lowered.compile().memory_analysis()
    one_wide_matrix = 2 * depth * width
    assert memory.temp_size_in_bytes < one_wide_matrix / 2
    small = n * depth * width * (0.5 if dtype == ml_dtypes.int4 else 1)
    assert small < memory.argument_size_in_bytes < 1.2 * small
