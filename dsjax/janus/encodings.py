"""What an autoencoder makes of pictures to draw, made once and stored.

An autoencoder does not train with the model, so a picture has the same encoding in every epoch and
every stage. Encodings are kept in the cache under a hash of the pictures and of the autoencoder's
weights; a picture that changed is another one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dsjax import files
from dsjax.janus.pairs import Picture
from dsjax.vision import pictures

Progress = Callable[[int, int], None]


class Encoder(NamedTuple):
    """How pictures are encoded.

    Attributes:
      name: what the file of encodings is called by.
      module: the weights.
      encode: (module, pixels float32 [B, size, size, 3], -1 to 1) -> encodings, [B, *shape].
      size: sides of a picture.
      shape, dtype: of an encoding as it is stored.
      at_once: pictures that are encoded together.
    """

    name: str
    module: Any
    encode: Callable[[Any, jax.Array], jax.Array]
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype
    at_once: int


def made_once(
    shown: Sequence[Picture],
    encoder: Encoder,
    cache: Path,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """Returns the encodings of pictures, [pictures, *shape], mapped from the file that holds them.

    Args:
      progress: called with the pictures that are done and all pictures.

    Raises:
      ValueError: a picture cannot be read or decoded; names it.
    """
    path = cache / f"{encoder.name}-{_digest(shown, encoder)}.npy"
    if path.is_file():
        return np.load(path, mmap_mode="r")
    encode, n = jax.jit(encoder.encode), encoder.at_once
    header = {"descr": encoder.dtype.str, "fortran_order": False}
    cache.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as file:
        shape = (len(shown), *encoder.shape)
        np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        for first in range(0, len(shown), n):
            progress(first, len(shown))
            some = shown[first : first + n]
            squares = np.stack([square_of(each, encoder.size) for each in some])
            # One size of batches, so that one compiled program serves all.
            padded = np.pad(squares, ((0, n - len(some)), *[(0, 0)] * 3))
            found = np.asarray(encode(encoder.module, as_pixels(padded)))[: len(some)]
            file.write(found.astype(encoder.dtype).tobytes())
    progress(len(shown), len(shown))
    return np.load(path, mmap_mode="r")


def square_of(picture: Picture, size: int) -> np.ndarray:
    """Reads a picture as an autoencoder sees it, uint8 [size, size, 3].

    Raises:
      ValueError: it cannot be read or decoded.
    """
    return pictures.cropped(pictures.decode(picture.read(), str(picture)), size)


def as_pixels(squares: Any) -> Any:
    """Scales uint8 [..., 3] to what an autoencoder reads, float32 from -1 to 1."""
    return squares.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _digest(shown: Sequence[Picture], encoder: Encoder) -> str:
    digest = hashlib.blake2b(f"{encoder.size}".encode(), digest_size=16)
    for leaf in jax.tree.leaves(encoder.module):
        digest.update(np.asarray(leaf).tobytes())
    times: dict[str, int] = {}
    for picture in shown:
        if picture.path not in times:
            times[picture.path] = os.stat(picture.path).st_mtime_ns
        digest.update(f"{picture[:3]} {times[picture.path]}|".encode())
    return digest.hexdigest()
