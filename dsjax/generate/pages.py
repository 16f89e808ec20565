"""Cache entries in pages, which hold a fixed number of tokens each, and copies from and to rows.

A pool of pages is a cache whose rows are the pages: letter Z counts pages and U a page's tokens. A
row of a running batch stays in one piece, so decoding reads no page; entries are copied once when a
request comes and once when it goes. One call copies a few pages of one row, and moves no more than
these between the devices of a mesh: nothing along `context`, whose devices hold the same share of
every page as of every row (`dsjax.parallel.split_cache`).

Pages are also what travels between devices that run prompts and devices that decode, and to disk.
On the way between devices a page's tokens are in order, because the two meshes may split them into
other numbers of parts; on both ways layers are stacked, because one of the two may hold them apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig
from dsjax.generate.decoding import Carry
from dsjax.model.block import attention_class
from dsjax.model.cache import Cache, empty_cache
from dsjax.model.transformer import Transformer
from dsjax.parallel import split_cache
from dsjax.parallel.sharding import parts_here

AT_A_TIME = 16  # pages that one call copies


def padded(numbers: Sequence[int]) -> np.ndarray:
    """Returns places or pages as int32 [AT_A_TIME], filled up with different ones outside of every
    row and pool, which copies drop.
    """
    numbers_X = (1 << 30) + np.arange(AT_A_TIME, dtype=np.int32)
    numbers_X[: len(numbers)] = numbers
    return numbers_X


class Sent(NamedTuple):
    """Pages of one row on their way to other devices, whole on each."""

    cache: Cache  # stacked entries [L, X, P, U, .]
    hidden_1WD: jax.Array  # the row's, see `decoding.Carry`


def check(config: ModelConfig, page: int, n_parts: int) -> None:
    """Checks that a cache can be cut into pages of `page` tokens.

    Args:
      n_parts: devices of a mesh that each have a share of every page.

    Raises:
      ValueError: a page would end inside an entry that several tokens share, or does not divide
        over the mesh.
    """
    if page % n_parts:
        raise ValueError(
            f"a page of {page} tokens, which follows from prefill_chunk, does not divide over "
            f"mesh.context={n_parts}; choose a power of two up to {page}, or go without pages "
            "(prefix_tokens=0, prompts where decoding runs)"
        )
    every = tokens_per_entry(config)
    if page % every:
        raise ValueError(
            f"a page of {page} tokens, which follows from prefill_chunk, does not divide into "
            f"entries of {every} tokens, as model.attention={config.attention} has them; make "
            "prefill_chunk a multiple of it, or go without pages (prefix_tokens=0, prompts where "
            "decoding runs)"
        )


def tokens_per_entry(config: ModelConfig) -> int:
    """Returns the fewest tokens of which a model has whole entries of every kind."""
    return math.lcm(*(entry.every for entry in attention_class(config).cached(config).values()))


def empty_pool(model: Transformer, *, n_pages: int, page: int, n_drafts: int) -> Cache:
    """Allocates pages of `page` tokens.

    Raises:
      ValueError: see `check`.
    """
    check(model.config, page, parts_here("length"))
    dtype, separate = model.policy.compute, model.separate
    cache = empty_cache(model.config, n_pages, page, dtype, mtp=n_drafts > 0, separate=separate)
    return cache.pinned()


def fill(
    model: Transformer,
    carry: Carry,
    pool: Cache,
    row: jax.Array,
    places_X: jax.Array,
    pages_X: jax.Array,
) -> Carry:
    """Copies pages into one row of a carry.

    Args:
      row: int32 scalar.
      places_X: int32, where in the row each page goes, counted in pages; all different. A place
        outside the row drops the page.
      pages_X: int32, the pages of the pool.
    """
    del model

    # One scatter of whole pages, since a row reshaped to pages is copied whole (jax 0.12 on a CPU).
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3, 4),
        inserted_window_dims=(1,),
        scatter_dims_to_operand_dims=(1, 3),
    )

    def write(caches: tuple[Cache, Cache], whole: tuple[jax.Array, ...]) -> Cache:
        row, places_X, pages_X = whole

        def in_entry(mine_LBPSX: jax.Array, pool_LZPUX: jax.Array) -> jax.Array:
            new_XLPUX = jnp.moveaxis(pool_LZPUX[:, pages_X], 1, 0)
            S, U = mine_LBPSX.shape[3], pool_LZPUX.shape[3]
            begins_X = jnp.minimum(places_X, S // U) * U
            into_X2 = jnp.stack([jnp.broadcast_to(row, begins_X.shape), begins_X], axis=1)
            return jax.lax.scatter(
                mine_LBPSX, into_X2, new_XLPUX, dims, unique_indices=True, mode="drop"
            )

        return jax.tree.map(in_entry, *caches)

    cache = split_cache.update(write, (carry.cache, pool), (row, places_X, pages_X))
    return carry._replace(cache=cache.pinned())


def save(
    model: Transformer,
    pool: Cache,
    carry: Carry,
    row: jax.Array,
    places_X: jax.Array,
    pages_X: jax.Array,
) -> Cache:
    """Copies parts of one row of a carry into pages.

    Args:
      row, places_X: see `fill`.
      pages_X: int32, the pages of the pool that are replaced, all different; one outside the pool
        drops its part.
    """
    del model

    def write(caches: tuple[Cache, Cache], whole: tuple[jax.Array, ...]) -> Cache:
        row, places_X, pages_X = whole

        def in_entry(pool_LZPUX: jax.Array, mine_LBPSX: jax.Array) -> jax.Array:
            L, B, P, S, X = mine_LBPSX.shape
            U = pool_LZPUX.shape[3]
            new_XLPUX = mine_LBPSX.reshape(L, B, P, S // U, U, X)[:, row, :, places_X]
            pages = pool_LZPUX.at[:, pages_X]
            return pages.set(jnp.moveaxis(new_XLPUX, 0, 1), mode="drop", unique_indices=True)

        return jax.tree.map(in_entry, *caches)

    return split_cache.update(write, (pool, carry.cache), (row, places_X, pages_X)).pinned()


def take(model: Transformer, pool: Cache, pages_X: jax.Array) -> tuple[Cache, Cache]:
    """Returns the pool and a copy of some of its pages, which is not the pool's when it changes;
    the copy's entries are stacked.
    """
    del model
    return pool, jax.tree.map(lambda pool_LZPUX: pool_LZPUX[:, pages_X], pool).stacked()


def put(model: Transformer, pool: Cache, new: Cache, pages_X: jax.Array) -> Cache:
    """Replaces pages of the pool by others.

    Args:
      new: the pages, stacked entries [L, X, P, U, .].
      pages_X: int32, which ones they replace, all different; one outside the pool drops its page.
    """
    del model

    def write(pool_LZPUX: jax.Array, new_LXPUX: jax.Array) -> jax.Array:
        pages = pool_LZPUX.at[:, pages_X]
        return pages.set(new_LXPUX, mode="drop", unique_indices=True)

    return jax.tree.map(write, pool, new.as_in(pool)).pinned()


def send(
    model: Transformer, carry: Carry, row: jax.Array, places_X: jax.Array, *, n_pages: int
) -> tuple[Carry, Sent]:
    """Returns the carry and a copy of some pages of one of its rows, for `receive` or `store`.

    Args:
      row: int32 scalar.
      places_X: int32, which pages of the row.
      n_pages: how many pages a row has.
    """
    del model

    def read(cache: Cache, whole: tuple[jax.Array, jax.Array]) -> Cache:
        row, places_X = whole

        def in_entry(mine_LBPSX: jax.Array) -> jax.Array:
            L, B, P, S, X = mine_LBPSX.shape
            by_page = mine_LBPSX.reshape(L, B, P, n_pages, S // n_pages, X)
            return jnp.moveaxis(by_page[:, row, :, places_X], 0, 1)

        return jax.tree.map(in_entry, cache)

    cache = split_cache.update(read, carry.cache, (row, places_X))
    hidden_1WD = jax.lax.dynamic_slice_in_dim(carry.hidden_BWD, row, 1)
    return carry, Sent(jax.tree.map(split_cache.in_order, cache).stacked(), hidden_1WD)


def receive(
    model: Transformer, carry: Carry, sent: Sent, row: jax.Array, places_X: jax.Array
) -> Carry:
    """Puts pages that were sent into one row of a carry.

    Args:
      row, places_X: see `fill`.
    """
    cache = jax.tree.map(split_cache.in_parts, sent.cache).as_in(carry.cache)
    pages_X = jnp.arange(len(places_X), dtype=jnp.int32)
    filled = fill(model, carry, cache, row, places_X, pages_X)
    return filled._replace(hidden_BWD=carry.hidden_BWD.at[row].set(sent.hidden_1WD[0]))


def store(model: Transformer, pool: Cache, sent: Sent, pages_X: jax.Array) -> Cache:
    """Replaces pages of the pool by pages that were sent; `pages_X` is that of `put`."""
    return put(model, pool, jax.tree.map(split_cache.in_parts, sent.cache), pages_X)
