"""Large pictures in tiles, as DeepSeek-VL2 sees them (arXiv:2412.10302, section 2.1).

A picture is seen whole, shrunk to the tower's square, and again larger, cut into tiles of that
square. Both keep their proportions and are padded with the mean's colour by Pillow, whose rounding
is the reference's.

Departures from the paper, as DeepSeek's code does it:
  1. The paper chooses the resolution with the least padding. Here it is the one that keeps the most
     pixels of the picture (its own number at most), and among equal ones the smallest.
  2. A picture that one tile suffices for is seen twice all the same: whole, and in one tile.

Of more than two pictures in a conversation none is cut: each has one tile, which is the whole.

The embeddings of one picture, `side` x `side` per square, in reading order:

  whole      side rows of side embeddings, each followed by newline
  separator
  tiles      side * rows of tiles, each row across all tiles of it, followed by newline
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsjax.vision.pictures import Picture, Rules

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_CUT = 2  # pictures of a conversation; if there are more, none is cut
Grid = tuple[int, int]  # tiles beside each other, rows of tiles


def resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Chooses the width and height that a picture of this width and height is brought to.

    The order of the operations, and that fractions of a pixel are cut off, decide between close
    ones; so does the order of the resolutions between equal ones.
    """
    width, height = size

    def worth(each: tuple[int, int]) -> tuple[int, int]:
        scale = min(each[0] / width, each[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - each[0] * each[1]

    return max(resolutions, key=worth)  # the first of equal ones


def cut(picture: Image, rules: Rules, place: str) -> Picture:
    """Prepares an RGB picture: its whole first, then its tiles row by row. Of a single tile, which
    would be the same as the whole, nothing is kept.

    Args:
      place: where it is from, for messages.

    Raises:
      ValueError: it is so thin that its whole would have no pixel left, only padding.
    """
    import PIL.ImageOps

    side, grid = rules.size, outline(picture.size, rules, place).grid
    whole = PIL.ImageOps.pad(picture, (side, side), color=rules.border)
    squares = [np.asarray(whole)]
    if grid != (1, 1):
        size = (grid[0] * side, grid[1] * side)
        large = np.asarray(PIL.ImageOps.pad(picture, size, color=rules.border))
        tiles = large.reshape(grid[1], side, grid[0], side, 3).swapaxes(1, 2)
        squares += list(tiles.reshape(-1, side, side, 3))
    return Picture(np.stack(squares), picture.size, grid)


def outline(size: tuple[int, int], rules: Rules, place: str) -> Picture:
    """Returns what `cut` makes of a picture of this width and height, without pixels.

    Raises:
      ValueError: see `cut`.
    """
    side = rules.size
    width, height = size
    if not round(min(width, height) / max(width, height) * side):
        raise ValueError(
            f"{place} is a picture of {width:,} x {height:,} pixels, too thin to be shrunk to "
            f"{side} x {side}; cut it into pieces that are less long"
        )
    wide, high = (each // side for each in resolution(size, rules.resolutions))
    n_squares = 1 if (wide, high) == (1, 1) else 1 + wide * high
    return Picture(np.zeros((n_squares, 0, 0, 3), np.uint8), size, (wide, high))


def uncut(pictures: Sequence[Picture]) -> list[Picture]:
    """Returns the pictures of a conversation as they are seen together."""
    if len(pictures) <= MOST_CUT:
        return list(pictures)
    return [Picture(each.squares[:1], each.size) for each in pictures]


def n_embeddings(grid: Grid, side: int) -> int:
    """Returns how many placeholders stand for a picture."""
    wide, high = grid
    return side * (side + 1) + 1 + side * high * (side * wide + 1)


def arranged(
    features: Sequence[np.ndarray], grid: Grid, newline_D: np.ndarray, separator_D: np.ndarray
) -> np.ndarray:
    """Puts the embeddings of a picture in their order.

    Args:
      features: those of each square that `cut` returns, [side * side, D].

    Returns:
      [n_embeddings, D].
    """
    whole, tiles = features[0], features[1:] or features[:1]
    wide, high = grid
    D = whole.shape[-1]
    side = round(len(whole) ** 0.5)
    local = np.stack(tiles).reshape(high, wide, side, side, D).swapaxes(1, 2)

    def lines(rows_YXD: np.ndarray) -> np.ndarray:
        ends = np.broadcast_to(newline_D, (len(rows_YXD), 1, D))
        return np.concatenate([rows_YXD, ends], axis=1).reshape(-1, D)

    return np.concatenate(
        [
            lines(whole.reshape(side, side, D)),
            separator_D[None],
            lines(local.reshape(high * side, wide * side, D)),
        ]
    )
