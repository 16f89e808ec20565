"""Coloured shapes as data: pictures, captions, questions, and a tokenizer, all from a seed.

A picture is one of three shapes in one of four colours at one of nine places, 48 x 48 pixels on
grey; its size and exact place vary by half pixels. 108 captions tell them apart:

  a red circle at the top left

A VQ tokenizer learns from crowds as well, where each place may have a shape of its own: a picture
with one shape is mostly grey, and could keep what the shape is in the codes of any place.

`named` recognises a picture by rule, without any model: the caption whose pictures are nearest.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsjax.files import write
from dsjax.infer.pictured import BEGIN, END, PLACEHOLDER, SYSTEM
from dsjax.text.tokenizer import BOS, EOS, PAD

SIZE = 48
GREY = (128, 128, 128)  # far from every colour, and 0 in a model's numbers
SHAPES = ("circle", "square", "triangle")
COLOURS = {
    "red": (230, 20, 20),
    "green": (20, 200, 40),
    "blue": (30, 50, 235),
    "yellow": (245, 225, 20),
}
PLACES = (
    "top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom",
    "bottom right",
)  # fmt: skip
_CENTRES = (11, 24, 37)
_RADII = (5, 6, 7)  # half of a shape's side
_SHIFTS = (-1, -0.5, 0, 0.5, 1)  # of its centre, in pixels
_LOOKS = tuple(itertools.product(_RADII, _SHIFTS, _SHIFTS))
_KNOWN = [look for look in _LOOKS if look[1] % 1 == look[2] % 1 == 0]  # what `named` compares with
_N_CROWDS = 4000
PROPERTIES = ("shape", "colour", "place")
QUESTION = "What is shown?"
CROWDS = "crowds"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"


class Drawn(NamedTuple):
    """What a picture shows."""

    colour: str
    shape: str
    place: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} at the {self.place}"


EVERY = [Drawn(*each) for each in itertools.product(COLOURS, SHAPES, PLACES)]


class Look(NamedTuple):
    """How a picture shows it."""

    radius: float  # half of the shape's side, in pixels
    right: float  # from the middle of its place to its centre
    down: float


def draw(drawn: Drawn, radius: float, right: float, down: float) -> np.ndarray:
    """Draws a picture, uint8 [48, 48, 3]; the look is that of `Look`."""
    return _draw([(drawn, Look(radius, right, down))])


def draw_crowd(rng: random.Random) -> np.ndarray:
    """Draws a picture, uint8 [48, 48, 3], where half of all places have a shape, any of them."""
    shown = []
    for place in rng.sample(PLACES, len(PLACES)):
        if rng.random() < 0.5:
            drawn = Drawn(rng.choice(tuple(COLOURS)), rng.choice(SHAPES), place)
            shown.append((drawn, Look(*rng.choice(_LOOKS))))
    return _draw(shown)


def _draw(shown: Sequence[tuple[Drawn, Look]]) -> np.ndarray:
    import PIL.Image
    import PIL.ImageDraw

    # Drawn four times as large and reduced, so that edges are smooth.
    picture = PIL.Image.new("RGB", (4 * SIZE, 4 * SIZE), GREY)
    pen = PIL.ImageDraw.Draw(picture)
    pen.rectangle((0, 0, 4 * SIZE - 1, 4 * SIZE - 1), outline="black", width=4)
    pen.rectangle((4, 4, 4 * SIZE - 5, 4 * SIZE - 5), outline="white", width=4)
    for drawn, look in shown:
        _paint(pen, drawn, look)
    return np.asarray(picture.resize((SIZE, SIZE), PIL.Image.Resampling.BOX))


def _paint(pen: Any, drawn: Drawn, look: Look) -> None:
    row, column = divmod(PLACES.index(drawn.place), 3)
    x, y = _CENTRES[column] + look.right, _CENTRES[row] + look.down
    radius, colour = look.radius, COLOURS[drawn.colour]
    left, top, end, bottom = (4 * each for each in (x - radius, y - radius, x + radius, y + radius))
    if drawn.shape == "circle":
        pen.ellipse((left, top, end, bottom), fill=colour)
    elif drawn.shape == "square":
        pen.rectangle((left, top, end, bottom), fill=colour)
    else:
        pen.polygon([(left, bottom), (end, bottom), (4 * x, top)], fill=colour)


@functools.cache
def _every_picture() -> tuple[np.ndarray, np.ndarray]:
    """Returns pictures of all captions, float32 [captions * looks, 48 * 48 * 3], and their
    squares.
    """
    drawn = np.stack([_numbers(draw(each, *look)) for each in EVERY for look in _KNOWN])
    return drawn, np.square(drawn).sum(axis=-1)


def _numbers(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32).reshape(-1) / 255 - 0.5


def named(pixels: np.ndarray) -> Drawn:
    """Returns what a picture, uint8 [48, 48, 3], shows: the nearest picture, by squares."""
    every, squares = _every_picture()
    return EVERY[int((squares - 2 * every @ _numbers(pixels)).argmin()) // len(_KNOWN)]


def tokenizer() -> tokenizers.Tokenizer:
    """Makes a tokenizer with one id per word, and one for the system's message."""
    control = [BOS, EOS, PAD, USER, ASSISTANT, BEGIN, END, PLACEHOLDER]
    words = sorted({word for drawn in EVERY for word in drawn.caption.split()})
    words += ["What", "is", "shown", *PROPERTIES]
    pieces = [SYSTEM, *(f" {word}" for word in words), *words, ":", "?", "\n"]
    inner = tokenizers.Tokenizer(
        models.WordLevel({name: i for i, name in enumerate([*control, *pieces])}, PAD)
    )
    escaped = SYSTEM.replace(".", r"\.")
    split = tokenizers.Regex(rf"{escaped}| ?[A-Za-z]+|[\s\S]")
    inner.pre_tokenizer = pre_tokenizers.Split(split, "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([BOS, EOS, PAD])
    inner.add_tokens(
        [tokenizers.AddedToken(name, special=False, normalized=False) for name in control[3:]]
    )
    return inner


def write_shapes(folder: Path, *, seed: int, n_held_out: int) -> None:
    """Writes what the stages of a run read: every picture there is, once.

    pictures/*.png, crowds/*.png
    see.jsonl       {"image", "question", "answer"}: its caption, or one of its three properties
    draw.jsonl      {"image", "caption"}
    captions.jsonl  {"text"}
    held_out.jsonl  as see.jsonl, of pictures that nothing above has; their captions are asked for
    """
    import PIL.Image

    rng = random.Random(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    every = list(itertools.product(EVERY, _LOOKS))
    rng.shuffle(every)
    names = ("see", "draw", "captions", "held_out")
    lines: dict[str, list[dict[str, str]]] = {name: [] for name in names}
    for number, (drawn, look) in enumerate(every):
        image = f"pictures/{number:04}.png"
        PIL.Image.fromarray(draw(drawn, *look)).save(folder / image)
        asked = {"image": image, "question": QUESTION, "answer": drawn.caption}
        if number < n_held_out:
            lines["held_out"].append(asked)
            continue
        name = rng.choice((None, None, *PROPERTIES))
        if name is not None:
            asked |= {"question": f"What {name}?", "answer": getattr(drawn, name)}
        lines["see"].append(asked)
        lines["draw"].append({"image": image, "caption": drawn.caption})
        lines["captions"].append({"text": drawn.caption})
    (folder / CROWDS).mkdir(exist_ok=True)
    for number in range(_N_CROWDS):
        PIL.Image.fromarray(draw_crowd(rng)).save(folder / CROWDS / f"{number:04}.png")
    for name, objects in lines.items():
        write(folder / f"{name}.jsonl", "".join(json.dumps(each) + "\n" for each in objects))
