"""Conversations with pictures, as Janus and DeepSeek-VL were trained on them.

  [begin] system "\\n\\n"
  "<|User|>: " picture "\\n" ... text "\\n\\n"  "<|Assistant|>: " text [end]  ...  "<|Assistant|>:"

A picture is [begin of image] and [end of image] around one placeholder per feature of the tower.
JanusFlow gives the begin token another embedding per picture; DeepSeek-VL has the placeholders
alone. Roles are "<|User|>" and "<|Assistant|>", or "User" and "Assistant" in DeepSeek-VL and where
processor_config.json says sft_format=deepseek_old. What spells a control token in a message stays
text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from dsjax.checkpoint.eyes import load_eyes
from dsjax.checkpoint.load import Checkpoint
from dsjax.checkpoint.small_weights import SMALL
from dsjax.config.vision import VisionConfig
from dsjax.files import read_json
from dsjax.generate.request import Given
from dsjax.generate.shapes import power_of_two
from dsjax.parallel.sharding import parts
from dsjax.text.chat import Message
from dsjax.text.vocabulary import Vocabulary, open_vocabulary
from dsjax.vision import pictures
from dsjax.vision.eyes import Eyes

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
PLACEHOLDER, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
PICTURES = (
    "pictures"  # field of a message: uint8 arrays [size, size, 3], as `pictures.largest` makes
)
_BATCH = 16  # pictures that the tower looks at together, at most
_MOST_KEPT = 256 << 20  # bytes of embeddings: some 25 to 60 pictures


@dataclasses.dataclass(frozen=True)
class PicturedFormat:
    """The conversation format of one checkpoint that sees."""

    vocabulary: Vocabulary
    vision: VisionConfig
    rules: pictures.Rules
    roles: tuple[str, str]
    # As a `ChatFormat` has them; models that see call no tools.
    gap: ClassVar[str] = " "
    fenced: ClassVar[bool] = False
    marked: ClassVar[bool] = False

    @property
    def image_token(self) -> int:
        """The id that stands for each of a picture's features."""
        own = self.vision.image_token
        return self.vocabulary.coder.control[PLACEHOLDER] if own is None else own

    def read(self, paths: Sequence[Path]) -> list[np.ndarray]:
        """Reads pictures for a message's field PICTURES.

        Raises:
          ValueError: see `pictures.open_picture`.
        """
        return [pictures.largest(pictures.open_picture(path), self.rules) for path in paths]

    def decode(self, data: bytes, place: str) -> np.ndarray:
        """Decodes a picture for a message's field PICTURES.

        Args:
          place: where the bytes are from, for messages.

        Raises:
          ValueError: see `pictures.open_picture`.
        """
        return pictures.largest(pictures.decode(data, place), self.rules)

    def encode(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Encodes a conversation up to the point where the reply begins. Without a message of the
        system's it begins with SYSTEM.

        Raises:
          ValueError: thinking or tools were requested.
        """
        if thinking:
            raise ValueError("models that see do not think first; omit --thinking")
        if tools or any(each.calls or each.role == "tool" for each in messages):
            raise ValueError("models that see call no tools; leave tools and their results out")
        coder, (user, assistant) = self.vocabulary.coder, map(self._mark, self.roles)
        said = [each.content for each in messages if each.role == "system"] or [SYSTEM]
        written: list[str | list[int]] = [*self._mark(self.vocabulary.bos)]
        written += ["\n\n".join([*said, ""])] if any(said) else []
        for message in messages:
            text = message.content.strip()
            if message.role == "user":
                written += [*user, ": "]
                for _ in message.fields.get(PICTURES, ()):
                    written += [self._picture(), "\n"]
                written += [f"{text}\n\n"]
            elif message.role == "assistant":
                written += [*assistant, f": {text}", *self._mark(self.vocabulary.eos)]
        written += [*assistant, ":"]
        ids: list[int] = []
        for is_text, pieces in itertools.groupby(written, lambda piece: isinstance(piece, str)):
            some = list(pieces)
            ids += coder.encode("".join(some)) if is_text else itertools.chain(*some)  # type: ignore
        return ids

    def _mark(self, name: str | None) -> list[str | list[int]]:
        """Returns a control token, or its name as text where the tokenizer has no such token."""
        if name is None:
            return []
        id_ = self.vocabulary.coder.control.get(name)
        return [name if id_ is None else [id_]]

    def _picture(self) -> list[int]:
        control = self.vocabulary.coder.control
        inside = [self.image_token] * self.vision.tower.n_tokens
        return [control[BEGIN], *inside, control[END]] if self.vision.draws else inside

    def places(self, prompt: Sequence[int]) -> np.ndarray:
        """Returns the positions of an encoded conversation that pictures fill, int32."""
        filled = [self.image_token]
        filled += [self.vocabulary.coder.control[BEGIN]] if self.vision.flow else []
        return np.flatnonzero(np.isin(prompt, filled)).astype(np.int32)


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
    needed += [PLACEHOLDER] if vision.image_token is None else []
    if missing := [name for name in needed if name not in vocabulary.coder.control]:
        raise ValueError(
            f"{folder}: the tokenizer has no {', '.join(missing)}, which stand for a picture; copy "
            "it again from the release"
        )
    rules = pictures.read_rules(folder)
    made = [rules.size, *([rules.high.size] if rules.high else [])]
    seen = [vision.tower.image_size, *([vision.high.image_size] if vision.high else [])]
    if made != seen:
        raise ValueError(
            f"{folder / pictures.RULES_FILE} makes pictures of {_listed(made)} pixels, and the "
            f"model sees {_listed(seen)}; copy both from one release"
        )
    path = folder / "processor_config.json"
    old = not vision.draws or (
        path.is_file() and read_json(path).get("sft_format") == "deepseek_old"
    )
    roles = ("User", "Assistant") if old else ("<|User|>", "<|Assistant|>")
    return PicturedFormat(vocabulary, vision, rules, roles)


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


class Looking:
    """A format, and what turns the pictures of its conversations into embeddings, each one once
    while it is among the latest.

    The weights that look are read when the first picture is looked at.
    """

    def __init__(self, form: PicturedFormat, open_eyes: Callable[[], Eyes], mesh: Mesh | None):
        self.read, self.encode = form.read, form.encode
        self._form, self._open, self._mesh = form, open_eyes, mesh
        self._seen: dict[bytes, np.ndarray] = {}
        self._look = jax.jit(lambda eyes, *pixels: eyes(*pixels))

    @functools.cached_property
    def _eyes(self) -> Eyes:
        return self._open()

    def given(self, messages: Sequence[Message], prompt: Sequence[int]) -> Given | None:
        """Returns what replaces the placeholders of an encoded conversation; None without any."""
        squares = [each for message in messages for each in message.fields.get(PICTURES, ())]
        if not squares:
            return None
        names = [hashlib.blake2b(each.tobytes(), digest_size=16).digest() for each in squares]
        new = {name: each for name, each in zip(names, squares, strict=True)}
        new = {name: each for name, each in new.items() if name not in self._seen}
        for first in range(0, len(new), _BATCH):
            some = list(new)[first : first + _BATCH]
            seen = self._run(np.stack([new[name] for name in some]))
            self._seen |= dict(zip(some, seen, strict=True))
        values = np.concatenate([self._seen[name] for name in names])
        self._forget(names)
        return Given(self._form.places(prompt), values)

    def _forget(self, latest: Sequence[bytes]) -> None:
        """Forgets the pictures that nobody has shown for longest, beyond _MOST_KEPT."""
        for name in latest:
            self._seen[name] = self._seen.pop(name)
        n_bytes = sum(each.nbytes for each in self._seen.values())
        while n_bytes > _MOST_KEPT:
            n_bytes -= self._seen.pop(next(iter(self._seen))).nbytes

    def warm(self) -> Iterator[None]:
        """Reads the weights and compiles for every size of batch; yields after each."""
        side = (self._form.rules.high or self._form.rules).size
        n = 1
        while n <= _BATCH:
            self._run(np.zeros((n, side, side, 3), np.uint8))
            yield
            n *= 2

    def _run(self, squares: np.ndarray) -> np.ndarray:
        """Looks at pictures, uint8 [n, size, size, 3]: float32 [n, tokens, D]."""
        n = len(squares)
        # Few sizes of batches, and ones that divide over the mesh.
        size = power_of_two(n)
        if self._mesh is not None:
            size += -size % parts("batch", self._mesh)
        padded = np.concatenate([squares, np.repeat(squares[:1], size - n, axis=0)])
        with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
            features = self._look(self._eyes, *pictures.inputs(padded, self._form.rules))
        return np.asarray(features[:n], np.float32)


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
