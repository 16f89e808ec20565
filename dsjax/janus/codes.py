"""The codes of pictures to draw, made once by the VQ tokenizer and stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dsjax.janus.encodings import Encoder, Progress, made_once
from dsjax.janus.pairs import Picture
from dsjax.vision.vq import Vq


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
    encoder = Encoder(
        "codes",
        vq,
        lambda vq, pixels: vq.encode(pixels).reshape(len(pixels), -1),
        size=grid * vq.config.scale,
        shape=(grid * grid,),
        # The smallest type that holds the codes: they are many.
        dtype=np.min_scalar_type(vq.config.n_codes - 1),
        at_once=16,
    )
    return made_once(shown, encoder, cache, progress).astype(np.int32)
