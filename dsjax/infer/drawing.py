"""Implements tools/draw.py: pictures of a prompt, as PNG files that say how they were made."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from dsjax import files
from dsjax.checkpoint import load
from dsjax.checkpoint.eyes import load_eyes
from dsjax.display import Display
from dsjax.generate.codes import Drawer
from dsjax.generate.sampling import Sampling
from dsjax.infer.pictured import BEGIN, PicturedFormat, open_format
from dsjax.infer.weights import choose_dtype
from dsjax.model.cache import check_split
from dsjax.parallel.mesh import submesh
from dsjax.text.chat import Message
from dsjax.text.tokenizer import PAD
from dsjax.vision import pictures

SHEET = "sheet.png"
_GAP = 8  # pixels between the pictures of a sheet


@dataclasses.dataclass(frozen=True)
class Order:
    """What to draw; a picture differs from the next in its seed alone.

    Raises:
      ValueError: a setting is out of range.
    """

    prompt: str
    n: int = 4
    guidance: float = 5.0
    temperature: float = 1.0
    seed: int = 0
    at_once: int = 16

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what to draw: --prompt 'a red circle'")
        if self.n < 1 or self.at_once < 1:
            raise ValueError(f"n={self.n} and max_batch={self.at_once} must be at least 1")
        if not 1 <= self.guidance < math.inf:
            raise ValueError(
                f"guidance={self.guidance} must be finite and at least 1, which follows the prompt "
                "without exaggeration; 5 is Janus' own"
            )
        for number in range(self.n):
            self.sampling(number)

    def sampling(self, number: int) -> Sampling:
        return Sampling(temperature=self.temperature, seed=self.seed + number)

    def settings(self, number: int, model: str) -> dict[str, str]:
        """Returns what a picture's file says about it."""
        return {
            "prompt": self.prompt,
            "model": model,
            "seed": str(self.seed + number),
            "guidance": str(self.guidance),
            "temperature": str(self.temperature),
            "software": "dsjax",
        }


def run(arguments: argparse.Namespace) -> None:
    """Runs tools/draw.py with its parsed arguments. Pictures that are there, made with the same
    settings, are not drawn again.

    Raises:
      ValueError: the checkpoint cannot draw, the prompt is too long, or the folder has pictures of
        other settings. All of this is checked before the weights are read.
    """
    order = Order(
        arguments.prompt,
        arguments.n,
        arguments.guidance,
        arguments.temperature,
        arguments.seed,
        arguments.max_batch,
    )
    pictures.require_package()
    checkpoint = load.open_checkpoint(arguments.checkpoint, dict(arguments.override))
    mesh = submesh(arguments.mesh)
    check_split(checkpoint.model, mesh)
    prompt, blank = encode(checkpoint, order.prompt)
    out, name = arguments.out, checkpoint.path.resolve().name
    paths = [out / f"{order.seed + number}.png" for number in range(order.n)]
    left = [
        number
        for number, path in enumerate(paths)
        if not _is_drawn(path, order.settings(number, name))
    ]
    out.mkdir(parents=True, exist_ok=True)
    if left:
        drawer = _open_drawer(checkpoint, mesh, arguments.dtype)
        _draw(drawer, order, prompt, blank, left, paths, name)
    if order.n > 1:
        write_sheet(paths, out / SHEET)
    print(f"{order.n} pictures, {len(left)} of them new: {out}", file=sys.stderr)


def encode(checkpoint: load.Checkpoint, text: str) -> tuple[list[int], list[int]]:
    """Encodes what to draw, and the same with the text blanked out: all but the first and the last
    token become padding (Janus' code).

    Raises:
      ValueError: the checkpoint cannot draw, or the prompt leaves no room for a picture.
    """
    form = open_format(checkpoint)
    if form is None or form.vision.vq is None:
        raise ValueError(
            f"{checkpoint.path} cannot draw; name a checkpoint of Janus or Janus-Pro, in the "
            "folder that it was published in"
        )
    prompt = prompt_of(form, text)
    blank = blanked(form, prompt)
    needed, most = len(prompt) + form.vision.code_grid**2, checkpoint.model.max_seq_len
    if needed > most:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens and a picture of {form.vision.code_grid**2} exceed "
            f"model.max_seq_len={most}; shorten the prompt"
        )
    return prompt, blank


