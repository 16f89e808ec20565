"""Telling `shard_map` which values differ between devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
from jax import lax
from jax.sharding import PartitionSpec


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


def call_shipped(kernel: Callable[..., jax.Array], *inputs: jax.Array) -> jax.Array:
    """Runs a kernel of JAX's or tokamax's, inside `shard_map` too: its code does not say over which
    mesh axes its output varies, so for the length of the call nobody asks.
    """
    mesh = jax.sharding.get_abstract_mesh()
    with shipped_promotion():
        if not mesh.manual_axes:
            return kernel(*inputs)
        unchecked = jax.shard_map(
            kernel,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            axis_names=set(mesh.manual_axes),
            check_vma=False,
        )
        return vary_as(unchecked(*inputs), *inputs)


@contextlib.contextmanager
def shipped_promotion() -> Iterator[None]:
    """JAX's defaults of dtype and rank promotion, on which the code of such kernels relies."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
