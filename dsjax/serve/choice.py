"""The tokens of one choice as they arrive, as text, thought, calls of tools and log-probabilities.

A choice ends at a stop id or stop string, at its limit, at the end of its calls, or because the
server cuts it off; tokens that the engine has drawn beyond that are neither shown nor counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsjax.generate.record import Record
from dsjax.generate.request import Output
from dsjax.text import dsml
from dsjax.text.reply import ReplyReader, opens_thought
from dsjax.text.tokenizer import Coder
from dsjax.text.tool_calls import CALLS, END_CALLS, CallPiece, CallReader

CUT = "insufficient_system_resource"


class Likely(NamedTuple):
    """A token and its log-probability."""

    token: int
    logprob: float


class TokenReport(NamedTuple):
    """A token of the reply, with the most likely ones at its place."""

    token: int
    logprob: float
    top: list[Likely]
    thought: bool


@dataclasses.dataclass
class Delta:
    """What some tokens add to a choice."""

    content: str = ""
    thought: str = ""
    calls: list[CallPiece] = dataclasses.field(default_factory=list)
    reports: list[TokenReport] = dataclasses.field(default_factory=list)
    finish: str | None = None

    def __bool__(self) -> bool:
        return bool(
            self.content or self.thought or self.calls or self.reports or self.finish is not None
        )


class Choice:
    """Reads the engine's outputs for one choice.

    Args:
      think_ids: ids of <think> and </think>; None: they are no tokens, or are to be text.
      prompt: the ids before the reply, which may have opened a thought.
      fenced: the form of calls, see `CallReader`; None: the reply may not call tools by tokens.
      marked: whether the reply may call tools in V3.2's markup.
      within_calls: the tokens of a call that the prompt has begun.
      top: how many likely tokens to report; None: nothing of tokens is reported.
    """

    def __init__(
        self,
        coder: Coder,
        *,
        prompt: Sequence[int],
        stop_ids: frozenset[int],
        think_ids: tuple[int, int] | None = None,
        stops: Sequence[str] = (),
        fenced: bool | None = None,
        marked: bool = False,
        within_calls: Sequence[int] = (),
        top: int | None = None,
    ) -> None:
        self._reader = ReplyReader(coder, think_ids, prompt, stops, dsml.MARKS if marked else ())
        self._think_ids: tuple[int, ...] = think_ids or ()
        self._thinking = opens_thought(prompt, think_ids)
        # Whether nothing of the thought (True) or of the answer after one (False) is there yet.
        self._blank: bool | None = True if self._thinking else None
        self._stop_ids = stop_ids
        self._coder, self._fenced = coder, fenced
        self._begin_calls = coder.control.get(CALLS) if fenced is not None else None
        self._end_calls = coder.control.get(END_CALLS)
        self._calls: CallReader | None = None
        self._marked = dsml.CallReader()
        self._top = top
        self.finish: str | None = None
        self.n_tokens = 0  # of the reply, its stop id included
        self.n_thought = 0  # of these, in the thought, with its end
        for token in within_calls:
            self._push(token, Delta())

    def push(self, output: Output) -> Delta:
        """Returns what an output of the engine adds."""
        delta = Delta()
        for place, token in enumerate(output.tokens):
            if self.finish is not None:
                break
            self.n_tokens += 1
            self.n_thought += self._thinking or token in self._think_ids
            if token in self._stop_ids:
                self._end("stop", delta)
                break
            if self._top is not None:
                delta.reports.append(self._report(token, output.report, place, self._top))
            self._push(token, delta)
            if self._reader.stopped:
                self._end("stop", delta)
        if self.finish is None and output.finish is not None:
            self._end(output.finish, delta)
        return delta

    def cut(self) -> Delta:
        """Ends the choice, because the server does."""
        delta = Delta()
        self._end(CUT, delta)
        return delta

    def _push(self, token: int, delta: Delta) -> None:
        if self._calls is not None:
            delta.calls += self._calls.push(token)
            if token == self._end_calls:
                self._end("tool_calls", delta)
        elif token == self._begin_calls and not self._thinking:
            self._add(delta, flush=True)
            self._calls = CallReader(self._coder, fenced=bool(self._fenced))
            self._calls.push(token)
        else:
            self._add(delta, token)
            if token in self._think_ids:
                self._thinking = self._blank = token == self._think_ids[0]
            self._add_marked(delta)
            if self._marked.ended:
                self._end("tool_calls", delta)

    def _add(self, delta: Delta, *tokens: int, flush: bool = False) -> None:
        for text, thought in self._reader.flush() if flush else self._reader.push(tokens):
            # Models write line breaks around a thought, which the API's fields do not have.
            text = text.lstrip("\n") if self._blank == thought else text
            if not text:
                continue
            if thought:
                delta.thought += text
            else:
                delta.content += text
            self._blank = None

    def _add_marked(self, delta: Delta) -> None:
        delta.calls += self._marked.push(self._reader.take_calls())

    def _end(self, finish: str, delta: Delta) -> None:
        if self._calls is not None:
            delta.calls += self._calls.flush()
        else:
            self._add(delta, flush=True)
            self._add_marked(delta)
            if not self._marked.count and not self._reader.stopped:
                delta.content += self._marked.text  # it only looked like calls
        n_calls = (self._calls or self._marked).count
        # A reply that stops by itself within its calls has made those that are whole.
        finish = "tool_calls" if finish == "stop" and n_calls else finish
        delta.finish = self.finish = finish

    def _report(self, token: int, report: Record, place: int, top: int) -> TokenReport:
        likely = zip(report.top_ids[place][:top], report.top_logprobs[place][:top], strict=True)
        return TokenReport(
            token,
            finite_logprob(report.logprobs[place]),
            [Likely(int(each), finite_logprob(logprob)) for each, logprob in likely],
            self._thinking,
        )


def finite_logprob(logprob: float) -> float:
    """Returns a number that JSON can hold, as OpenAI's API does for what is impossible; the same
    for NaN.
    """
    return float(np.fmax(logprob, -9999.0))
