"""A checkpoint's chat template: finding it, and encoding what it renders.

Control tokens written by the template are control tokens; those spelled in a message are plain
text. Rendering mixes both in one string. Before rendering, a marker character that occurs nowhere
else is therefore inserted into every control token spelled in a message; afterwards the text is
split at the markers and each part is encoded separately.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsjax import files
from dsjax.text import sandbox
from dsjax.text.vocabulary import END_THINK, THINK, Vocabulary

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
    ) -> list[int]:
        """Encodes a conversation up to the point where the assistant's next turn begins.

        Args:
          messages: dicts with `role` and `content`.
          thinking: passed on as the template's variables `thinking` (DeepSeek) and
            `enable_thinking` (Qwen); None leaves them undefined.

        Raises:
          ValueError: the template fails, exceeds a limit, or does not read these variables.
        """
        if thinking is not None and "thinking" not in self.source:
            raise ValueError(
                f"{self.place} reads neither thinking nor enable_thinking, so the model cannot be "
                "told whether to think; omit --thinking and --no-thinking"
            )
        mark = _unused_character([self.source, *(message["content"] for message in messages)])
        context: dict[str, Any] = {
            "messages": [_broken(message, vocabulary, mark) for message in messages],
            "add_generation_prompt": True,
            "bos_token": vocabulary.bos or "",
            "eos_token": vocabulary.eos or "",
            "tools": None,
            "documents": None,
        }
        if thinking is not None:
            context |= {"thinking": thinking, "enable_thinking": thinking}
        try:
            rendered = sandbox.render(self.source, context)
        except ValueError as error:
            raise ValueError(
                f"{self.place}: {error}; repair it, or use --raw for a plain continuation"
            ) from error
        parts = rendered.split(mark)
        return [i for part in parts for i in vocabulary.coder.encode_control(part)]


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


def _broken(message: dict[str, Any], vocabulary: Vocabulary, mark: str) -> dict[str, Any]:
    """Breaks up the control tokens spelled in a message."""
    text = vocabulary.coder.break_control(message["content"], mark)
    if message["role"] == "assistant":
        # Templates search earlier replies for these, to remove the thought.
        for name in (THINK, END_THINK):
            text = text.replace(name[0] + mark + name[1:], name)
    return message | {"content": text}


def _unused_character(texts: Sequence[str]) -> str:
    used = set().union(*texts)
    free = next((chr(code) for code in _MARKS if chr(code) not in used), None)
    if free is None:
        raise ValueError("the messages use every private-use character; remove one of them")
    return free
