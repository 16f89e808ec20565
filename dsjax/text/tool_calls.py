"""Calls of tools in DeepSeek's own formats: written into a prompt, and read from a reply.

  V3, R1   [calls] [call] "function" [sep] NAME, a line with ```json, ARGUMENTS, ``` [/call] ...
  V3.1     [calls] [call] NAME [sep] ARGUMENTS [/call] ... [/calls]

R1 means R1-0528; the first R1 was not trained to call tools. V3 and R1 put results between tokens
for all of them, V3.1 does not. The instructions before V3.1's tools are those of its model card;
V3 and R1 have none of their own, so theirs are ours.

Sources: the chat templates that DeepSeek released with V3, R1-0528 and V3.1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsjax.text.reply import Detokenizer, StopStrings
from dsjax.text.tokenizer import Coder

CALLS = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
END_CALLS = "<\uff5ctool\u2581calls\u2581end\uff5c>"
CALL = "<\uff5ctool\u2581call\u2581begin\uff5c>"
END_CALL = "<\uff5ctool\u2581call\u2581end\uff5c>"
SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
RESULTS = "<\uff5ctool\u2581outputs\u2581begin\uff5c>"
END_RESULTS = "<\uff5ctool\u2581outputs\u2581end\uff5c>"
RESULT = "<\uff5ctool\u2581output\u2581begin\uff5c>"
END_RESULT = "<\uff5ctool\u2581output\u2581end\uff5c>"

KIND = "function"
_FENCE, _END_FENCE = "```json\n", "\n```"


class Control(str):
    """The name of a control token; a plain str is text."""


def can_call(coder: Coder) -> bool:
    """Tells whether a tokenizer has the tokens of calls and results."""
    needed = {CALLS, END_CALLS, CALL, END_CALL, SEPARATOR, RESULT, END_RESULT}
    return needed <= coder.control.keys()


def describe(tools: Sequence[Mapping[str, Any]], *, fenced: bool) -> list[str]:
    """Returns the instructions that follow the system's message, as text and control tokens.

    Args:
      tools: in OpenAI's form, `{"type": "function", "function": {"name", ...}}`.
      fenced: whether the format is V3's rather than V3.1's.
    """
    parts: list[str] = ["\n\n## Tools\nYou have access to the following tools:\n"]
    for tool in tools:
        function = tool["function"]
        parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        about = function.get("description") or ""
        parts.append(
            f"\n### {function['name']}\nDescription: {about}\n\nParameters: {parameters}\n"
        )
    parts.append("\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n")
    parts.append(Control(CALLS))
    parts += write_call("tool_call_name", "tool_call_arguments", fenced=fenced)
    parts += ["{additional_tool_calls}", Control(END_CALLS)]
    parts.append(
        "\n\nWhere:\n\n- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters "
        "Schema\n- For multiple tool calls, chain them directly without separators or spaces\n"
    )
    return parts


def write_call(name: str, arguments: str, *, fenced: bool) -> list[str]:
    """Returns one call."""
    if not fenced:
        return [Control(CALL), name, Control(SEPARATOR), arguments, Control(END_CALL)]
    body = f"{name}\n{_FENCE}{arguments}{_END_FENCE}"
    return [Control(CALL), KIND, Control(SEPARATOR), body, Control(END_CALL)]


def write_calls(calls: Sequence[Mapping[str, Any]], *, fenced: bool) -> list[str]:
    """Returns the calls of a reply, given in OpenAI's form."""
    parts: list[str] = [Control(CALLS)]
    for number, call in enumerate(calls):
        function = call["function"]
        parts += ["\n"] if fenced and number else []
        parts += write_call(function["name"], function["arguments"], fenced=fenced)
    return [*parts, Control(END_CALLS)]


def write_results(results: Sequence[str], *, fenced: bool) -> list[str]:
    """Returns the results of the calls before them."""
    parts: list[str] = [Control(RESULTS)] if fenced else []
    for number, result in enumerate(results):
        parts += ["\n"] if fenced and number else []
        parts += [Control(RESULT), result, Control(END_RESULT)]
    return [*parts, *([Control(END_RESULTS)] if fenced else [])]


class CallPiece(NamedTuple):
    """Part of a call: the first has the name, the others more of the arguments."""

    number: int  # of the call, from 0
    name: str | None
    arguments: str


class CallReader:
    """Reads the calls in a stream of tokens, from the token that begins them.

    The tokens of calls are recognised by their ids. Arguments are passed on as they come; what of
    V3's fence may still follow is held back.

    Args:
      fenced: whether the format is V3's rather than V3.1's.
    """

    def __init__(self, coder: Coder, *, fenced: bool) -> None:
        self._ids = {coder.control[name]: name for name in (CALLS, CALL, SEPARATOR, END_CALL,
                                                            END_CALLS)}  # fmt: skip
        self._fenced = fenced
        self._detokenizer = Detokenizer(coder)
        self._index = -1
        self._part = ""  # the control token that the current text follows
        self._text = ""  # of this part, unread
        self._named = False
        self._fence = StopStrings([_END_FENCE])

    @property
    def count(self) -> int:
        """Counts the calls begun so far, with a name."""
        return self._index + 1

    def push(self, token: int) -> list[CallPiece]:
        """Returns what this token completes."""
        name = self._ids.get(token)
        if name is None:
            self._text += self._detokenizer.push([token])
            return self._read()
        self._text += self._detokenizer.flush()
        pieces = self._read(ended=True)
        self._part, self._text = name, self._text if name == SEPARATOR else ""
        if name == CALL:
            self._named, self._fence = False, StopStrings([_END_FENCE])
        if name == SEPARATOR and not self._fenced:
            pieces += self._name(self._text)
            self._text = ""
        elif name == SEPARATOR:
            self._text = ""
        return pieces

    def flush(self) -> list[CallPiece]:
        """Returns the rest of a reply that ends within a call."""
        self._text += self._detokenizer.flush()
        return self._read(ended=True)

    def _name(self, text: str) -> list[CallPiece]:
        self._named = True
        self._index += 1
        return [CallPiece(self._index, text.strip(), "")]

    def _read(self, *, ended: bool = False) -> list[CallPiece]:
        """Reads the text of the current part as far as it is certain."""
        if self._part != SEPARATOR:
            return []  # the name of V3.1, until it is whole; or what stands between calls
        pieces: list[CallPiece] = []
        if self._fenced and not self._named:
            name, line, rest = self._text.partition("\n")
            fence = rest[: len(_FENCE)]
            if not line or (not _FENCE.startswith(fence) and not ended):
                return []
            if len(rest) < len(_FENCE) and not ended:
                return []
            pieces, self._text = self._name(name), rest.removeprefix(_FENCE)
        text, self._text = self._text, ""
        if self._fenced:
            text = self._fence.push(text) + (self._fence.flush() if ended else "")
        if text:
            pieces.append(CallPiece(self._index, None, text))
        return pieces
