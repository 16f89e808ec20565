"""Runs a function over a few queries after the other, so that what it makes of them exists for
those few alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Carry = TypeVar("Carry")


def over_tiles(
    function: Callable[[Any], Any], of_queries: Any, *, most: int, parts: int = 1
) -> Any:
    """Applies a function to tiles of queries, and again in the backward pass.

    Args:
      function: a part of `of_queries` -> a tree of arrays [B, T, ...].
      of_queries: a tree of arrays [B, T, ...]; B may differ between them.
      most: queries per tile.
      parts: equal parts of the queries that have no tile in common.
    """

    def step(_: None, tile: Any) -> tuple[None, Any]:
        return None, jax.checkpoint(function)(tile)

    return fold_tiles(step, None, of_queries, most=most, parts=parts)[1]


def fold_tiles(
    step: Callable[[Carry, Any], tuple[Carry, Any]],
    start: Carry,
    of_queries: Any,
    *,
    most: int,
    parts: int = 1,
) -> tuple[Carry, Any]:
    """Applies step(carry, tile) -> (carry, arrays [B, T, ...]) to one tile after the other.

    The last tile of a part is filled up with zeros. What is computed for these is dropped from the
    arrays; they must add nothing to the carry.
    """
    T = jax.tree.leaves(of_queries)[0].shape[1]
    part = T // parts
    n_tiles = -(-part // most)
    size = -(-part // n_tiles)
    if n_tiles * parts == 1:
        return step(start, of_queries)

    def cut(x_BTX: jax.Array) -> jax.Array:
        B, _, *rest = x_BTX.shape
        x_BPtX = x_BTX.reshape(B, parts, part, *rest)
        fill = ((0, 0),) * 2 + ((0, n_tiles * size - part),) + ((0, 0),) * len(rest)
        x_BItX = jnp.pad(x_BPtX, fill).reshape(B, parts * n_tiles, size, *rest)
        return jnp.moveaxis(x_BItX, 1, 0)

    def join(x_IBtX: jax.Array) -> jax.Array:
        _, B, _, *rest = x_IBtX.shape
        x_BPtX = jnp.moveaxis(x_IBtX, 0, 1).reshape(B, parts, n_tiles * size, *rest)
        return x_BPtX[:, :, :part].reshape(B, T, *rest)

    carry, out = lax.scan(step, start, jax.tree.map(cut, of_queries))
    return carry, jax.tree.map(join, out)
