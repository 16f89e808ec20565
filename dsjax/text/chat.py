"""Conversations as tokens, in DeepSeek's own formats or by a checkpoint's chat template.

A checkpoint's template takes precedence. Without one, its control tokens determine the format, not
the model's name: V3.1 has search tokens, R1 has <think>, V3 has only the tokens of the two roles. A
tokenizer with none of these belongs to a base model, which cannot chat.

  V3    [begin] system [User] ... [Assistant] ... [end] [User] ... [Assistant]
  R1    the same; earlier replies lose their thought, and the new one begins with [<think>] "\\n",
        as R1's authors recommend
  V3.1  as V3, with [</think>] after each [Assistant]; a reply that should think begins with
        [<think>] instead

Control tokens are inserted by id. Text in messages is always encoded as text, even if it spells a
control token.

Sources: the chat templates and model cards that DeepSeek released with V3, R1 and V3.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dsjax.text.template import Template, find_template
from dsjax.text.tokenizer import BOS, EOS
from dsjax.text.vocabulary import END_THINK, THINK, Vocabulary

USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
SEARCH = "<\uff5csearch\u2581begin\uff5c>"

_ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


class Control(str):
    """The name of a control token; a plain str is text."""


def v3(messages: Sequence[Message], thinking: bool | None) -> list[str]:
    """DeepSeek-V3 and V3-0324.

    Raises:
      ValueError: thinking was requested.
    """
    if thinking:
        raise ValueError(
            "this checkpoint's tokenizer has no <think>, so its model cannot be asked to think; "
            "omit --thinking"
        )
    parts = _system(messages)
    for message in messages:
        if message.role == "user":
            parts += [Control(USER), message.content, Control(ASSISTANT)]
        elif message.role == "assistant":
            parts += [message.content, Control(EOS)]
    return parts


def r1(messages: Sequence[Message], thinking: bool | None) -> list[str]:
    """DeepSeek-R1, which always thinks.

    Raises:
      ValueError: thinking was declined.
    """
    if thinking is False:
        raise ValueError("this checkpoint's model always thinks; omit --no-thinking")
    spoken = [
        dataclasses.replace(message, content=message.content.split(END_THINK)[-1])
        if message.role == "assistant"
        else message
        for message in messages
    ]
    return [*v3(spoken, None), Control(THINK), "\n"]


def v3_1(messages: Sequence[Message], thinking: bool | None) -> list[str]:
    """DeepSeek-V3.1, which thinks on request."""
    parts = _system(messages)
    for message in messages:
        if message.role == "user":
            parts += [Control(USER), message.content, Control(ASSISTANT)]
        elif message.role == "assistant":
            answer = message.content.split(END_THINK, 1)[-1]
            parts += [Control(END_THINK), answer, Control(EOS)]
    return [*parts, Control(THINK if thinking else END_THINK)]


_FORMATS = {"V3": v3, "R1": r1, "V3.1": v3_1}


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The conversation format of one checkpoint.

    Attributes:
      name: "V3", "R1", "V3.1", or "template" for the checkpoint's own template.
    """

    name: str
    vocabulary: Vocabulary
    template: Template | None = None

    def encode(self, messages: Sequence[Message], *, thinking: bool | None = None) -> list[int]:
        """Encodes a conversation up to the point where the assistant's reply begins.

        Args:
          thinking: whether the reply should think first; None is the format's default.

        Raises:
          ValueError: the turns are not system ... user assistant ... user, the format offers no
            choice about thinking, or the template fails.
        """
        _check_turns(messages)
        if self.template is not None:
            given = [dataclasses.asdict(message) for message in messages]
            return self.template.encode(given, self.vocabulary, thinking=thinking)
        parts = _FORMATS[self.name](messages, thinking)
        coder = self.vocabulary.coder
        ids: list[int] = []
        for part in parts:
            ids += [coder.control[part]] if isinstance(part, Control) else coder.encode(part)
        return ids


def find_format(folder: Path, vocabulary: Vocabulary) -> ChatFormat | None:
    """Returns the format of a checkpoint's folder; None for a base model.

    Raises:
      ValueError: the checkpoint's template cannot be read.
    """
    template = find_template(folder, vocabulary)
    if template is not None:
        return ChatFormat("template", vocabulary, template)
    control = vocabulary.coder.control
    if not {BOS, EOS, USER, ASSISTANT} <= control.keys():
        return None
    if vocabulary.think_ids is None:
        return ChatFormat("V3", vocabulary)
    return ChatFormat("V3.1" if SEARCH in control else "R1", vocabulary)


def _system(messages: Sequence[Message]) -> list[str]:
    instructions = [message.content for message in messages if message.role == "system"]
    return [Control(BOS), "\n\n".join(instructions)]


def _check_turns(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    unknown = sorted(set(roles) - set(_ROLES))
    if unknown:
        raise ValueError(f"message role {unknown[0]!r} is none of {', '.join(_ROLES)}")
    turns = [role for role in roles if role != "system"]
    if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            f"the turns are {', '.join(turns) or 'none'}; user and assistant must alternate, "
            "beginning and ending with the user"
        )
