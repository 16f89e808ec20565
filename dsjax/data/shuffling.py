"""Random numbers and orders that depend on their place alone, and never on a library's version.

All are SplitMix64 of (purpose, seed, epoch) and an index, so any of them can be computed without
those before it. NumPy's generators may change between versions.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream_key(purpose: str, seed: int, epoch: int) -> int:
    """Returns a 64-bit start for `mix`, independent for each purpose, seed and epoch (or step)."""
    digest = hashlib.blake2b(f"{purpose} {seed} {epoch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(key: int, numbers: np.ndarray) -> np.ndarray:
    """Returns the outputs `numbers` (uint64) of SplitMix64 started at `key`; all are distinct."""
    state = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def permute(index: int, count: int, key: int) -> int:
    """Returns the image of `index` under a pseudo-random permutation of range(count).

    The permutation is never stored: it is a Feistel network over the next power of four, repeated
    until the value falls into the range (cycle walking).
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            number = np.array([right * 4 + turn], np.uint64)
            left, right = right, left ^ (int(mix(key, number)[0]) & mask)
        index = left << half | right
        if index < count:
            return index


def shuffled(count: int, key: int) -> np.ndarray:
    """Returns the numbers 0 to count - 1 in a random order, int64."""
    return np.argsort(mix(key, np.arange(count, dtype=np.uint64)), kind="stable")
