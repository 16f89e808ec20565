"""Telling `shard_map` which values differ between devices."""

from __future__ import annotations

import jax
from jax import lax


def varies_over(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes along which one of the arrays differs between devices; none outside
    `shard_map`.
    """
    return frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary_as(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Marks x as different between devices wherever one of the others is.

    A loop needs it whose carry starts from zeros. In the backward pass x's gradient is summed over
    the axes that are new to it.
    """
    missing = varies_over(*others) - varies_over(x)
    return lax.pcast(x, tuple(missing), to="varying") if missing else x
