"""The TPU's kernel for chosen blocks: under JAX's interpreter, and as its compiler takes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from dsjax.kernels.block_kernel import kernel_attention, takes
from dsjax.kernels.target import Target
from dsjax.parallel.mesh import make_mesh
from dsjax.plan import topology
from tests.closeness import F32, assert_close

SIZE = 16


def test_a_query_attends_to_its_blocks_of_its_layer_up_to_its_place():
    rng = np.random.default_rng(0)
    shapes = (2, 3, 2, 2, 6), (3, 2, 2, 64, 6), (3, 2, 2, 64, 5)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    table = np.array([[0, 2, -1], [3, 1, 0], [-1, -1, -1]], np.int32)
    table = np.broadcast_to(table[None, :, None], (2, 3, 2, 3)).copy()
    table[1, :, 1] = [[1, -1, -1], [0, 1, 2], [2, 0, -1]]
    places = np.array([[40, 63, 63], [20, 33, 40]], np.int32)
    with pltpu.force_tpu_interpret_mode():
        run = jax.jit(functools.partial(kernel_attention, size=SIZE, scale=0.4))
        got = run(*map(jnp.asarray, (q, k, v)), jnp.int32(1), table, places)
    want = np.zeros((2, 3, 2, 2, 5))
    for b, t, p in np.ndindex(2, 3, 2):
        blocks = [block for block in table[b, t, p] if block >= 0]
        keys = [s for s in range(64) if s // SIZE in blocks and s <= places[b, t]]
        if keys:
            weights = np.exp(q[b, t, p] @ k[1, b, p, keys].T * 0.4)
            want[b, t, p] = weights / weights.sum(axis=1, keepdims=True) @ v[1, b, p, keys]
    assert_close(got, want, F32, "attention")


def test_where_the_compiler_splits_a_mesh_or_blocks_do_not_divide_there_is_no_kernel():
    tpu = Target("tpu", (5,))
    assert takes(tpu, 64, 8192) and takes(tpu, 16, 48)
    assert not takes(Target("cpu"), 64, 8192)
    assert not takes(tpu, 8, 8192) and not takes(tpu, 64, 8200)
    with jax.set_mesh(make_mesh({"data": 2}, n_devices=2)):
        assert not takes(tpu, 64, 8192)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_tpus_compiler_takes_it_and_gathers_nothing(name, monkeypatch):
    """A layer of NSA's paper, its keys row after row: left to the compiler, positions would be
    their last dimension, as 192 channels do not fill its tiles. Needs the extra `plan`.
    """
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    sharding = SingleDeviceSharding(topology.devices(topology.parse(name))[0])
    by_rows = Format(Layout((0, 1, 2, 3, 4)), sharding)
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    heads, grouped, size, chosen, length, queries = 4, 16, 64, 16, 65536, 32
    arguments = (
        array((1, queries, heads, grouped, 192), jnp.bfloat16),
        array((1, 1, heads, length, 192), jnp.bfloat16, sharding=by_rows),
        array((1, 1, heads, length, 128), jnp.bfloat16),
        array((), jnp.int32),
        array((1, queries, heads, chosen), jnp.int32),
        array((1, queries), jnp.int32),
    )
    run = jax.jit(functools.partial(kernel_attention, size=size, scale=0.1))
    with jax.default_matmul_precision(None):
        lowered = run.trace(*arguments).lower(lowering_platforms=("tpu",))
        memory = lowered.compile().memory_analysis()
    gathered = 2 * queries * heads * chosen * size * (192 + 128)
    assert memory.temp_size_in_bytes < gathered / 2
