"""Implements tools/draw.py --tokens: pictures of given prompt ids as arrays, for exact comparisons
with other programs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from dsjax.checkpoint import load
from dsjax.display import Display
from dsjax.generate.codes import Drawer
from dsjax.generate.flow import Painter
from dsjax.infer.drawing import (
    Order,
    blanked,
    check_room,
    drawing_format,
    open_model,
    read_order,
    vae_of,
)
from dsjax.infer.pictured import BEGIN, PicturedFormat
from dsjax.infer.token_files import ArrayWriter, check_outputs, read_tokens
from dsjax.model.cache import check_split
from dsjax.parallel.mesh import submesh


class _Row(NamedTuple):
    prompt: list[int]
    blank: list[int]  # empty for a flow
    seed: int


def run(arguments: argparse.Namespace) -> None:
    """Draws a picture for each row of --tokens; the next row has the next seed.

    Writes float32 [batch, size, size, 3], -1 to 1, to --out and, on request, int32 [batch, codes]
    to --codes.

    Raises:
      ValueError: the checkpoint cannot draw, the ids leave no room for a picture or cannot be read,
        a setting is not of this kind of model, or a file cannot be written. All of this is checked
        before the weights are read.
    """
    checkpoint = load.open_checkpoint(arguments.checkpoint, dict(arguments.override))
    form, config = drawing_format(checkpoint), checkpoint.model
    ids = read_tokens(arguments.tokens, config.vocab_size, max_length=config.max_seq_len)
    check_outputs([arguments.out, arguments.codes], arguments.tokens)
    check_room(checkpoint, form, ids.shape[1])
    order = read_order(arguments, form.vision, prompt=str(arguments.tokens), n=len(ids))
    vae = None
    if form.vision.flow:
        _check_flow(form, ids, arguments)
        vae = vae_of(arguments.vae, form.vision.flow)
    rows = [
        _Row(prompt, [] if vae else blanked(form, prompt), seed)
        for prompt, seed in zip(ids.tolist(), order.seeds, strict=True)
    ]
    mesh = submesh(arguments.mesh)
    check_split(config, mesh)
    model = open_model(checkpoint, form, mesh, arguments.dtype, vae)
    drawn, codes = [], []
    with Display(Console(stderr=True)) as display:
        progress = display.counting("drawing")
        for number, row in enumerate(rows):
            progress(number, len(rows))
            if isinstance(model, Painter):
                drawn.append(model.decoded(_painted(model, order, row)))
            else:
                codes.append(_coded(model, order, row))
                drawn.append(model.decoded(codes[-1]))
        progress(len(rows), len(rows))
    _write(arguments.out, np.concatenate(drawn).clip(-1, 1))
    if arguments.codes:
        _write(arguments.codes, np.concatenate(codes).reshape(len(rows), -1))
    print(f"{len(rows)} pictures: {arguments.out}", file=sys.stderr)


def _check_flow(form: PicturedFormat, ids: np.ndarray, arguments: argparse.Namespace) -> None:
    if arguments.codes:
        raise ValueError("--codes does not apply to a model that draws by a flow; omit it")
    begin = form.vocabulary.coder.control[BEGIN]
    if (ids[:, -1] != begin).any():
        raise ValueError(
            f"{arguments.tokens}: a row of prompt ids ends with {BEGIN} ({begin}), whose place the "
            "time of a flow takes"
        )


def _coded(drawer: Drawer, order: Order, row: _Row) -> np.ndarray:
    """Draws the codes of a row's picture, int32 [1, grid, grid]."""
    sampling = order.sampling(row.seed)
    return drawer.codes(row.prompt, row.blank, [sampling], guidance=order.guidance)


def _painted(painter: Painter, order: Order, row: _Row) -> np.ndarray:
    """Draws the latents of a row's picture, float32 [1, rows, columns, channels]."""
    assert order.steps is not None
    noise = painter.noise([row.seed])
    return painter.latents(row.prompt, noise, guidance=order.guidance, steps=order.steps)


def _write(path: Path, array: np.ndarray) -> None:
    with ArrayWriter(path, array.shape, array.dtype) as writer:
        writer.write(array)
