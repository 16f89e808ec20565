"""What binds a reply that must call a tool in V3.2's markup, see dsjax/text/dsml.py.

A call has an element per argument, so a grammar does too, in the order of the schema's properties.
The values of plain texts stand as they are; others are JSON that suits the property's schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.serve.fields import invalid
from dsjax.serve.grammar import OPTIONS
from dsjax.text import dsml
from dsjax.text.tokenizer import Coder

# Keys of a schema that leave a text as free as it was.
_PLAIN = {"type", "description", "title", "default", "examples", "deprecated", "enum", "const"}
_DEFINITIONS = ("$defs", "definitions")


def opening(coder: Coder) -> list[int]:
    """Returns the tokens that begin a call, up to its name."""
    return dsml.encode(dsml.BEGIN_CALL, coder)


def call_grammar(functions: Sequence[Mapping[str, Any]]) -> str:
    """Returns what must follow `opening`: a call of one of the functions, with arguments that suit
    its schema; in llguidance's Lark notation.

    Raises:
      ApiError: 422, a schema does not list properties, names one with a quote, or names those
        required otherwise than in a list.
    """
    rules: list[str] = []
    for number, function in enumerate(functions):
        rules += _call(number, function)
    calls = " | ".join(f"call{number}" for number in range(len(functions)))
    return "\n".join([f"start: {calls}", *rules])


def _call(number: int, function: Mapping[str, Any]) -> list[str]:
    name, schema = function["name"], function["parameters"]
    properties = schema.get("properties", {})
    if schema.get("type", "object") != "object" or not isinstance(properties, dict):
        raise invalid(
            "tools",
            f"cannot bind a call of {name}: its parameters must be an object with properties, as "
            "the model's format has an element for each; or leave tool_choice at auto",
        )
    needed = schema.get("required", [])
    if not isinstance(needed, list) or not all(isinstance(each, str) for each in needed):
        raise invalid(
            "tools",
            f"cannot bind a call of {name}: `required` of its parameters must be a list of names; "
            "leave it out if there are none",
        )
    shared = {key: schema[key] for key in _DEFINITIONS if key in schema}
    rules, lines = [], []
    for place, (key, inner) in enumerate(properties.items()):
        if '"' in key:
            raise invalid(
                "tools",
                f"cannot bind a call of {name}: the model's format has no way to spell a quote in "
                f"the name of an argument, as in {key!r}; rename it",
            )
        rule = f"argument{number}_{place}"
        rules += _argument(rule, key, inner, shared)
        lines.append(rule if key in needed else f"{rule}?")
    # The published form has an empty line where there is no argument.
    body = " ".join(lines) if any(key in needed for key in properties) else ""
    if not body:
        line_break = _text("\n")
        body = f"({' '.join(lines)} | {line_break})" if lines else line_break
    head, end = _text(f'{name}">\n'), _text(dsml.END_CALLS)
    return [f"call{number}: {head} {body} {end}", *rules]


def _argument(rule: str, key: str, schema: Any, shared: dict[str, Any]) -> list[str]:
    """Returns the rules of an argument's element, with its line break."""
    end = f"{dsml.END_ARGUMENT}\n"
    texts = _texts(schema)
    begin = _text(dsml.begin_argument(key, text=texts is not None))
    if texts is None:
        whole = {**schema, **shared} if isinstance(schema, dict) else schema
        if isinstance(whole, dict):
            whole["x-guidance"] = OPTIONS
        return [
            f"{rule}: {begin} {rule}_value {_text(end)}",
            f"{rule}_value: %json {json.dumps(whole)}",
        ]
    if texts:
        choices = " | ".join(_text(text) for text in texts)
        return [f"{rule}: {begin} ({choices}) {_text(end)}"]
    return [
        f"{rule}: {begin} {rule}_value",
        f"{rule}_value[suffix={_text(end)}]: /(?s:.*)/",
    ]


def _texts(schema: Any) -> list[str] | None:
    """Returns the texts that a schema admits, [] for any; None if it is of other values too, or
    bounds them otherwise than by a list.
    """
    if not isinstance(schema, dict) or not schema.keys() <= _PLAIN:
        return None
    listed = [schema["const"]] if "const" in schema else schema.get("enum", [])
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        return None
    return listed if listed or schema.get("type") == "string" else None


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
