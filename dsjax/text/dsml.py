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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dsjax.text.tool_calls import Control
from dsjax.text.vocabulary import END_THINK, THINK

DSML = "\uff5cDSML\uff5c"
_BEGIN, _END = f"<{DSML}function_calls>", f"</{DSML}function_calls>"
_CALL = re.compile(
    rf'<{DSML}invoke name="(?P<name>[^"]*)">\n(?P<body>.*?)\n?</{DSML}invoke>', re.DOTALL
)
_ARGUMENT = re.compile(
    rf'<{DSML}parameter name="(?P<key>[^"]*)" string="(?P<string>true|false)">(?P<value>.*?)'
    rf"</{DSML}parameter>",
    re.DOTALL,
)


class Call(NamedTuple):
    """A call that a reply makes."""

    name: str
    arguments: str  # a JSON object


def describe(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what the system's message says about tools, given in OpenAI's form."""
    schemas = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = "\n".join(
        [
            _BEGIN,
            f'<{DSML}invoke name="$FUNCTION_NAME">',
            f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE'
            f"</{DSML}parameter>",
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
      ValueError: the arguments of a call are not a JSON object.
    """
    parts = _marked(f"\n\n{_BEGIN}\n")
    for call in calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            values = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise ValueError(f"the arguments of the call of {name} are not JSON: {error}") from None
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
    begin = f'<{DSML}parameter name="{key}" string="{"true" if is_text else "false"}">'
    return [*_marked(begin), text, *_marked(f"</{DSML}parameter>")]


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


def _marked(markup: str) -> list[str]:
    """Splits markup of ours at its tokens. What others wrote is never split: it stays text."""
    pieces = re.split(f"({DSML}|{THINK}|{END_THINK})", markup)
    return [Control(piece) if piece in (DSML, THINK, END_THINK) else piece for piece in pieces]


def read_calls(text: str) -> tuple[str, list[Call]]:
    """Splits a reply, without its thought, into what it says and the calls it makes. Text that only
    looks like calls (an element is not closed, a value is not JSON) stays text.
    """
    said, begin, rest = text.partition(_BEGIN)
    marked, end, after = rest.partition(_END)
    found = [_read(match) for match in _CALL.finditer(marked)]
    calls = [call for call in found if call is not None]
    if not begin or not end or after.strip() or not calls or len(calls) < len(found):
        return text, []
    return said.removesuffix("\n\n"), calls


def _read(match: re.Match[str]) -> Call | None:
    values: dict[str, Any] = {}
    for argument in _ARGUMENT.finditer(match["body"]):
        try:
            is_text = argument["string"] == "true"
            values[argument["key"]] = (
                argument["value"] if is_text else json.loads(argument["value"])
            )
        except json.JSONDecodeError:
            return None
    return Call(match["name"], json.dumps(values, ensure_ascii=False))
