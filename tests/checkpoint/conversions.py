"""Conversions that say nothing, and the hashes of what they write."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from rich.console import Console

from dsjax.checkpoint import manifest
from dsjax.checkpoint.exporting import export_checkpoint
from dsjax.checkpoint.importing import import_checkpoint
from dsjax.checkpoint.slices import Index, read_slice
from dsjax.checkpoint.staging import Converted
from dsjax.checkpoint.weights import Name, Weights
from dsjax.display import Transfer


def bring_in(source: Path, target: Path, dtype: str = "keep") -> Converted:
    return import_checkpoint(source, target, dtype=dtype, progress=quiet())


def send_out(source: Path, target: Path, dtype: str = "keep") -> Converted:
    return export_checkpoint(source, target, dtype=dtype, progress=quiet())


def read(weights: Weights, name: Name, index: Index, dtype: np.dtype | None = None) -> np.ndarray:
    """Reads leaf[index] of open weights, in the dtype it is stored in, or another."""
    tensors = weights.tensors(name)
    return read_slice(tensors, index, dtype or tensors.leaf.dtype)


def quiet() -> Transfer:
    return Transfer(Console(file=io.StringIO()))


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def seal(folder: Path) -> None:
    """Writes the manifest anew, after a test has changed files as a hostile author might."""
    files = manifest.hash_files(folder, manifest.listing(folder))
    manifest.write(folder, manifest.Manifest({}, {}, files))
