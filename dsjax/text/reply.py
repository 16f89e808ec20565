"""A reply as it comes: whole characters, stop strings, and the thought apart from the answer.

Tokens are pieces of bytes, so a text cannot simply be decoded token by token: a character may span
several, a stop string too, and what has been shown cannot be taken back. Each stage here holds back
the end of its text for as long as what comes next may change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dsjax.text.tokenizer import Coder

_REPLACEMENT = "\ufffd"  # what decoders make of bytes that are no character (yet)
_LONGEST_HALF = 3  # bytes that a character can lack


class Piece(NamedTuple):
    """Some text of a reply."""

    text: str
    thought: bool  # part of what stands between <think> and </think>


class Detokenizer:
    """Decodes a stream of tokens; what it returns adds up to the text of all of them."""

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        # Decoders can drop a space before the first token, so a few that are out are decoded again.
        self._ids: list[int] = []
        self._context = 0  # how many of `_ids` lie before the last whole character
        self._shown = 0  # characters of their text that are out

    def push(self, ids: Sequence[int]) -> str:
        """The text that became certain with these tokens; special tokens have none."""
        if not ids:
            return ""
        self._ids += ids
        text = self._coder.decode(self._ids)
        half = len(text) - len(text.rstrip(_REPLACEMENT))
        stable = max(len(text) - min(half, _LONGEST_HALF), self._shown)
        new, self._shown = text[self._shown : stable], stable
        if not half:
            self._ids = self._ids[self._context :]
            self._context = len(self._ids)
            self._shown = len(self._coder.decode(self._ids))
        return new

    def flush(self) -> str:
        """The rest, with U+FFFD for a character that was never finished; then starts afresh."""
        rest = self._coder.decode(self._ids)[self._shown :]
        self._ids, self._context, self._shown = [], 0, 0
        return rest


class StopStrings:
    """Passes text on up to the first stop string, which itself never shows.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty; give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can no longer be part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The rest, which turned out to be no stop string."""
        rest, self._held = self._held, ""
        return rest


class ReplyReader:
    """Turns the tokens of a reply into pieces of text.

    <think> and </think> are known by their ids: the same characters spelled by other tokens are
    text. A stop string ends a reply in its thought as well as in its answer.

    Args:
      think_ids: ids of <think> and </think>; None for a model without them.
      prompt: the ids that the reply follows; they may have opened the thought already.
      stops: see `StopStrings`.
    """

    def __init__(
        self,
        coder: Coder,
        think_ids: tuple[int, int] | None = None,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
    ) -> None:
        self._think_id, self._end_think_id = think_ids or (None, None)
        marks = [i for i in prompt if i in (self._think_id, self._end_think_id)]
        self._thought = marks[-1:] == [self._think_id]
        self._detokenizer = Detokenizer(coder)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.stopped

    def push(self, ids: Sequence[int]) -> list[Piece]:
        """The text that became certain with these tokens."""
        pieces: list[Piece] = []
        start = 0
        for index, token in enumerate(ids):
            if token in (self._think_id, self._end_think_id):
                self._add(pieces, self._detokenizer.push(ids[start:index]))
                pieces += self.flush()
                self._thought = token == self._think_id
                start = index + 1
        self._add(pieces, self._detokenizer.push(ids[start:]))
        return pieces

    def flush(self) -> list[Piece]:
        """The rest, after the last token."""
        pieces: list[Piece] = []
        self._add(pieces, self._detokenizer.flush())
        if rest := self._stops.flush():
            pieces.append(Piece(rest, self._thought))
        return pieces

    def _add(self, pieces: list[Piece], text: str) -> None:
        if text := self._stops.push(text):
            pieces.append(Piece(text, self._thought))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
