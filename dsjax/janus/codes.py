"""The codes of pictures to draw, made once by the VQ tokenizer and stored.

The tokenizer does not train with the model, so a picture has the same codes in every epoch and
every stage. They are kept in the cache under a hash of the pictures and of the tokenizer's weights;
a picture that changed is another one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsjax import files
from dsjax.janus.pairs import Picture
from dsjax.vision import pictures
from dsjax.vision.vq import Vq

_AT_ONCE = 16  # pictures that are encoded together

Progress = Callable[[int, int], None]


def codes_of(
    shown: Sequence[Picture],
    vq: Vq,
    grid: int,
    cache: Path,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """Returns the codes of pictures, row by row, int32 [pictures, grid * grid].

    Args:
      grid: codes along each side of a picture.
      progress: called with the pictures that are done and all pictures.

    Raises:
      ValueError: a picture cannot be read or decoded; names it.
    """
    path = cache / f"codes-{_digest(shown, vq, grid)}.npy"
    if path.is_file():
        with path.open("rb") as file:
            return np.load(file).astype(np.int32)
    # The smallest type that holds the codes: they are many.
    dtype = np.min_scalar_type(vq.config.n_codes - 1)
    codes, size = np.empty((len(shown), grid * grid), dtype), grid * vq.config.scale
    encode = jax.jit(lambda vq, pixels: vq.encode(pixels))
    for first in range(0, len(shown), _AT_ONCE):
        progress(first, len(shown))
        some = shown[first : first + _AT_ONCE]
        squares = np.stack([square_of(each, size) for each in some])
        # One size of batches, so that one compiled program serves all.
        padded = np.pad(squares, ((0, _AT_ONCE - len(some)), *[(0, 0)] * 3))
        found = encode(vq, as_pixels(padded))[: len(some)]
        codes[first : first + len(some)] = np.asarray(found).reshape(len(some), -1)
    progress(len(shown), len(shown))
    cache.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        np.save(file, codes)
    return codes.astype(np.int32)


def square_of(picture: Picture, size: int) -> np.ndarray:
    """Reads a picture as a VQ tokenizer sees it, uint8 [size, size, 3].

    Raises:
      ValueError: it cannot be read or decoded.
    """
    return pictures.cropped(pictures.decode(picture.read(), str(picture)), size)


def as_pixels(squares: Any) -> Any:
    """Scales uint8 [..., 3] to what a VQ tokenizer reads, float32 from -1 to 1."""
    return squares.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _digest(shown: Sequence[Picture], vq: Vq, grid: int) -> str:
    digest = hashlib.blake2b(str(grid).encode(), digest_size=16)
    for leaf in jax.tree.leaves(vq):
        digest.update(np.asarray(leaf).tobytes())
    times: dict[str, int] = {}
    for picture in shown:
        if picture.path not in times:
            times[picture.path] = os.stat(picture.path).st_mtime_ns
        digest.update(f"{picture[:3]} {times[picture.path]}|".encode())
    return digest.hexdigest()
