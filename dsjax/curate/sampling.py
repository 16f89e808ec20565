"""Choices by hash: random, and the same whoever makes them in whatever order."""

from __future__ import annotations

import bisect
import hashlib
from typing import Any

WHOLE = 1 << 64  # positions are smaller
CHARACTERS = 1500  # of a text that is shown


def position(name: str, seed: int) -> int:
    """Returns a 64-bit hash of a document's id, which decides the split and the samples."""
    data = f"{seed}\0{name}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Findings:
    """Counts documents by source and verdict, and keeps the beginnings of a few of each."""

    def __init__(self, samples: int, seed: int) -> None:
        self._most = samples
        self._seed = seed
        self.counts: dict[str, dict[str, list[int]]] = {}
        self._samples: dict[tuple[str, str], list[tuple[int, str, str]]] = {}

    def add(self, row: dict[str, Any], verdict: str, size: int) -> None:
        """Adds a document (`id`, `source`, `text`) of `size` bytes."""
        add(self.counts, row["source"], verdict, size)
        found = self._samples.setdefault((row["source"], verdict), [])
        place = position(row["id"], self._seed)
        if len(found) < self._most or (found and place < found[-1][0]):
            bisect.insort(found, (place, row["id"], row["text"][:CHARACTERS]))
            del found[self._most :]

    def samples(self) -> list[list[Any]]:
        """Returns [source, verdict, [position, id, text]s] for those that there are."""
        return [[*key, found] for key, found in sorted(self._samples.items())]


def add(counts: dict[str, dict[str, list[int]]], source: str, key: str, size: int) -> None:
    """Counts a document and its bytes."""
    total = counts.setdefault(source, {}).setdefault(key, [0, 0])
    total[0] += 1
    total[1] += size
