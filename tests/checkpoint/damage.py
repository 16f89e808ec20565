"""Damage to files, as disks and copies do it."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file, counted from its first, or from its last if `bit` is below zero."""
    with path.open("r+b") as file:
        bit %= 8 * path.stat().st_size
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))