def prompt_of(form: PicturedFormat, text: str) -> list[int]:
    """Encodes what to draw, up to the token that begins the picture."""
    messages = [Message("system", ""), Message("user", text)]
    return [*form.encode(messages), form.vocabulary.coder.control[BEGIN]]


def blanked(form: PicturedFormat, prompt: Sequence[int]) -> list[int]:
    """Blanks out a prompt's text: all but the first and the last token become padding.

    Raises:
      ValueError: the tokenizer has no padding.
    """
    pad = form.vocabulary.coder.control.get(PAD)
    if pad is None:
        raise ValueError(
            f"the tokenizer has no {PAD!a}, which stands for a prompt's text in guidance; copy it "
            "again from the release"
        )
    return [prompt[0], *[pad] * (len(prompt) - 2), prompt[-1]]


def _open_drawer(checkpoint: load.Checkpoint, mesh: Mesh | None, dtype: str | None) -> Drawer:
    chosen = choose_dtype(checkpoint, dtype)
    language = load.load(checkpoint, mesh=mesh, dtype=chosen)
    eyes = load_eyes(checkpoint, mesh=mesh, dtype=language.policy.compute)
    return Drawer(language, eyes.pencil, eyes.config.code_grid, mesh)


def _draw(
    drawer: Drawer,
    order: Order,
    prompt: Sequence[int],
    blank: Sequence[int],
    left: Sequence[int],
    paths: Sequence[Path],
    model: str,
) -> None:
    with Display(Console(stderr=True)) as display:
        for first in range(0, len(left), order.at_once):
            some = left[first : first + order.at_once]
            what = f"pictures {first + 1} to {first + len(some)} of {len(left)}"
            codes = drawer.codes(
                prompt,
                blank,
                [order.sampling(number) for number in some],
                guidance=order.guidance,
                progress=display.counting(what),
            )
            for number, pixels in zip(some, drawer.pixels(codes), strict=True):
                write_picture(paths[number], pixels, order.settings(number, model))


def write_picture(path: Path, pixels: np.ndarray, settings: dict[str, str]) -> None:
    """Writes uint8 [rows, columns, 3] as a PNG that says how it was made."""
    import PIL.Image
    import PIL.PngImagePlugin

    said = PIL.PngImagePlugin.PngInfo()
    for key, value in settings.items():
        said.add_itxt(key, value)
    with files.replacing(path) as file:
        PIL.Image.fromarray(pixels).save(file, "PNG", pnginfo=said)


def _is_drawn(path: Path, settings: dict[str, str]) -> bool:
    """Tells whether a picture is there already.

    Raises:
      ValueError: there is another in its place.
    """
    import PIL.Image

    if not path.exists():
        return False
    try:
        with PIL.Image.open(path, formats=("PNG",)) as picture:
            found = {key: str(value) for key, value in picture.info.items() if key in settings}
    except Exception:  # whatever a damaged file makes a decoder raise
        found = {}
    if found != settings:
        raise ValueError(
            f"{path} is not the picture that would be drawn there: {found or 'not one of ours'}; "
            "choose another --out, or remove it"
        )
    return True


def write_sheet(paths: Sequence[Path], target: Path) -> None:
    """Writes all pictures side by side, in as many columns as rows or one more."""
    import PIL.Image

    shown = [pictures.open_picture(path) for path in paths]
    width, height = shown[0].size
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    size = columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP
    sheet = PIL.Image.new("RGB", size, "white")
    for number, picture in enumerate(shown):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * (width + _GAP), row * (height + _GAP)))
    with files.replacing(target) as file:
        sheet.save(file, "PNG")
