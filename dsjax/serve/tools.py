"""The tools of a chat request: checked, and what binds a reply that must call one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsjax.serve import marked_calls
from dsjax.serve.fields import Fields, invalid
from dsjax.serve.grammar import OPTIONS
from dsjax.serve.service import AnyFormat
from dsjax.text import tool_calls
from dsjax.text.tokenizer import Coder

MOST_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class Tools(NamedTuple):
    """What a reply may call.

    Attributes:
      given: the tools in OpenAI's form.
      required: names of which the reply must call one; (): it may answer instead.
    """

    given: tuple[dict[str, Any], ...] = ()
    required: tuple[str, ...] = ()


def read_tools(fields: Fields) -> Tools:
    """Takes `tools` and `tool_choice`.

    Raises:
      ApiError: 422, a tool is malformed, or the choice names none of them.
    """
    items = fields.items("tools", most=MOST_TOOLS, default=[])
    given = tuple(_tool(item, f"tools[{number}]") for number, item in enumerate(items))
    names = [tool["function"]["name"] for tool in given]
    if len(set(names)) < len(names):
        raise invalid("tools", "must have different names")
    choice = fields.take("tool_choice", "auto")
    if isinstance(choice, dict):
        inner = Fields(choice, "tool_choice")
        inner.choice("type", ["function"])
        named = Fields(inner.take("function"), "tool_choice.function")
        choice = named.choice("name", names or ["none, since there are no tools"])
        return Tools(given, (choice,))
    if choice not in ("none", "auto", "required"):
        raise invalid("tool_choice", "must be none, auto, required, or an object naming a function")
    if choice == "required" and not given:
        raise invalid("tool_choice", "is required, and there are no tools")
    return Tools() if choice == "none" else Tools(given, tuple(names) if choice != "auto" else ())


def _tool(value: Any, place: str) -> dict[str, Any]:
    outer = Fields(value, place)
    outer.choice("type", ["function"])
    inner = Fields(outer.take("function"), f"{place}.function")
    name = inner.text("name")
    if not _NAME.fullmatch(name):
        raise invalid(inner.path("name"), "must be 1 to 64 letters, digits, hyphens, underscores")
    function: dict[str, Any] = {"name": name}
    if inner.has("description"):
        function["description"] = inner.text("description")
    parameters = inner.take("parameters", {"type": "object", "properties": {}})
    if not isinstance(parameters, dict):
        raise invalid(inner.path("parameters"), "must be an object that holds a JSON schema")
    function["parameters"] = parameters
    inner.boolean("strict")
    inner.finish()
    outer.finish()
    return {"type": "function", "function": function}


def opening(coder: Coder, *, fenced: bool) -> list[int]:
    """Returns the tokens that begin a call, up to its name."""
    ids = [coder.control[tool_calls.CALLS], coder.control[tool_calls.CALL]]
    if fenced:
        ids += [*coder.encode(tool_calls.KIND), coder.control[tool_calls.SEPARATOR]]
    return ids


def call_grammar(tools: Tools, coder: Coder, *, fenced: bool) -> str:
    """Returns what must follow `opening`: one of the required calls, with arguments that suit its
    schema; in llguidance's Lark notation.
    """
    end = "".join(
        f" <[{coder.control[name]}]>" for name in (tool_calls.END_CALL, tool_calls.END_CALLS)
    )
    rules = []
    for number, tool in enumerate(required(tools)):
        name, schema = tool["name"], json.dumps({**tool["parameters"], "x-guidance": OPTIONS})
        if fenced:
            head, tail = json.dumps(f"{name}\n```json\n"), json.dumps("\n```")
            rules.append(f"call{number}: {head} arguments{number} {tail}{end}")
        else:
            separator = coder.control[tool_calls.SEPARATOR]
            rules.append(f"call{number}: {json.dumps(name)} <[{separator}]> arguments{number}{end}")
        rules.append(f"arguments{number}: %json {schema}")
    calls = " | ".join(f"call{number}" for number in range(len(tools.required)))
    return "\n".join([f"start: {calls}", *rules])


def bind(tools: Tools, form: AnyFormat) -> tuple[list[int], str]:
    """Returns what binds a reply to a required call: the tokens that begin it, and the grammar of
    what must follow them.

    Raises:
      ApiError: 422, the parameters of a tool cannot be bound in the format.
    """
    coder = form.vocabulary.coder
    if form.marked:
        return marked_calls.opening(coder), marked_calls.call_grammar(required(tools))
    return opening(coder, fenced=form.fenced), call_grammar(tools, coder, fenced=form.fenced)


def required(tools: Tools) -> Sequence[dict[str, Any]]:
    """Returns the functions of which a reply must call one."""
    functions = [tool["function"] for tool in tools.given]
    return [function for function in functions if function["name"] in tools.required]
