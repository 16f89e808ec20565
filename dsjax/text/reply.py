"""Streaming replies: whole characters, stop strings, and the thought separate from the answer.

Text cannot be decoded token by token: a character or a stop string may span several tokens, and
text that has been shown cannot be taken back. Each stage holds back the end of its text as long as
later tokens may change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dsjax.text.tokenizer import Coder

_REPLACEMENT = "\ufffd"  # decodes from bytes that are not (yet) a character
_LONGEST_HALF = 3  # bytes of an incomplete UTF-8 character, at most
# Tokens without the end of a character, of which only the last few are decoded again.
_MOST_OPEN, _KEPT_OPEN = 64, 16


class Piece(NamedTuple):
    """Part of a reply's text."""

    text: str
    thought: bool  # lies between <think> and </think>


class Detokenizer:
    """Decodes a stream of tokens. The returned strings concatenate to the text of all tokens."""

    def __init__(self, coder: Coder) -> None:
        self._coder = coder
        # Some decoders drop a space before the first token, so a few tokens that have already been
        # returned are decoded again as context.
        self._ids: list[int] = []
        self._context = 0  # how many of `_ids` end with the last whole character
        self._shown = 0  # characters of their text that have been returned

    def push(self, ids: Sequence[int]) -> str:
        """Returns the text that these tokens complete; special tokens have none."""
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
        elif len(self._ids) > _MOST_OPEN:
            self._forget(text, len(text) - stable)
        return new

    def _forget(self, text: str, held: int) -> None:
        """Forgets the beginning of bytes that are no characters, which a reply may have without
        end, unless what is held back of their text would be decoded otherwise without it.
        """
        rest = self._coder.decode(self._ids[-_KEPT_OPEN:])
        if len(rest) > _LONGEST_HALF and text.endswith(rest[-_LONGEST_HALF - 1 :]):
            self._ids = self._ids[-_KEPT_OPEN:]
            self._context, self._shown = 0, len(rest) - held

    def flush(self) -> str:
        """Returns the rest, with U+FFFD for an incomplete character, and resets."""
        rest = self._coder.decode(self._ids)[self._shown :]
        self._ids, self._context, self._shown = [], 0, 0
        return rest


class StopStrings:
    """Passes text on until the first stop string, which is removed.

    Attributes:
      rest: the text from the stop string on, itself included.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty; give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped, self.rest = False, ""

    def push(self, text: str) -> str:
        """Returns the text that can no longer be part of a stop string."""
        if self.stopped:
            self.rest += text
            return ""
        text = self._held + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held, self.rest = True, "", text[min(found) :]
            return text[: min(found)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Returns the rest, which turned out not to be a stop string."""
        rest, self._held = self._held, ""
        return rest


def opens_thought(prompt: Sequence[int], think_ids: tuple[int, int] | None) -> bool:
    """Tells whether a prompt ends inside a thought.

    Args:
      think_ids: ids of <think> and </think>; None for a model without them.
    """
    if think_ids is None:
        return False
    return [token for token in prompt if token in think_ids][-1:] == [think_ids[0]]


class ReplyReader:
    """Turns the tokens of a reply into pieces of text.

    <think> and </think> are recognised by their ids; the same characters spelled by other tokens
    are text. A stop string ends the reply in the thought as well as in the answer.

    Args:
      think_ids: ids of <think> and </think>; None for a model without them.
      prompt: the ids before the reply, which may already have opened the thought.
      stops: see `StopStrings`.
      marks: texts that end what the answer says and begin its calls of tools, where these are not
        told by tokens; see `take_calls`.
    """

    def __init__(
        self,
        coder: Coder,
        think_ids: tuple[int, int] | None = None,
        prompt: Sequence[int] = (),
        stops: Sequence[str] = (),
        marks: Sequence[str] = (),
    ) -> None:
        self._think_id, self._end_think_id = think_ids or (None, None)
        self._thought = opens_thought(prompt, think_ids)
        self._detokenizer = Detokenizer(coder)
        self._stops, self._marks = StopStrings(stops), StopStrings(marks)

    @property
    def stopped(self) -> bool:
        """Tells whether a stop string has occurred."""
        return self._stops.stopped

    def push(self, ids: Sequence[int]) -> list[Piece]:
        """Returns the text that these tokens complete."""
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
        """Returns the rest, after the last token."""
        pieces: list[Piece] = []
        self._add(pieces, self._detokenizer.flush())
        self._end(pieces, self._marks.flush())
        if rest := self._stops.flush():
            pieces.append(Piece(rest, self._thought))
        return pieces

    def take_calls(self) -> str:
        """Returns what has come since the last time of the text from a mark on, itself included."""
        text, self._marks.rest = self._marks.rest, ""
        return text

    def _add(self, pieces: list[Piece], text: str) -> None:
        self._end(pieces, text if self._thought else self._marks.push(text))

    def _end(self, pieces: list[Piece], text: str) -> None:
        if text := self._stops.push(text):
            pieces.append(Piece(text, self._thought))


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
