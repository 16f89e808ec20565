"""Calls of tools as DeepSeek-V3.2 writes them: marked up, one element per argument.

  <|DSML|function_calls>
  <|DSML|invoke name="NAME">
  <|DSML|parameter name="KEY" string="true">TEXT</|DSML|parameter>
  <|DSML|parameter name="KEY" string="false">JSON</|DSML|parameter>
  </|DSML|invoke>
  </|DSML|function_calls>

The bars are fullwidth, and |DSML| is a token of its own. Two line breaks precede the whole. Results
come as `<result>` elements in `<function_results>`, after which the reply goes on, with a thought
if the model thinks.

Source: the encoding script that DeepSeek published with V3.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsjax import files
from dsjax.text.reply import StopStrings
from dsjax.text.tokenizer import Coder
from dsjax.text.tool_calls import CallPiece, Control
from dsjax.text.vocabulary import END_THINK, THINK

DSML = "\uff5cDSML\uff5c"
_BEGIN, _END = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
MARKS = (f"\n\n{_BEGIN}", _BEGIN)  # of which one begins the calls
END_ARGUMENT = f"</{DSML}parameter>"
# What a reply that must call begins with, up to a name, and what ends its one call.
BEGIN_CALL = f'\n\n{_BEGIN}\n<{DSML}invoke name="'
END_CALLS = f"</{DSML}invoke>\n{_END}"
_CALL = re.compile(f'<{DSML}invoke name="(?P<name>[^"]*)">|{_END}')
_ARGUMENT = re.compile(
    f'<{DSML}parameter name="(?P<key>[^"]*)" string="(?P<string>true|false)">|</{DSML}invoke>'
)


def describe(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what the system's message says about tools, given in OpenAI's form."""
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = "\n".join(
        [
            _BEGIN,
            f'<{DSML}invoke name="$FUNCTION_NAME">',
            f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE'
            f"{END_ARGUMENT}",
            "...",
            f"</{DSML}invoke>",
            f'<{DSML}invoke name="$FUNCTION_NAME2">',
            "...",
            f"</{DSML}invoke>",
            _END,
        ]
    )
    lines = [
        "## Tools",
        "You have access to a set of tools you can use to answer the user's question.",
        f'You can invoke functions by writing a "{_BEGIN}" block like the following as part of '
        "your reply to the user:",
        example,
        "String and scalar parameters should be specified as is without any escaping or quotes, "
        'while lists and objects should use JSON format. The "string" attribute should be set to '
        '"true" for string type parameters and "false" for other types (numbers, booleans, arrays, '
        "objects).",
        "If the thinking_mode is enabled, then after function results you should strongly consider "
        "outputting a thinking block. Here is an example:",
        f"{_BEGIN}\n...\n{_END}",
        "<function_results>\n...\n</function_results>",
        f"{THINK}...thinking about results{END_THINK}",
        "Here are the functions available in JSONSchema format:\n<functions>\n",
    ]
    return [*_marked("\n".join(lines)), schemas, "\n</functions>\n"]


