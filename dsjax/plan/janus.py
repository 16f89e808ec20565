"""The program that trains a model that sees and draws on a slice, with the shapes and shardings of
its arguments.

How many pictures the rows of a run have room for depends on its data. What is planned is the most
that a row can hold, in DeepSeek-VL2 the most squares.
"""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dsjax.config.janus import KINDS, Janus
from dsjax.config.vision import PATCH, VisionConfig
from dsjax.janus.objective import seeing_and_drawing
from dsjax.janus.rows import Shape, empty_row
from dsjax.janus.training import check_sight, declared_sighted, trained_parts
from dsjax.kernels.target import Target
from dsjax.plan.programs import Program, number
from dsjax.train.batches import batch_sharding
from dsjax.train.optimizer import adamw
from dsjax.train.step import abstract_state, train_step
from dsjax.vision.pictures import Rules
from dsjax.vision.tiles import n_embeddings


def paint(config: Janus, mesh: Mesh | AbstractMesh, target: Target) -> Program:
    """Builds one optimizer step, as `tools/paint.py` runs it.

    Raises:
      ValueError: parameters or batch do not divide over the mesh, or the model does not train.
    """
    vision = seen_by(config)
    check_sight(config, vision)
    declared = declared_sighted(config, vision, target)
    optimizer = adamw(config.optim, trained_parts(config.janus.trains))
    rows, length = config.micro_batch_size, config.sequence_length
    outside = config.train.batch_size // rows, rows

    def placed(row: np.ndarray) -> jax.ShapeDtypeStruct:
        shape = *outside, *row.shape
        sharding = batch_sharding(shape, mesh, inside=row.ndim)
        return jax.ShapeDtypeStruct(shape, row.dtype, sharding=sharding)

    batch = {name: placed(row) for name, row in empty_row(fullest(config), 0).items()}
    state = abstract_state(declared, optimizer, mesh)
    knobs = {name: number(mesh) for name in ("learning_rate", "bias_update_speed")}
    placement = jax.tree.map(lambda leaf: leaf.sharding, state)
    objective = seeing_and_drawing(config, _rules(vision))
    return Program(
        train_step(declared, optimizer, objective),
        (state, batch, knobs),
        (0,),
        (placement, None),
        config.train.batch_size * length,
        rows * length,
        mtp=False,
    )


def seen_by(config: Janus) -> VisionConfig:
    """Returns what the model sees and draws with, once the checkpoint has been read."""
    assert config.vision is not None, "the command fills it in before it plans"
    return config.vision


def fullest(config: Janus) -> Shape:
    """Returns the shape of rows with as many pictures as fit into one, and as many drawings by a
    flow.
    """
    vision, length = seen_by(config), config.sequence_length
    flow, side, n_drawings = vision.flow, PATCH * vision.code_grid, 0
    if flow and config.counts[KINDS.index("draw")]:
        # A token at least goes before a drawing, and one is its time.
        n_drawings = length // (vision.code_grid**2 + 2)
    return Shape(
        length + 1,
        n_pictures=_most_squares(vision, length),
        size=vision.tower.image_size,
        large=vision.high.image_size if vision.high else 0,
        n_drawings=n_drawings,
        latents=(side, side, flow.latent_channels) if n_drawings and flow else (),
        drawn=vision.tower.image_size if config.janus.align else 0,
    )


def _most_squares(vision: VisionConfig, length: int) -> int:
    """Counts the squares of as many pictures as fit into a row, at least one."""
    around = 2 if vision.draws else 0  # tokens that begin and end a picture
    if vision.tiles is None:
        return max(length // (vision.tower.n_tokens + around), 1)
    size, side = vision.tower.image_size, vision.view_side
    found = [1]
    for width, height in vision.tiles.resolutions:
        grid = width // size, height // size
        n_tiles = grid[0] * grid[1]
        n_squares = 1 if n_tiles == 1 else 1 + n_tiles
        found.append(length // n_embeddings(grid, side) * n_squares)
    return max(found)


def _rules(vision: VisionConfig) -> Rules:
    """Returns how pictures are read, as far as a program depends on it."""
    high = Rules(size=vision.high.image_size) if vision.high else None
    sizes = vision.tiles.resolutions if vision.tiles else ()
    return Rules(size=vision.tower.image_size, high=high, resolutions=sizes)
