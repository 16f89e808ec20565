"""Damage: to files, as disks and copies do it, and to one device's copy of an array."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file, counted from its first, or from its last if `bit` is below zero."""
    with path.open("r+b") as file:
        bit %= 8 * path.stat().st_size
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


def with_flipped_bit(array: jax.Array, device: jax.Device, bit: int) -> jax.Array:
    """The array, with one bit flipped in the copy of one device."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device == device:
            part.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
