"""A checkpoint's chat template: finding it, and encoding what it renders.

Control tokens written by the template are control tokens; those spelled in a message are plain
text. Rendering mixes both in one string. Before rendering, a marker character that occurs nowhere
else is therefore inserted into every control token spelled in a message; afterwards the text is
split at the markers and each part is encoded separately.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax import files
from dsjax.text import sandbox
from dsjax.text.vocabulary import END_THINK, THINK, Vocabulary

# A template that writes a call's arguments as JSON, in one expression, whatever their type.
_DUMPED_ARGUMENTS = re.compile(r"arguments(?:(?!%\}|\}\}).)*?\|\s*tojson", re.DOTALL)
_TYPED_ARGUMENTS = re.compile(r"arguments['\"\]]*\s+is\s+string")
_MARKS = range(0xE000, 0xF900)  # private use: Unicode assigns no characters here


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template in Jinja, as in Hugging Face tokenizers."""

    source: str
    place: str  # where it was found, for error messages

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        vocabulary: Vocabulary,
        *,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Encodes a conversation up to the point where the assistant's next turn begins.

        Args:
          messages: dicts with `role` and `content`.
          thinking: passed on as the template's variables `thinking` (DeepSeek) and
            `enable_thinking` (Qwen); None leaves them undefined.
          tools: what the assistant may call, in OpenAI's form.

        Raises:
          ValueError: the template fails, exceeds a limit, or does not read these variables.
        """
        if thinking is not None and "thinking" not in self.source:
            raise ValueError(
                f"{self.place} reads neither thinking nor enable_thinking, so the model cannot be "
                "told whether to think; omit --thinking and --no-thinking"
            )
        messages = [self.as_read(message) for message in messages]
        mark = self.unused_mark(messages, list(tools))
        context = self.context(messages, vocabulary, mark, tools=tools or None)
        if thinking is not None:
            context |= {"thinking": thinking, "enable_thinking": thinking}
        try:
            (rendered,) = self.render([context])
        except ValueError as error:
            raise ValueError(
                f"{error}; repair it, or use --raw for a plain continuation"
            ) from error
        parts = rendered.split(mark)
        return [i for part in parts for i in vocabulary.coder.encode_control(part)]

    def as_read(self, message: dict[str, Any]) -> dict[str, Any]:
        """Returns a message with the arguments of its calls as the template reads them: OpenAI
        gives them as JSON text, which a template that writes JSON would quote once more.
        """
        calls = message.get("tool_calls")
        parse = _DUMPED_ARGUMENTS.search(self.source) and not _TYPED_ARGUMENTS.search(self.source)
        if not parse or not isinstance(calls, list):
            return message
        return {**message, "tool_calls": _parsed(calls)}

    def check_tools(self, tools: Sequence[Any], messages: Sequence[Any]) -> None:
        """Refuses what the template would silently leave out.

        Args:
          messages: each with `role` and `calls`.

        Raises:
          ValueError: the template does not read tools, their calls or their results.
        """
        used = {
            "tools": bool(tools),
            "tool_calls": any(message.calls for message in messages),
            "tool": any(message.role == "tool" for message in messages),
        }
        for name, is_used in used.items():
            if is_used and name not in self.source:
                raise ValueError(
                    f"{self.place} does not read {name}, so the model cannot be told of them; "
                    "leave tools and their results out"
                )

    def unused_mark(self, *values: Any) -> str:
        """Returns a character that occurs neither in the template nor in JSON values.

        Raises:
          ValueError: the values leave none.
        """
        return _unused_character([self.source, json.dumps(values, ensure_ascii=False)])

    def context(
        self,
        messages: Sequence[dict[str, Any]],
        vocabulary: Vocabulary,
        mark: str,
        *,
        reply: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Returns the variables that a template reads, with `mark` in each control token that a
        message or a tool spells out.

        Args:
          reply: whether the assistant's next turn begins after the messages.
          tools: what the assistant may call, in OpenAI's form.
        """
        return {
            "messages": [_broken_message(message, vocabulary, mark) for message in messages],
            "add_generation_prompt": reply,
            "bos_token": vocabulary.bos or "",
            "eos_token": vocabulary.eos or "",
            "tools": None if tools is None else _broken(list(tools), vocabulary, mark),
            "documents": None,
        }

    def render(self, contexts: Sequence[dict[str, Any]]) -> list[str]:
        """Renders each context.

        Raises:
          ValueError: the template fails or exceeds a limit; names it.
        """
        try:
            return sandbox.render(self.source, *contexts)
        except ValueError as error:
            raise ValueError(f"{self.place}: {error}") from error


def find_template(folder: Path, vocabulary: Vocabulary) -> Template | None:
    """Reads the template in chat_template.jinja, else in tokenizer_config.json; None if neither has
    one. Of several in tokenizer_config.json, the one named "default" is taken.

    Raises:
      ValueError: the template is not text.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            data = files.read_regular(path, 4 * sandbox.MAX_TEMPLATE)
            return Template(data.decode(), str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error}); repair or remove it") from error
    place = f"{folder / 'tokenizer_config.json'}: chat_template"
    found = vocabulary.config.get("chat_template")
    if isinstance(found, list):
        named = {
            entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)
        }
        if "default" not in named:
            raise ValueError(
                f"{place} lists {', '.join(map(repr, named)) or 'nothing'}; name one of them "
                '"default"'
            )
        found = named["default"]
    if found is None:
        return None
    if not isinstance(found, str):
        raise ValueError(f"{place} is {type(found).__name__}, neither a text nor a list of texts")
    return Template(found, place)


def _parsed(value: Any) -> Any:
    """Returns tool calls with arguments that are JSON text as the values they spell."""
    if isinstance(value, list):
        return [_parsed(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    result = {key: _parsed(inner) for key, inner in value.items()}
    if isinstance(result.get("arguments"), str):
        with contextlib.suppress(ValueError):  # a call that the model got wrong is text
            result["arguments"] = files.parse(result["arguments"].encode(), "arguments")
    return result


def _broken_message(message: dict[str, Any], vocabulary: Vocabulary, mark: str) -> dict[str, Any]:
    """Breaks up the control tokens spelled in a message, all but the thought's in a reply."""
    # Templates search earlier replies for these, to remove the thought.
    kept = (THINK, END_THINK) if message["role"] == "assistant" else ()
    broken = _broken(message, vocabulary, mark, kept)
    return broken | {"role": message["role"]}


def _broken(value: Any, vocabulary: Vocabulary, mark: str, kept: Sequence[str] = ()) -> Any:
    """Breaks up the control tokens in all texts of a JSON value."""
    if isinstance(value, dict):
        return {key: _broken(inner, vocabulary, mark, kept) for key, inner in value.items()}
    if isinstance(value, list):
        return [_broken(inner, vocabulary, mark, kept) for inner in value]
    if not isinstance(value, str):
        return value
    text = vocabulary.coder.break_control(value, mark)
    for name in kept:
        text = text.replace(name[0] + mark + name[1:], name)
    return text


def _unused_character(texts: Sequence[str]) -> str:
    used = set().union(*texts)
    free = next((chr(code) for code in _MARKS if chr(code) not in used), None)
    if free is None:
        raise ValueError("the messages use every private-use character; remove one of them")
    return free
