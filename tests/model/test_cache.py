"""What a cache holds, and that adding to it or replacing its rows touches nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsjax.kernels.target import Target
from dsjax.model.cache import empty_cache, entry_axes
from dsjax.model.flops import cache_bytes_per_token
from dsjax.model.transformer import Transformer
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import partition_spec
from dsjax.precision.policy import Policy
from tests.closeness import F32, assert_close
from tests.model.tiny import TINY, tiny_model, tokens

GQA = dataclasses.replace(TINY, attention="gqa", n_kv_heads=2, head_dim=8)


NSA = dataclasses.replace(GQA, attention="nsa", nsa_length=16, nsa_stride=8, nsa_block=16)


@pytest.mark.parametrize("config", [TINY, GQA, NSA], ids=["mla", "gqa", "nsa"])
def test_cache_takes_the_bytes_that_flops_counts(config):
    cache = jax.eval_shape(lambda: empty_cache(config, 3, 256, jnp.bfloat16))
    assert cache.mtp is None
    bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert bytes_ == 3 * 256 * cache_bytes_per_token(config)


def test_a_cache_is_longer_by_what_its_parts_need_to_be_equal():
    with jax.set_mesh(make_mesh({"context": 3}, n_devices=3)):
        cache = jax.eval_shape(lambda: empty_cache(TINY, 1, 256, jnp.float32))
    assert {leaf.shape[3] for leaf in jax.tree.leaves(cache)} == {258}


def test_mla_keeps_one_latent_and_one_rotated_key_a_token():
    cache = jax.eval_shape(lambda: empty_cache(TINY, 3, 256, jnp.float32, mtp=True))
    shapes = [{name: entry.shape for name, entry in entries.items()} for entries in cache]
    assert shapes == [
        {"latent": (L, 3, 1, 256, 8), "rope_key": (L, 3, 1, 256, 4)} for L in (1, 2, 2)
    ]


@pytest.mark.parametrize("config", [TINY, GQA, NSA], ids=["mla", "gqa", "nsa"])
def test_decoding_changes_the_donated_cache_in_place(config):
    """Besides the cache itself, a step holds no more than a layer of it."""
    config = dataclasses.replace(config, n_layers=17, n_mtp=0)
    model = Transformer(config, Policy(jnp.float32, Target("cpu")))
    cache = jax.eval_shape(lambda: empty_cache(config, 2, 8192, jnp.float32))
    numbers = jax.ShapeDtypeStruct((2,), jnp.int32)

    def step(model, tokens_B, starts_B, cache):
        return model.extend(tokens_B[:, None], starts_B, cache).cache

    program = jax.jit(step, donate_argnums=3).lower(model, numbers, numbers, cache).compile()
    memory, bytes_ = program.memory_analysis(), sum(4 * x.size for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == bytes_
    assert memory.temp_size_in_bytes < bytes_ / 4


@pytest.mark.parametrize(
    ("config", "spec"),
    [(TINY, (None, "data", None, "context")), (GQA, (None, "data", "tensor", "context"))],
    ids=["mla", "gqa"],
)
def test_pinned_cache_is_split_over_rows_key_heads_and_positions(config, spec):
    mesh = make_mesh({"data": 2, "context": 2, "tensor": 2}, n_devices=8)
    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: empty_cache(config, 4, 256, jnp.float32).pinned())()
    for leaf in jax.tree.leaves(cache):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), leaf.ndim)


@pytest.mark.parametrize("config", [TINY, GQA], ids=["mla", "gqa"])
def test_inserted_rows_decode_as_they_would_alone(config):
    """A running batch of three rows; new prompts with a shorter cache replace the last and the
    first.
    """
    model = tiny_model(config)

    @jax.jit
    def extend(model, tokens_BT, starts_B, cache):
        extended = model.extend(tokens_BT, starts_B, cache)
        return model.logits(extended.main_BTD), extended.cache

    def begun(batch, length, seed):
        cache = empty_cache(config, batch, length, jnp.float32, mtp=True)
        return extend(model, tokens(batch, 16, seed), jnp.zeros(batch, jnp.int32), cache)[1]

    running, new = begun(3, 64, 0), begun(2, 32, 1)
    inserted = running.insert(jnp.asarray([2, 0], jnp.int32), new, jnp.arange(2, dtype=jnp.int32))
    row, at = tokens(3, 4, 2), jnp.full(3, 16, jnp.int32)
    got, _ = extend(model, row, at, inserted)
    old, _ = extend(model, row, at, running)
    alone, _ = extend(model, row[jnp.asarray([2, 0])], at[:2], new)
    np.testing.assert_array_equal(got[1], old[1])
    assert_close(got[jnp.asarray([2, 0])], alone, F32, "logits of new rows")


def test_a_row_outside_is_not_inserted():
    mine, other = (
        jax.tree.map(lambda x, value=value: x + value, empty_cache(TINY, n, 32, jnp.float32))
        for n, value in ((3, 1.0), (2, 2.0))
    )
    got = mine.insert(jnp.asarray([3, 1], jnp.int32), other, jnp.arange(2, dtype=jnp.int32))
    for entry in jax.tree.leaves(got):
        assert [float(entry[:, row].mean()) for row in range(3)] == [1, 2, 1]


@pytest.mark.parametrize("n_devices", [1, 4])
def test_insertion_changes_the_donated_cache_in_place(n_devices):
    """Besides the cache it holds no more than the rows that it brings; rows over devices too."""
    mesh = make_mesh({"data": n_devices}, n_devices=n_devices)
    big, small = (
        jax.eval_shape(lambda b=batch, s=length: empty_cache(TINY, b, s, jnp.float32))
        for batch, length in ((16, 8192), (1, 1024))
    )

    def insert(mine, rows_X, other):
        return mine.pinned().insert(rows_X, other, jnp.zeros_like(rows_X)).pinned()

    with jax.set_mesh(mesh):
        place = lambda x, axes: jax.ShapeDtypeStruct(  # noqa: E731
            x.shape, x.dtype, sharding=NamedSharding(mesh, partition_spec(axes, x.shape, mesh, ""))
        )
        big = jax.tree.map(lambda x: place(x, entry_axes(x.shape, mesh)), big)
        rows = jax.ShapeDtypeStruct((1,), jnp.int32)
        program = jax.jit(insert, donate_argnums=0).lower(big, rows, small).compile()
    memory, bytes_ = program.memory_analysis(), sum(4 * x.size for x in jax.tree.leaves(big))
    assert memory.alias_size_in_bytes == bytes_ // n_devices
    assert memory.temp_size_in_bytes < bytes_ / n_devices / 8


def test_entries_of_separate_layers_are_those_of_a_stack():
    """The form in which pages go to disk and to other devices."""
    config = dataclasses.replace(TINY, n_mtp=0)
    apart, whole = (
        empty_cache(config, 2, 8, jnp.float32, separate=separate) for separate in (True, False)
    )
    leaves, structure = jax.tree.flatten(apart)
    apart = structure.unflatten([leaf + n for n, leaf in enumerate(leaves)])
    stacked = apart.stacked()
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, whole)
    marks = {float(layer.max()) for stack in jax.tree.leaves(stacked) for layer in stack}
    assert len(marks) == len(leaves)
    jax.tree.map(np.testing.assert_array_equal, stacked.as_in(apart), apart)
    jax.tree.map(np.testing.assert_array_equal, stacked.as_in(whole), stacked)
