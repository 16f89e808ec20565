"""Types that tell `shard_map` along which mesh axes a value differs between devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

Result = TypeVar("Result")


def varies_over(*arrays: jax.Array) -> frozenset[str]:
    """Returns the mesh axes along which any of the arrays differs between devices; none outside
    `shard_map`.
    """
    return frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary_as(x: jax.Array, *others: jax.Array) -> jax.Array:
    """Marks x as differing between devices along every mesh axis along which another array does.

    A loop needs this for a carry that starts as zeros. In the backward pass x's gradient is summed
    over the axes that were added.
    """
    missing = varies_over(*others) - varies_over(x)
    return lax.pcast(x, tuple(missing), to="varying") if missing else x


def agreed(x: jax.Array, axes: Collection[str]) -> jax.Array:
    """Marks x as equal on all devices along some mesh axes, as it is there although it was computed
    from what may differ: all take over the first one's.
    """
    if not axes:
        return x
    first = jnp.all(jnp.stack([lax.axis_index(axis) == 0 for axis in axes]))
    return lax.psum(jnp.where(first, x, jnp.zeros_like(x)), tuple(axes))


def by_hand() -> bool:
    """Whether no mesh axis is left to the compiler, which cannot split a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    return all(mesh.shape[name] == 1 for name in mesh.axis_names if name not in mesh.manual_axes)


def call_shipped(kernel: Callable[..., Result], *inputs: jax.Array) -> Result:
    """Runs a kernel that ships with JAX or tokamax, inside `shard_map` too. It may return a tree.

    The kernel does not declare which mesh axes its output varies over, so the check is disabled for
    this call.
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
        return jax.tree.map(lambda out: vary_as(out, *inputs), unchecked(*inputs))


@contextlib.contextmanager
def shipped_promotion() -> Iterator[None]:
    """Restores JAX's defaults for dtype and rank promotion, on which such kernels rely."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
