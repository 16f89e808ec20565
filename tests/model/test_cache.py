"""What a cache holds, and that adding to it touches nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.kernels.target import Target
from dsjax.model.cache import LayerCache, empty_cache
from dsjax.model.flops import cache_bytes_per_token
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.precision.policy import Policy
from tests.model.tiny import TINY

GQA = dataclasses.replace(TINY, attention="gqa", n_kv_heads=2, head_dim=8)


@pytest.mark.parametrize("config", [TINY, GQA], ids=["mla", "gqa"])
def test_cache_takes_the_bytes_that_flops_counts(config):
    cache = jax.eval_shape(lambda: empty_cache(config, 3, 256, jnp.bfloat16))
    assert cache.mtp is None
    bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert bytes_ == 3 * 256 * cache_bytes_per_token(config)


def test_mla_keeps_one_latent_and_one_rotated_key_a_token():
    cache = jax.eval_shape(lambda: empty_cache(TINY, 3, 256, jnp.float32, mtp=True))
    shapes = [[entry.shape for entry in entries] for entries in cache if entries]
    assert shapes == [[(L, 3, 1, 256, 8), (L, 3, 1, 256, 4)] for L in (1, 2, 2)]


def test_append_writes_its_own_entries_and_no_others():
    L, B, P, S, T = 3, 2, 2, 16, 4
    rng = np.random.default_rng(0)
    stacks = [rng.normal(size=(L, B, P, S, X)).astype(np.float32) for X in (5, 3)]
    new = [rng.normal(size=(B, T, P, X)).astype(np.float32) for X in (5, 3)]
    starts_B = jnp.asarray([12, 3], jnp.int32)  # the first row's end with the cache

    @jax.jit
    def append(entries, layer):
        return LayerCache(entries, layer).append(starts_B, *new)

    got = append(tuple(map(jnp.asarray, stacks)), jnp.int32(1))
    want = [stack.copy() for stack in stacks]
    for stack, entry in zip(want, new, strict=True):
        stack[1, 0, :, 12:16] = entry[0].swapaxes(0, 1)
        stack[1, 1, :, 3:7] = entry[1].swapaxes(0, 1)
    for entry, expected in zip(got.entries, want, strict=True):
        np.testing.assert_array_equal(entry, expected)
    for entry, expected in zip(got.read(3, 9), want, strict=True):
        np.testing.assert_array_equal(entry, expected[1, :, :, 3:12])


@pytest.mark.parametrize("config", [TINY, GQA], ids=["mla", "gqa"])
def test_decoding_changes_the_donated_cache_in_place(config):
    """Besides the cache itself, a step holds no more than a layer of it."""
    config = dataclasses.replace(config, n_layers=17, n_mtp=0)
    model = Transformer(config, Policy(jnp.float32, Target("cpu")))
    cache = jax.eval_shape(lambda: empty_cache(config, 2, 8192, jnp.float32))
    numbers = jax.ShapeDtypeStruct((2,), jnp.int32)

    def step(model, tokens_B, starts_B, cache):
        return model.extend(tokens_B[:, None], starts_B, cache, absorbed=True).cache

    program = jax.jit(step, donate_argnums=3).lower(model, numbers, numbers, cache).compile()
    memory, bytes_ = program.memory_analysis(), sum(4 * x.size for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == bytes_
    assert memory.temp_size_in_bytes < bytes_ / 4


@pytest.mark.parametrize(
    ("config", "spec"),
    [(TINY, (None, "data", None)), (GQA, (None, "data", "tensor"))],
    ids=["mla", "gqa"],
)
def test_pinned_cache_is_split_over_rows_and_key_heads(config, spec):
    mesh = make_mesh({"data": 2, "tensor": 2}, n_devices=4)
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: empty_cache(config, 4, 256, jnp.float32).pinned())()
    for leaf in jax.tree.leaves(cache):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), leaf.ndim)
