"""The latents of pictures to draw by a flow, made once by the VAE and stored.

What is stored of a picture are the means and the standard deviations that its latents are drawn
from, in the units of `dsjax.vision.vae`: float32, 74 kB for 384 x 384 pixels. Latents are drawn
from them anew in every epoch, as diffusers' trainers do; JanusFlow's paper does not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dsjax.config.vision import PATCH
from dsjax.janus.encodings import Encoder, Progress, made_once
from dsjax.janus.pairs import Picture
from dsjax.vision.vae import Vae


def latents_of(
    shown: Sequence[Picture],
    vae: Vae,
    grid: int,
    cache: Path,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """Returns means and standard deviations, float32 [pictures, 2, rows, columns, channels].

    Args:
      grid: positions of the language model along each side of a picture.
      progress: called with the pictures that are done and all pictures.

    Raises:
      ValueError: a picture cannot be read or decoded; names it.
    """
    side = PATCH * grid
    encoder = Encoder(
        "latents",
        vae,
        lambda vae, pixels: jnp.stack(vae.encode(pixels), axis=1),
        size=side * vae.config.scale,
        shape=(2, side, side, vae.config.latent_channels),
        dtype=np.dtype(np.float32),
        at_once=4,  # a VAE's activations are large
    )
    return made_once(shown, encoder, cache, progress)
