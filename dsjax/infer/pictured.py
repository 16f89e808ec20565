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

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dsjax.config.vision import VisionConfig
from dsjax.text.chat import Message
from dsjax.text.vocabulary import Vocabulary
from dsjax.vision import pictures
from dsjax.vision.eyes import Eyes
from dsjax.vision.pictures import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
PLACEHOLDER, BEGIN, END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
PICTURES = "pictures"  # field of a message: Picture objects
Written = list[str | list[int]]  # texts, and ids of control tokens between them


def check_asked(
    messages: Sequence[Message], thinking: bool | None, tools: Sequence[Mapping[str, Any]]
) -> None:
    """Raises ValueError for what models that see cannot do."""
    if thinking:
        raise ValueError("models that see do not think first; omit --thinking")
    if tools or any(each.calls or each.role == "tool" for each in messages):
        raise ValueError("models that see call no tools; leave tools and their results out")


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

    def read(self, paths: Sequence[Path]) -> list[Picture]:
        """Reads pictures for a message's field PICTURES.

        Raises:
          ValueError: see `pictures.open_picture`.
        """
        return [self._seen(pictures.open_picture(path), str(path)) for path in paths]

    def decode(self, data: bytes, place: str) -> Picture:
        """Decodes a picture for a message's field PICTURES.

        Args:
          place: where the bytes are from, for messages.

        Raises:
          ValueError: see `pictures.open_picture`.
        """
        return self._seen(pictures.decode(data, place), place)

    def _seen(self, picture: Image, place: str) -> Picture:
        """Returns what the model sees of a picture."""
        del place
        return Picture(pictures.largest(picture, self.rules)[None], picture.size)

    def outline(self, read: Callable[[], bytes], place: str) -> Picture:
        """Returns a picture without pixels: what decides how many placeholders stand for it.

        Args:
          read: returns the file's bytes, where they matter.
          place: where they are from, for messages.

        Raises:
          ValueError: the picture cannot be read.
        """
        del read, place
        return Picture(np.zeros((1, 0, 0, 3), np.uint8), (0, 0))

    def shown(self, messages: Sequence[Message]) -> list[Picture]:
        """Returns the pictures of a conversation as the model sees them together."""
        return [each for message in messages for each in message.fields.get(PICTURES, ())]

    def arranged(self, picture: Picture, features: Sequence[np.ndarray], eyes: Eyes) -> np.ndarray:
        """Returns what replaces a picture's placeholders, [placeholders, D].

        Args:
          features: what the tower and the aligner make of each of its squares, [tokens, D].
        """
        del picture, eyes
        return features[0]

    def numbered(self, picture: Picture, first: int, most: int) -> np.ndarray:
        """Returns which features of a row of pictures replace a picture's placeholders, int
        [placeholders]: as `arranged`, of numbers.

        Args:
          first: the squares of the row before this picture's.
          most: all squares of the row, behind whose features are those of no square.
        """
        del picture, most
        n = self.vision.tower.n_tokens + (1 if self.vision.flow else 0)
        return first * n + np.arange(n)

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
        check_asked(messages, thinking, tools)
        user, assistant = map(self._mark, self.roles)
        said = [each.content for each in messages if each.role == "system"] or [SYSTEM]
        written: Written = [*self._mark(self.vocabulary.bos)]
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
        return self._joined([*written, *assistant, ":"])

    def _joined(self, written: Written) -> list[int]:
        """Encodes the texts, each with those that it follows directly."""
        coder = self.vocabulary.coder
        ids: list[int] = []
        for is_text, pieces in itertools.groupby(written, lambda piece: isinstance(piece, str)):
            some = list(pieces)
            ids += coder.encode("".join(some)) if is_text else itertools.chain(*some)  # type: ignore
        return ids

    def _mark(self, name: str | None) -> Written:
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
