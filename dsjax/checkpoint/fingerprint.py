"""Fingerprints of arrays: independent of how an array is sharded, computed without gathering it.

A fingerprint is a sum modulo 2^64 over the elements of an array: the element's bits times an odd
number derived from its position in the whole array. Each process sums the shards that it owns, so
the partial sums add up to the same total on any mesh. Odd numbers are invertible modulo 2^64, so
any change of a single element, down to one bit, changes the sum; changes of several elements cancel
with a probability of about 2^-64. This guards against accidents, not against someone who constructs
a collision.

The sums are computed on the host with NumPy, a block at a time in threads: for 156 leaves,
compiling a program for the CPU took thirty times as long as all of this.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

_BLOCK = 1 << 16  # elements; small enough for the intermediate arrays to stay in cache
# The constants of SplitMix64, a generator whose output for consecutive inputs looks random.
_ADD, _FIRST, _SECOND = (
    np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
EXPONENT = {  # the bits that are all set in NaN and infinity
    np.dtype(np.float32): 0x7F800000,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}


class Inspection(NamedTuple):
    """Findings about named arrays."""

    fingerprints: dict[str, str]  # sixteen hexadecimal digits
    not_finite: list[str]


def inspect(arrays: Mapping[str, jax.Array]) -> Inspection:
    """Computes the fingerprints of arrays and finds NaN and infinity; elements have at most 32
    bits.

    With several processes, each one covers the shards that it owns, and all return the same.
    """
    sums = np.zeros((len(arrays), 2), np.uint64)  # fingerprint, blocks that are not finite
    with ThreadPoolExecutor(max(4, os.cpu_count() or 1), thread_name_prefix="inspect") as pool:
        for row, (fingerprint, wild) in zip(sums, pool.map(_inspect, arrays.values()), strict=True):
            row[:] = fingerprint, wild
    if jax.process_count() > 1:
        # Two halves of 32 bits: jax has no 64-bit integers by default.
        halves = multihost_utils.process_allgather(sums.view(np.uint32))
        sums = np.ascontiguousarray(halves).view(np.uint64).sum(axis=0, dtype=np.uint64)
    return Inspection(
        {name: f"{int(row[0]):016x}" for name, row in zip(arrays, sums, strict=True)},
        [name for name, row in zip(arrays, sums, strict=True) if row[1]],
    )


def _inspect(array: jax.Array) -> tuple[np.uint64, int]:
    found = [
        inspect_part(np.asarray(shard.data), shard.index, array.shape)
        for shard in array.addressable_shards
        if shard.replica_id == 0  # each element is counted once
    ]
    return np.uint64(sum(int(part) for part, _ in found) % 2**64), sum(wild for _, wild in found)


def inspect_part(
    part: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[np.uint64, int]:
    """Returns the partial sum of part = whole[index], where `whole` has this shape, and the number
    of blocks of `part` that contain NaN or infinity."""
    words = np.ascontiguousarray(part)
    words = words.view(f"u{part.dtype.itemsize}").reshape(part.shape)
    exponent = EXPONENT.get(part.dtype)
    strides = np.cumprod((1, *shape[:0:-1]), dtype=np.uint64)[::-1]
    places = [
        np.arange(*at.indices(size), dtype=np.uint64) * stride
        for at, size, stride in zip(index, shape, strides, strict=False)
    ]
    return _sum(words, np.uint64(0), places, exponent)


def _sum(
    words: np.ndarray, first: np.uint64, places: list[np.ndarray], exponent: int | None
) -> tuple[np.uint64, int]:
    """Sums a part. Per dimension, `places` holds what each index adds to an element's position."""
    if words.size > _BLOCK and words.ndim:
        step = max(1, _BLOCK * len(words) // words.size)
        blocks = [slice(start, start + step) for start in range(0, len(words), step)]
        along, *inner = places
        found = [
            _sum(words[block][0], first + along[block][0], inner, exponent)
            if len(words[block]) == 1
            else _sum(words[block], first, [along[block], *inner], exponent)
            for block in blocks
        ]
        return np.uint64(sum(int(part) for part, _ in found) % 2**64), sum(n for _, n in found)
    # SplitMix64 of each element's position, made odd, times the element's bits.
    place = np.full(words.shape, first + _ADD)
    for dim, along in enumerate(places):
        place += along.reshape([-1 if d == dim else 1 for d in range(words.ndim)])
    place *= _FIRST
    place ^= place >> np.uint64(32)
    place *= _SECOND
    place |= np.uint64(1)
    place *= words
    wild = exponent is not None and bool(((words & exponent) == exponent).any())
    return place.sum(dtype=np.uint64), int(wild)
