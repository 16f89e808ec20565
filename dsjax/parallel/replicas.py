"""Whether copies that should be equal are: a check on memory that flips bits without a word.

An array that is not split over every mesh axis lies on several devices. Training keeps the copies
equal without ever comparing them, so one that goes wrong trains another model from then on. Here
each device sums up its own copy of each array, which costs one reading of it, and the host compares
the sums. An element counts by its bits times an odd number, so a single flipped bit always shows.
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
    """An array of which devices hold different copies of the same part."""

    name: str
    devices: tuple[Any, ...]  # those in the minority; all of them where there is none


def mismatches(arrays: Mapping[str, jax.Array], mesh: Mesh) -> list[Mismatch]:
    """Compares the copies of arrays that are sharded over a mesh, as far as this process holds
    them.

    Args:
      arrays: by name, elements of at most 32 bits, each with a NamedSharding.
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
    """How many devices, of all processes, hold each part."""
    indices = array.sharding.devices_indices_map(array.shape).values()
    return len(indices) // len(set(map(str, indices)))


def _spec(array: jax.Array) -> PartitionSpec:
    assert isinstance(array.sharding, NamedSharding), array.sharding
    return array.sharding.spec


@functools.cache
def _summing(mesh: Mesh, specs: tuple[PartitionSpec, ...]):
    """A program that gives the sums of each device's copies, uint32 [devices, arrays].

    array[..] -> sums[devices, arrays]: no device hears of another.
    """

    def own(part: jax.Array, spec: PartitionSpec) -> jax.Array:
        """The sum of this device's copy, which the compiler may not take for that of the others."""
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
