"""Comparing copies that should be equal: a check for memory that silently flips bits.

An array that is not split over every mesh axis has copies on several devices. Training keeps them
equal without ever comparing them, so if one goes wrong, that device trains another model from then
on. Here each device sums up its own copy of each array, at the cost of one read, and the host
compares the sums. An element enters as its bits times an odd number, so that a single flipped bit
always changes the sum.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Mismatch(NamedTuple):
    """An array with differing copies of the same part."""

    name: str
    devices: tuple[Any, ...]  # the minority, or all of them in a tie


def mismatches(arrays: Mapping[str, jax.Array], mesh: Mesh) -> list[Mismatch]:
    """Compares the copies that this process holds of arrays sharded over a mesh.

    Args:
      arrays: by name, with elements of at most 32 bits and a NamedSharding each.
    """
    copied = {name: array for name, array in arrays.items() if _copies(array) > 1}
    if not copied:
        return []
    specs = tuple(_spec(array) for array in copied.values())
    sums = _summing(mesh, specs)(*copied.values())
    of_device = {shard.device: np.asarray(shard.data)[0] for shard in sums.addressable_shards}
    found = []
    for number, (name, array) in enumerate(copied.items()):
        by_part: dict[str, dict[Any, int]] = defaultdict(dict)
        for shard in array.addressable_shards:
            by_part[str(shard.index)][shard.device] = int(of_device[shard.device][number])
        for copies in by_part.values():
            ((common, count), *others) = Counter(copies.values()).most_common()
            if others:
                tied = others[0][1] == count
                wrong = [device for device, value in copies.items() if tied or value != common]
                found.append(Mismatch(name, tuple(wrong)))
    return found


def _copies(array: jax.Array) -> int:
    """Counts the devices of all processes that hold each part."""
    indices = array.sharding.devices_indices_map(array.shape).values()
    return len(indices) // len(set(map(str, indices)))


def _spec(array: jax.Array) -> PartitionSpec:
    assert isinstance(array.sharding, NamedSharding), array.sharding
    return array.sharding.spec


@functools.cache
def _summing(mesh: Mesh, specs: tuple[PartitionSpec, ...]):
    """Builds the program that sums each device's copies: uint32 [devices, arrays], without any
    communication.
    """

    def own(part: jax.Array, spec: PartitionSpec) -> jax.Array:
        # Marked as varying, so that the compiler does not take one device's sum for all.
        split = {axis for entry in spec if entry for axis in np.atleast_1d(entry)}
        copied = tuple(axis for axis in mesh.axis_names if axis not in split)
        return _sum(jax.lax.pcast(part, copied, to="varying") if copied else part)

    def sums(*parts: jax.Array) -> jax.Array:
        return jnp.stack([own(*pair) for pair in zip(parts, specs, strict=True)])[None]

    everywhere = PartitionSpec(mesh.axis_names)
    return jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=specs, out_specs=everywhere))


def _sum(part: jax.Array) -> jax.Array:
    if part.dtype == jnp.bool_:
        part = part.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * part.dtype.itemsize}")
    words = jax.lax.bitcast_convert_type(part, unsigned).astype(jnp.uint32).reshape(-1)
    odd = jnp.arange(words.size, dtype=jnp.uint32) * np.uint32(2654435762) | np.uint32(1)
    return (words * odd).sum(dtype=jnp.uint32)
