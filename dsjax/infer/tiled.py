r"""Conversations with pictures, as DeepSeek-VL2 was trained on them.

  [begin] system  "<|User|>: " text "\n\n" "<|Assistant|>:"  text [end]  "<|User|>: " ...

Nothing separates the system message, which there is none of by default, from the first turn, nor a
reply from the colon before it; the reply's tokens are its own. A picture is as many `<image>` as
it has embeddings (tiles.py). It stands where the message spells `<image>`, if it does so once for
each of its pictures; else pictures come first, each with a line break.

Marks of places (`<|ref|>` and so on) are recognised in messages; what spells another control token
stays text, where DeepSeek's processor would take it for the token.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dsjax.infer.pictured import PICTURES, PicturedFormat, Written, check_asked
from dsjax.text.added_tokens import IMAGE, MARKS
from dsjax.text.chat import Message
from dsjax.vision import pictures, tiles
from dsjax.vision.eyes import Eyes
from dsjax.vision.pictures import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

_MARKS = re.compile(f"({'|'.join(map(re.escape, MARKS))})")


class TiledFormat(PicturedFormat):
    """The conversation format of one checkpoint that sees tiles."""

    gap: ClassVar[str] = ""

    @property
    def image_token(self) -> int:
        return self.vocabulary.coder.control[IMAGE]

    def _seen(self, picture: Image, place: str) -> Picture:
        return tiles.cut(picture, self.rules, place)

    def outline(self, read: Callable[[], bytes], place: str) -> Picture:
        return tiles.outline(pictures.size_of(read(), place), self.rules, place)

    def shown(self, messages: Sequence[Message]) -> list[Picture]:
        return tiles.uncut(super().shown(messages))

    def arranged(self, picture: Picture, features: Sequence[np.ndarray], eyes: Eyes) -> np.ndarray:
        newline_D, separator_D = (
            np.asarray(each[...], np.float32) for each in (eyes.newline, eyes.separator)
        )
        return tiles.arranged(features, picture.grid, newline_D, separator_D)

    def grids(self, prompt: Sequence[int]) -> list[tiles.Grid]:
        """Returns how the tiles of each picture of an encoded conversation lie: the number of its
        placeholders, which follow each other, tells.

        Raises:
          ValueError: no picture has as many, or pictures of several grids have.
        """
        sizes = [(wide // self.rules.size, high // self.rules.size)
                 for wide, high in self.rules.resolutions]  # fmt: skip
        found = []
        for is_picture, run in itertools.groupby(prompt, lambda id_: id_ == self.image_token):
            n = len(list(run))
            if not is_picture:
                continue
            fit = [grid for grid in sizes if tiles.n_embeddings(grid, self.vision.view_side) == n]
            if len(fit) != 1:
                raise ValueError(
                    f"{n} placeholders stand beside each other, which does not tell one picture's "
                    "tiles; put text between two pictures, or give the pictures: --image FILE"
                )
            found += fit
        return found

    def numbered(self, picture: Picture, first: int, most: int) -> np.ndarray:
        n = self.vision.view_side**2
        numbers = (first * n + np.arange(len(picture.squares) * n)).reshape(-1, n, 1)
        newline, separator = (most * n + np.arange(2))[:, None]
        return tiles.arranged(list(numbers), picture.grid, newline, separator)[:, 0]

    def encode(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Encodes a conversation up to the point where the reply begins.

        Raises:
          ValueError: thinking or tools were requested, or a message spells `<image>` another number
            of times than it has pictures.
        """
        check_asked(messages, thinking, tools)
        user, assistant = map(self._mark, self.roles)
        shown = iter(self.shown(messages))
        written: Written = [*self._mark(self.vocabulary.bos)]
        for message in messages:
            if message.role == "user":
                said = list(self._said(message, shown))
                written += [*user, *([": ", *said, "\n\n"] if said else [":"]), *assistant, ":"]
            elif message.role == "assistant":
                written += [
                    *self._marked(message.content.strip()),
                    *self._mark(self.vocabulary.eos),
                ]
            else:
                written += self._marked(message.content.strip())
            written.append([])  # what follows is encoded on its own
        return self._joined(written)

    def _said(self, message: Message, shown: Iterator[Picture]) -> Iterator[str | list[int]]:
        """Yields what a user's message says, its pictures taken from `shown`."""
        n, text = len(message.fields.get(PICTURES, ())), message.content
        if n and IMAGE not in text:
            text = n * f"{IMAGE}\n" + text
        places = text.strip().split(IMAGE) if n else [text.strip()]
        if n and len(places) != n + 1:
            raise ValueError(
                f"the message spells {IMAGE} {len(places) - 1} times and has {n} pictures; spell "
                "it once for each, or not at all"
            )
        for number, part in enumerate(places):
            if number:
                grid = next(shown).grid
                yield [self.image_token] * tiles.n_embeddings(grid, self.vision.view_side)
            yield from self._marked(part)

    def _marked(self, text: str) -> Written:
        """Returns a text with its marks as control tokens."""
        control = self.vocabulary.coder.control
        return [[control[part]] if part in MARKS else part for part in _MARKS.split(text) if part]
