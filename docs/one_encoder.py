"""Two encoders against one, as Janus' ablation (arXiv:2410.13848, section 4.4) in small.

Trains the toy of `make draw` twice at equal steps: once as it is, where a tower sees and a VQ
tokenizer draws, and once with the VQ tokenizer for both. Either encoder has learned from pictures
before the stages begin. With one encoder the model sees a picture as the entries of its codes, 2 x
2 of them joined to as many features as the tower gives, through an aligner of the same depth. Data
and tokenizer are the same files. What is finished in RUNS is skipped.

Command: python docs/one_encoder.py RUNS
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from rich.console import Console

from dsjax.config.coloured_shapes import ColouredShapes
from dsjax.janus import from_nothing
from dsjax.vision.eyes import Eyes
from dsjax.vision.projector import unfold
from dsjax.vision.vq import unit

CONFIG = "configs/pipelines/shapes_tiny.py"
SHARED = ("data", "autoencoder", "tokenizer")


def of_codes(eyes: Eyes, pixels_BYXC: jax.Array) -> jax.Array:
    """Turns pictures into embeddings [B, features, D] by the VQ tokenizer alone."""
    vq, grid = eyes.pencil.vq, eyes.config.tower.grid
    codes_BYX = vq.encode(pixels_BYXC)
    entries = unit(vq.codebook[...].astype(jnp.float32))[codes_BYX]
    B, Y, X, C = entries.shape
    joined = unfold(entries.reshape(B, Y * X, C), Y // grid)
    return eyes.aligner(joined.astype(eyes.policy.compute))


def with_one(config: ColouredShapes) -> ColouredShapes:
    """Returns the toy whose aligner reads entries; its tower, which nothing runs, is as small as
    one can be.
    """
    vision = config.vision
    assert vision.vq is not None
    joined = (vision.code_grid // vision.tower.grid) ** 2
    tower = dataclasses.replace(
        vision.tower, dim=joined * vision.vq.code_dim, n_layers=1, n_heads=1, inter_dim=1
    )
    vision = dataclasses.replace(vision, tower=tower)
    return dataclasses.replace(config, name="shapes_one_encoder", vision=vision, tower=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    runs = parser.parse_args().runs
    config, console = from_nothing.load_config(CONFIG), Console()
    if code := from_nothing.run(config, runs / "two", command="two encoders", console=console):
        raise SystemExit(code)
    for name in SHARED:
        if not (runs / "one" / name).is_dir():
            shutil.copytree(runs / "two" / name, runs / "one" / name)
    with mock.patch.object(Eyes, "__call__", of_codes):
        raise SystemExit(
            from_nothing.run(with_one(config), runs / "one", command="one", console=console)
        )


if __name__ == "__main__":
    main()