def write_calls(calls: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the calls of a reply, given in OpenAI's form, as texts and control tokens.

    Raises:
      ValueError: the arguments of a call are not a JSON object, see `files.parse`.
    """
    parts = _marked(f"\n\n{_BEGIN}\n")
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        values = files.parse(arguments.encode(), f"the text of the arguments of {name}")
        if not isinstance(values, dict):
            raise ValueError(f"the arguments of the call of {name} are not a JSON object")
        parts += _marked(f'<{DSML}invoke name="{name}">\n')
        for number, (key, value) in enumerate(values.items()):
            parts += ["\n"] if number else []
            parts += _argument(key, value)
        parts += _marked(f"\n</{DSML}invoke>\n")
    return [*parts, *_marked(_END)]


def _argument(key: str, value: Any) -> list[str]:
    is_text = isinstance(value, str)
    text = value if is_text else json.dumps(value, ensure_ascii=False)
    return [*_marked(begin_argument(key, text=is_text)), text, *_marked(END_ARGUMENT)]


def begin_argument(key: str, *, text: bool) -> str:
    """Returns what stands before an argument's value, a text or JSON."""
    return f'<{DSML}parameter name="{key}" string="{"true" if text else "false"}">'


def write_results(results: Sequence[str]) -> list[str]:
    """Returns the results of the calls before them."""
    elements = "".join(f"\n<result>{result}</result>" for result in results)
    return [f"\n\n<function_results>{elements}\n</function_results>\n\n"]


def as_tokens(parts: Sequence[str], control: Mapping[str, int]) -> list[str]:
    """Joins texts that follow one another, and names of tokens that a tokenizer lacks, which are
    text to it.
    """
    joined: list[str] = []
    for part in parts:
        if isinstance(part, Control) and part in control:
            joined.append(part)
        elif joined and not isinstance(joined[-1], Control):
            joined[-1] += part
        else:
            joined.append(str(part))
    return joined


def encode(markup: str, coder: Coder) -> list[int]:
    """Encodes markup of ours."""
    ids: list[int] = []
    for part in as_tokens(_marked(markup), coder.control):
        ids += [coder.control[part]] if isinstance(part, Control) else coder.encode(part)
    return ids


def _marked(markup: str) -> list[str]:
    """Splits markup of ours at its tokens. What others wrote is never split: it stays text."""
    pieces = re.split(f"({DSML}|{THINK}|{END_THINK})", markup)
    return [Control(piece) if piece in (DSML, THINK, END_THINK) else piece for piece in pieces]


class CallReader:
    """Reads the calls in a stream of text that begins with one of `MARKS`.

    Arguments are passed on as they come, as a JSON object: texts are quoted, other values are taken
    as they are written, and are JSON if the model has written it.

    Attributes:
      ended: whether the calls are over.
      text: what has been read, up to the first call; a reply that never gets that far is text.
    """

    def __init__(self) -> None:
        self.ended, self.text = False, ""
        self._read: Callable[[], CallPiece | None] = self._call
        self._unread = ""
        self._index = -1
        self._n_arguments = 0
        self._quoted = False  # whether the argument is a text
        self._value = StopStrings([END_ARGUMENT])

    @property
    def count(self) -> int:
        """Counts the calls begun so far, with a name."""
        return self._index + 1

    def push(self, text: str) -> list[CallPiece]:
        """Returns what this text completes."""
        self._unread += text
        if not self.count:
            self.text += text
        pieces: list[CallPiece] = []
        while not self.ended and (piece := self._read()) is not None:
            pieces += [piece] if piece.name is not None or piece.arguments else []
        return pieces

    def _call(self) -> CallPiece | None:
        """Reads up to the name of a call, or the end of all."""
        match = self._find(_CALL)
        if match is None:
            return None
        if match["name"] is None:
            self.ended = self.count > 0
            return self._more("")
        self._index += 1
        self._n_arguments, self._read = 0, self._argument
        return CallPiece(self._index, match["name"], "")

    def _argument(self) -> CallPiece | None:
        """Reads up to the value of an argument, or the end of the call."""
        match = self._find(_ARGUMENT)
        if match is None:
            return None
        begin = "" if self._n_arguments else "{"
        if match["key"] is None:
            self._read = self._call
            return self._more(begin + "}")
        self._quoted = match["string"] == "true"
        self._value, self._read = StopStrings([END_ARGUMENT]), self._rest_of_value
        begin = ", " if self._n_arguments else begin
        self._n_arguments += 1
        quote = '"' if self._quoted else ""
        return self._more(f"{begin}{json.dumps(match['key'], ensure_ascii=False)}: {quote}")

    def _rest_of_value(self) -> CallPiece | None:
        """Reads a value as far as it has come."""
        if not self._unread:
            return None
        text, self._unread = self._value.push(self._unread), ""
        end = ""
        if self._value.stopped:
            self._unread, self._read = self._value.rest, self._argument
            end = '"' if self._quoted else ""
        return self._more(
            (json.dumps(text, ensure_ascii=False)[1:-1] if self._quoted else text) + end
        )

    def _find(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.search(self._unread)
        if match is not None:
            self._unread = self._unread[match.end() :]
        return match

    def _more(self, arguments: str) -> CallPiece:
        return CallPiece(self._index, None, arguments)
