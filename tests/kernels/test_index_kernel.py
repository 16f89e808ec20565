"""The TPU's kernel for index scores: under JAX's interpreter, and as its compiler takes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from dsjax.kernels import index_kernel
from dsjax.kernels.index_kernel import kernel_scores, takes
from dsjax.kernels.sparse_attention import Index, index_scores
from dsjax.kernels.target import Target
from dsjax.parallel.mesh import make_mesh
from dsjax.plan import topology
from tests.closeness import F32, assert_close

B, T, HEADS, WIDTH, S, BLOCK = 2, 11, 8, 16, 384, 128


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_scores_of_visible_keys_are_those_of_the_definition(monkeypatch):
    """Eleven queries in tiles of eight; the places of each tile say which blocks it meets."""
    monkeypatch.setattr(index_kernel, "_KEYS", BLOCK)
    index = Index(normal(0, B, T, HEADS, WIDTH), normal(1, B, T, HEADS), normal(2, B, S, WIDTH))
    places = np.array([3, 9, 5, 127, 0, 1, 2, 4, 300, 255, 100], np.int32)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(kernel_scores)(*index, places[None])
    met = np.repeat([BLOCK, S], [8, 3])[None, :, None] > np.arange(S)
    assert_close(got, np.where(met, index_scores(index), 0.0), F32, "scores")


def test_where_the_compiler_splits_a_mesh_or_blocks_do_not_divide_there_is_no_kernel():
    tpu = Target("tpu", (5,))
    assert takes(tpu, 64, 131072) and takes(tpu, 8, 384)
    assert not takes(Target("cpu"), 64, 1024)
    assert not takes(tpu, 5, 1024) and not takes(tpu, 64, 1000)
    with jax.set_mesh(make_mesh({"data": 2}, n_devices=2)):
        assert not takes(tpu, 64, 1024)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_tpus_compiler_takes_it_and_keeps_no_products(name, monkeypatch):
    """V3.2's index. Needs the extra `plan`."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    sharding = SingleDeviceSharding(topology.devices(topology.parse(name))[0])
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    queries, heads, width, keys = 64, 64, 128, 32768
    arguments = (
        array((1, queries, heads, width), jnp.bfloat16), array((1, queries, heads), jnp.float32),
        array((1, keys, width), jnp.bfloat16), array((1, queries), jnp.int32),
    )  # fmt: skip
    with jax.default_matmul_precision(None):
        lowered = jax.jit(kernel_scores).trace(*arguments).lower(lowering_platforms=("tpu",))
        memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * queries * keys * heads / 8
