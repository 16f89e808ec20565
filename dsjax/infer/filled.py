"""Fills the placeholders in given token ids with pictures: files, or what a model's own
pre-processing has made of them, for exact comparisons with other programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoint.load import Checkpoint
from dsjax.generate.request import Given
from dsjax.infer.looking import Looking, look_by, open_format
from dsjax.infer.pictured import PICTURES, PicturedFormat
from dsjax.infer.tiled import TiledFormat
from dsjax.infer.token_files import read_array
from dsjax.text.chat import Message
from dsjax.vision.pictures import Picture


class PictureFiles(NamedTuple):
    """Where pictures come from: `images`, or `pixels`, a .npy of float32 [n, 3, size, size] as the
    model's pre-processing leaves them.
    """

    images: Sequence[Path] = ()
    pixels: Path | None = None  # of tiles: each picture's whole, then its tiles row by row
    high_pixels: Path | None = None  # the same, larger, for a model's second tower

    @property
    def paths(self) -> list[Path]:
        """All files, to read."""
        return [*self.images, *filter(None, (self.pixels, self.high_pixels))]


NO_PICTURES = PictureFiles()


def fill(
    checkpoint: Checkpoint,
    tokens_BT: np.ndarray,
    files: PictureFiles,
    mesh: Mesh | None = None,
    dtype: str | None = None,
) -> list[Given | None]:
    """Looks at pictures, which fill the placeholders in order, those of the first row first.

    Args:
      dtype: of weights and activations, as the user asked.

    Returns:
      what replaces the placeholders of each row; None for a row without any.

    Raises:
      ValueError: the checkpoint does not see, a file cannot be read, or the pictures fill more or
        fewer tokens than there are placeholders.
    """
    form = open_format(checkpoint)
    if form is None:
        raise ValueError(
            f"{checkpoint.path} does not see; leave the pictures out, or name a checkpoint of "
            "Janus, DeepSeek-VL or VL2 in the folder that it was published in"
        )
    looking = look_by(form, checkpoint, mesh, dtype)
    if files.pixels:
        return _with_pixels(form, looking, tokens_BT, files)
    return _with_images(form, looking, tokens_BT, files.images)


def _with_images(
    form: PicturedFormat, looking: Looking, tokens_BT: np.ndarray, paths: Sequence[Path]
) -> list[Given | None]:
    turns, left = [], form.read(paths)
    for row, ids in enumerate(tokens_BT):
        n = len(form.places(ids))
        # How much a picture fills can depend on how many there are in a conversation.
        counts = (count for count in range(len(left) + 1) if _size(form, left[:count]) == n)
        count = next(counts, None)
        if count is None:
            raise ValueError(
                f"row {row} of the tokens has {n} placeholders, which none of the numbers from 0 "
                f"to {len(left)} of the pictures left fills; one fills {_size(form, left[:1])}"
            )
        turns.append(_turn(left[:count]))
        left = left[count:]
    if left:
        raise ValueError(f"the tokens have no placeholders for the last {len(left)} pictures")
    return [looking.given([turn], ids) for turn, ids in zip(turns, tokens_BT, strict=True)]


def _turn(pictures: Sequence[Picture]) -> Message:
    return Message("user", "", {PICTURES: [*pictures]})


def _size(form: PicturedFormat, pictures: Sequence[Picture]) -> int:
    """Counts the placeholders that pictures of one conversation fill."""
    return sum(
        len(form.numbered(each, 0, len(each.squares))) for each in form.shown([_turn(pictures)])
    )


def _with_pixels(
    form: PicturedFormat, looking: Looking, tokens_BT: np.ndarray, files: PictureFiles
) -> list[Given | None]:
    vision = form.vision
    if bool(files.high_pixels) != bool(vision.high):
        needed = "has a second tower: give" if vision.high else "has one tower alone: leave out"
        raise ValueError(f"the model {needed} --high-pixels H.npy")
    assert files.pixels is not None
    pixels = [_read_pixels(files.pixels, vision.tower.image_size)]
    if files.high_pixels and vision.high:
        pixels.append(_read_pixels(files.high_pixels, vision.high.image_size))
    if len({len(each) for each in pixels}) > 1:
        raise ValueError(
            f"{files.pixels} has {len(pixels[0])} pictures, and {files.high_pixels} "
            f"{len(pixels[1])}; both show the same"
        )
    if isinstance(form, TiledFormat):
        return _with_tiles(form, looking, tokens_BT, pixels[0])
    places = [form.places(ids) for ids in tokens_BT]
    n_tokens, n_places = vision.tower.n_tokens + bool(vision.flow), sum(map(len, places))
    if n_places != len(pixels[0]) * n_tokens:
        raise ValueError(
            f"the tokens have {n_places} placeholders, and {len(pixels[0])} pictures of "
            f"{n_tokens} fill {len(pixels[0]) * n_tokens}"
        )
    seen = looking.see(*pixels)
    values = np.split(seen.reshape(-1, seen.shape[-1]), np.cumsum([*map(len, places)])[:-1])
    return [
        Given(where, what) if len(where) else None
        for where, what in zip(places, values, strict=True)
    ]


def _with_tiles(
    form: TiledFormat, looking: Looking, tokens_BT: np.ndarray, pixels: np.ndarray
) -> list[Given | None]:
    grids = [form.grids(ids) for ids in tokens_BT]
    n_squares = sum(1 + wide * high for some in grids for wide, high in some)
    if n_squares != len(pixels):
        raise ValueError(
            f"the tokens have placeholders for {n_squares} squares, a whole and its tiles for each "
            f"picture, and there are pixels of {len(pixels)}"
        )
    seen = iter(looking.see_tiles(pixels, [grid for some in grids for grid in some]))
    return [
        Given(form.places(ids), np.concatenate([next(seen) for _ in some])) if some else None
        for ids, some in zip(tokens_BT, grids, strict=True)
    ]


def _read_pixels(path: Path, size: int) -> np.ndarray:
    """Reads pre-processed pictures: float32 [n, size, size, 3]."""
    form = f"float32 [n, 3, {size}, {size}]"
    pixels = read_array(path, "pre-processed pictures", form)
    if pixels.dtype.kind != "f" or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
        raise ValueError(f"{path} holds {pixels.dtype} of shape {pixels.shape}, not {form}")
    if not len(pixels) or not np.isfinite(pixels).all():
        raise ValueError(f"{path} holds no pictures, or numbers that are not finite")
    return np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32), 1, -1))
