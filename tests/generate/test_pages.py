"""Copies of cache entries between rows and pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dsjax.generate import decoding, pages
from dsjax.generate.decoding import Carry
from dsjax.model.cache import Cache, entry_axes
from dsjax.parallel import split_cache
from dsjax.parallel.mesh import make_mesh
from dsjax.parallel.sharding import partition_spec
from tests.model.tiny import TINY, tiny_model

N_PAGES, PAGE = 5, 16
OUTSIDE = 1 << 30


def numbered(tree):
    """The same arrays with all values different."""
    leaves, structure = jax.tree.flatten(tree)
    filled = [jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) for leaf in leaves]
    return jax.tree.unflatten(structure, filled)


def carry_and_pool():
    carry = decoding.empty_carry(tiny_model(), batch=3, length=64, n_drafts=2)
    pool = pages.empty_pool(tiny_model(), n_pages=N_PAGES, page=PAGE, n_drafts=2)
    assert carry.cache.mtp is not None and pool.mtp is not None
    return carry, pool


def numbers(*values):
    return jnp.asarray(values, jnp.int32)


def test_pages_that_end_inside_a_shared_entry_are_refused():
    grouped = {"attention": "nsa", "n_kv_heads": 2, "head_dim": 8, "n_mtp": 0}
    model = tiny_model(dataclasses.replace(TINY, **grouped))
    pages.empty_pool(model, n_pages=1, page=32, n_drafts=0)
    with pytest.raises(
        ValueError,
        match=r"page of 8 tokens, .* into entries of 16 tokens, .*nsa has them; make",
    ):
        pages.empty_pool(model, n_pages=1, page=8, n_drafts=0)


def test_pages_that_do_not_divide_over_the_mesh_are_refused():
    with (
        jax.set_mesh(make_mesh({"context": 3}, n_devices=3)),
        pytest.raises(
            ValueError, match=r"page of 16 tokens, .* over mesh\.context=3; choose a power"
        ),
    ):
        pages.empty_pool(tiny_model(), n_pages=1, page=16, n_drafts=0)


def test_pages_go_where_they_are_told_and_nowhere_else():
    carry, pool = carry_and_pool()
    pool = numbered(pool)
    filled = pages.fill(
        tiny_model(), carry, pool, jnp.int32(1), numbers(0, 2, OUTSIDE), numbers(4, 1, 3)
    )
    for row, page in zip(jax.tree.leaves(filled.cache), jax.tree.leaves(pool), strict=True):
        np.testing.assert_array_equal(row[:, 1, :, :PAGE], page[:, 4])
        np.testing.assert_array_equal(row[:, 1, :, 2 * PAGE : 3 * PAGE], page[:, 1])
        assert not np.any(row[:, 0]) and not np.any(row[:, 2])
        assert not np.any(row[:, 1, :, PAGE : 2 * PAGE]) and not np.any(row[:, 1, :, 3 * PAGE :])


def test_what_is_saved_comes_back():
    carry, pool = carry_and_pool()
    written = carry._replace(cache=numbered(carry.cache))
    pool = pages.save(
        tiny_model(), pool, written, jnp.int32(2), numbers(1, 3, 0), numbers(3, 0, OUTSIDE)
    )
    for page in jax.tree.leaves(pool):
        assert np.all(page[:, 0] != page[:, 3]) and not np.any(page[:, [1, 2, 4]])
    back = pages.fill(tiny_model(), carry, pool, jnp.int32(0), numbers(1, 3), numbers(3, 0))
    for got, want in zip(jax.tree.leaves(back.cache), jax.tree.leaves(written.cache), strict=True):
        for place in (1, 3):
            span = slice(place * PAGE, (place + 1) * PAGE)
            np.testing.assert_array_equal(got[:, 0, :, span], want[:, 2, :, span])


@pytest.mark.parametrize("n_devices", [1, 4])
def test_copies_change_the_donated_arrays_in_place(n_devices):
    """Besides these they hold a few pages, not all of them; rows and pages over devices too."""
    mesh = make_mesh({"data": n_devices}, n_devices=n_devices)

    def placed(cache: Cache) -> Cache:
        def place(leaf):
            spec = partition_spec(entry_axes(leaf.shape, mesh), leaf.shape, mesh, "")
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(place, cache)

    with jax.set_mesh(mesh):
        carry = jax.eval_shape(
            lambda: decoding.empty_carry(tiny_model(), batch=16, length=8192, n_drafts=0)
        )
        carry = carry._replace(cache=placed(carry.cache))
        pool = placed(
            jax.eval_shape(
                lambda: pages.empty_pool(tiny_model(), n_pages=2048, page=64, n_drafts=0)
            )
        )
        few = jax.ShapeDtypeStruct((4,), jnp.int32)
        for function, arrays in (
            (lambda into, source, *n: pages.fill(tiny_model(), into, source, *n), (carry, pool)),
            (lambda into, source, *n: pages.save(tiny_model(), into, source, *n), (pool, carry)),
        ):
            row = jax.ShapeDtypeStruct((), jnp.int32)
            program = jax.jit(function, donate_argnums=0).lower(*arrays, row, few, few).compile()
            memory = program.memory_analysis()
            bytes_ = sum(4 * leaf.size for leaf in jax.tree.leaves(pool))
            assert memory.alias_size_in_bytes >= bytes_ // n_devices
            assert memory.temp_size_in_bytes < bytes_ / n_devices / 8


@pytest.mark.parametrize("split", [1, 4])
def test_what_is_sent_arrives_in_order_of_its_tokens(split):
    """From a cache that is split into parts to one that is not."""
    carry, pool = carry_and_pool()
    written = Carry(numbered(carry.cache), numbered(carry.hidden_BWD))
    places = numbers(2, 0, OUTSIDE)
    own = written
    with jax.set_mesh(make_mesh({"context": split}, n_devices=split)):
        own = own._replace(cache=jax.tree.map(split_cache.in_parts, own.cache))
        send = jax.jit(functools.partial(pages.send, None, n_pages=64 // PAGE))
        same, sent = send(own, jnp.int32(2), places)
    sent = jax.device_get(sent)
    for got, want in zip(jax.tree.leaves(same), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(got, want)
    row = pages.receive(tiny_model(), carry, sent, jnp.int32(1), places)
    np.testing.assert_array_equal(row.hidden_BWD[1], written.hidden_BWD[2])
    stored = pages.store(tiny_model(), pool, sent, numbers(4, 1, OUTSIDE))
    trees = (jax.tree.leaves(each) for each in (row.cache, stored, written.cache))
    for got, page, want in zip(*trees, strict=True):
        for place, number in ((2, 4), (0, 1)):
            span = slice(place * PAGE, (place + 1) * PAGE)
            np.testing.assert_array_equal(got[:, 1, :, span], want[:, 2, :, span])
            np.testing.assert_array_equal(page[:, number], want[:, 2, :, span])
        assert not np.any(got[:, [0, 2]]) and not np.any(got[:, 1, :, PAGE : 2 * PAGE])
        assert not np.any(page[:, [0, 2, 3]])
