"""Looks at the pictures of conversations: opens a checkpoint's format, and turns pictures into
embeddings.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.load import Checkpoint
from dsjax.checkpoint.small_weights import SMALL
from dsjax.files import read_json
from dsjax.generate.request import Given
from dsjax.infer.pictured import BEGIN, END, PLACEHOLDER, PicturedFormat
from dsjax.infer.tiled import TiledFormat
from dsjax.parallel.sharding import parts
from dsjax.text.added_tokens import IMAGE, MARKS, ROLES
from dsjax.text.chat import Message
from dsjax.text.vocabulary import open_vocabulary
from dsjax.vision import pictures
from dsjax.vision.eyes import Eyes
from dsjax.vision.pictures import Picture
from dsjax.vision.tiles import Grid

_BATCH = 16  # squares that the tower looks at together, at most
_MOST_KEPT = 256 << 20  # bytes of embeddings: some 25 to 60 pictures, or 130 to 260 tiles


def open_format(checkpoint: Checkpoint) -> PicturedFormat | None:
    """Returns the format of a checkpoint that sees; None for a language model alone.

    Raises:
      ValueError: its tokenizer or its rules for pictures cannot be read, or lack what a picture
        needs.
    """
    if checkpoint.hf is None or checkpoint.hf.beside is None:
        return None
    folder, vision = checkpoint.tokenizer_folder, checkpoint.hf.beside.vision
    vocabulary = open_vocabulary(folder, checkpoint.model.vocab_size)
    needed = [BEGIN, END] if vision.draws else []
    if vision.tiles:
        needed = [IMAGE, *MARKS, *ROLES]
    elif vision.image_token is None:
        needed += [PLACEHOLDER]
    if missing := [name for name in needed if name not in vocabulary.coder.control]:
        raise ValueError(
            f"{folder}: the tokenizer has no {', '.join(missing)}, which stand for a picture; copy "
            "it again from the release"
        )
    low = vision.tower.image_size if vision.high else None
    rules = pictures.read_rules(folder, tiles=vision.tiles is not None, low=low)
    made = [rules.size, *([rules.high.size] if rules.high else [])]
    seen = [vision.tower.image_size, *([vision.high.image_size] if vision.high else [])]
    if made != seen:
        raise ValueError(
            f"{folder}: the rules for pictures make them {_listed(made)} pixels large, and the "
            f"model sees {_listed(seen)}; copy both from one release"
        )
    if vision.tiles:
        if rules.resolutions != vision.tiles.resolutions:
            raise ValueError(
                f"{folder}: candidate_resolutions in {pictures.TILES_FILE} are not those in "
                "config.json; copy both from one release"
            )
        return TiledFormat(vocabulary, vision, rules, ROLES)
    path = folder / "processor_config.json"
    old = not vision.draws or (
        path.is_file() and read_json(path).get("sft_format") == "deepseek_old"
    )
    roles = ("User", "Assistant") if old else ("<|User|>", "<|Assistant|>")
    return PicturedFormat(vocabulary, vision, rules, roles)


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


class Looking:
    """A format, and what turns the pictures of its conversations into embeddings, each square once
    while it is among the latest.

    The weights that look are read when the first picture is looked at.
    """

    def __init__(self, form: PicturedFormat, open_eyes: Callable[[], Eyes], mesh: Mesh | None):
        self.read, self.encode = form.read, form.encode
        self.names_places = isinstance(form, TiledFormat)
        self._form, self._open, self._mesh = form, open_eyes, mesh
        self._seen: dict[bytes, np.ndarray] = {}
        self._look = jax.jit(lambda eyes, *pixels: eyes(*pixels))

    @functools.cached_property
    def _eyes(self) -> Eyes:
        return self._open()

    def given(self, messages: Sequence[Message], prompt: Sequence[int]) -> Given | None:
        """Returns what replaces the placeholders of an encoded conversation; None without any."""
        shown = self._form.shown(messages)
        if not shown:
            return None
        names = [[_name(square) for square in picture.squares] for picture in shown]
        new = {
            name: square
            for some, picture in zip(names, shown, strict=True)
            for name, square in zip(some, picture.squares, strict=True)
            if name not in self._seen
        }
        left = iter(new)
        for size in batches(len(new), self._unit):
            some = list(itertools.islice(left, size))
            seen = self._run(np.stack([new[name] for name in some]))
            self._seen |= dict(zip(some, seen, strict=True))
        values = [
            self._form.arranged(picture, [self._seen[name] for name in some], self._eyes)
            for some, picture in zip(names, shown, strict=True)
        ]
        self._forget([name for some in names for name in some])
        return Given(self._form.places(prompt), np.concatenate(values))

    def _forget(self, latest: Sequence[bytes]) -> None:
        """Forgets the squares shown longest ago, as far as all exceed _MOST_KEPT."""
        for name in latest:
            self._seen[name] = self._seen.pop(name)
        n_bytes = sum(each.nbytes for each in self._seen.values())
        while n_bytes > _MOST_KEPT:
            n_bytes -= self._seen.pop(next(iter(self._seen))).nbytes

    def warm(self) -> Iterator[None]:
        """Reads the weights and compiles for every size of batch; yields after each."""
        side = (self._form.rules.high or self._form.rules).size
        sizes = {size for n in range(1, _BATCH + 1) for size in batches(n, self._unit)}
        for size in sorted(sizes):
            self._run(np.zeros((size, side, side, 3), np.uint8))
            yield

    @property
    def _unit(self) -> int:
        """Batches are a multiple of it, so that they divide over the mesh."""
        return 1 if self._mesh is None else parts("batch", self._mesh)

    def see(self, *pixels: np.ndarray) -> np.ndarray:
        """Looks at pictures as pre-processing leaves them: float32 [n, tokens, D].

        Args:
          pixels: float32 [n, size, size, 3], for each tower.
        """
        seen, first = [], 0
        for size in batches(len(pixels[0]), self._unit):
            seen.append(self._features(*(each[first : first + size] for each in pixels)))
            first += size
        return np.concatenate(seen)

    def see_tiles(self, pixels: np.ndarray, grids: Sequence[Grid]) -> list[np.ndarray]:
        """Looks at pictures as pre-processing leaves them, of each its whole and then its tiles:
        float32 [placeholders, D] of each.

        Args:
          pixels: float32 [n, size, size, 3], of all of them.
          grids: how the tiles of each lie.
        """
        seen, found = self.see(pixels), []
        for wide, high in grids:
            n = 1 + wide * high
            picture = Picture(pixels[:n], (0, 0), (wide, high))
            found.append(self._form.arranged(picture, list(seen[:n]), self._eyes))
            pixels, seen = pixels[n:], seen[n:]
        return found

    def _run(self, squares: np.ndarray) -> np.ndarray:
        """Looks at squares, uint8 [n, size, size, 3]: float32 [n, tokens, D]."""
        return self._features(*pictures.inputs(squares, self._form.rules))

    def _features(self, *pixels: np.ndarray) -> np.ndarray:
        n = len(pixels[0])
        lacking = -n % self._unit
        padded = [np.concatenate([each, np.repeat(each[:1], lacking, axis=0)]) for each in pixels]
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            features = self._look(self._eyes, *padded)
        return np.asarray(features[:n], np.float32)


def batches(n: int, unit: int) -> list[int]:
    """Returns how many of n squares are looked at together: few sizes, because each is another
    program, and little that is run for nothing: of ten tiles eight, then two.

    Returns:
      powers of two of units, the largest first; the last batch may not be full.
    """
    most = 1 << (max(_BATCH // unit, 1).bit_length() - 1)
    sizes, left = [], -(-n // unit)
    while left:
        size = min(most, 1 << (left.bit_length() - 1))
        sizes.append(size * unit)
        left -= size
    return sizes


def _name(square: np.ndarray) -> bytes:
    return hashlib.blake2b(square.tobytes(), digest_size=16).digest()


def open_looking(checkpoint: Checkpoint, mesh: Mesh | None, dtype: str | None) -> Looking | None:
    """Prepares for conversations with pictures; None for a language model alone.

    Args:
      dtype: of weights and activations, as the user asked; fp8, int8 and int4 are of the language
        model alone.

    Raises:
      ValueError: see `open_format`.
    """
    form = open_format(checkpoint)
    return form and look_by(form, checkpoint, mesh, dtype)


def look_by(
    form: PicturedFormat, checkpoint: Checkpoint, mesh: Mesh | None, dtype: str | None
) -> Looking:
    """Prepares for a format that is open; see `open_looking`."""

    def open_eyes() -> Eyes:
        chosen = None if dtype in SMALL else dtype
        if jax.default_backend() == "cpu" and chosen != "bfloat16":
            chosen = "float32"  # which is fast there, as `infer.weights` says, and little
        return load_eyes(checkpoint, mesh=mesh, dtype=chosen)

    return Looking(form, open_eyes, mesh)
