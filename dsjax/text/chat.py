"""Conversations as tokens: DeepSeek's own formats, or the template that a checkpoint brings along.

A checkpoint's template comes first. Without one its control tokens tell the format, and not the
model's name: V3.1 has tokens for search, R1 has <think>, V3 has the two roles' tokens alone; a
tokenizer with none of them belongs to a base model, which cannot chat.

  V3    [begin] system [User] ... [Assistant] ... [end] [User] ... [Assistant]
  R1    the same; earlier replies without their thought, and the new one begins [<think>] "\\n", as
        R1's authors recommend
  V3.1  as V3, and each [Assistant] is followed by [</think>], but for a reply that is to think,
        which begins [<think>]

Control tokens are placed by id; what people write is text, whatever it spells.

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
    """The name of a control token, where a plain str is text."""


def v3(messages: Sequence[Message], thinking: bool | None) -> list[str]:
    """DeepSeek-V3 and V3-0324.

    Raises:
      ValueError: it is asked to think.
    """
    if thinking:
        raise ValueError(
            "this checkpoint's tokenizer has no <think>, so its model cannot be asked to think; "
            "leave --thinking out"
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
      ValueError: it is asked not to.
    """
    if thinking is False:
        raise ValueError("this checkpoint's model always thinks; leave --no-thinking out")
    spoken = [
        dataclasses.replace(message, content=message.content.split(END_THINK)[-1])
        if message.role == "assistant"
        else message
        for message in messages
    ]
    return [*v3(spoken, None), Control(THINK), "\n"]


def v3_1(messages: Sequence[Message], thinking: bool | None) -> list[str]:
    """DeepSeek-V3.1, which thinks when asked to."""
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
    """How one checkpoint wants conversations written.

    `name` is "V3", "R1", "V3.1", or "template" for one of the checkpoint's own.
    """

    name: str
    vocabulary: Vocabulary
    template: Template | None = None

    def encode(self, messages: Sequence[Message], *, thinking: bool | None = None) -> list[int]:
        """Ids of a conversation and of the beginning of the assistant's reply to it.

        Args:
          thinking: whether the reply is to think first, for models that can do either; None leaves
            it to the format.

        Raises:
          ValueError: the turns are not system ... user assistant ... user, the format cannot think,
            or the template fails.
        """
        _check_turns(messages)
        if self.template is not None:
            given = [dataclasses.asdict(message) for message in messages]
            return self.template.encode(given, self.vocabulary, thinking=thinking)
        parts = _FORMATS[self.name](messages, thinking)
        coder, names = (
            self.vocabulary.coder,
            {"bos": self.vocabulary.bos, "eos": self.vocabulary.eos},
        )
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Control):
                ids.append(coder.control[names.get(part) or part])
            else:
                ids += coder.encode(part)
        return ids


def find_format(folder: Path, vocabulary: Vocabulary) -> ChatFormat | None:
    """The format of a checkpoint's folder; None for a base model.

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
            f"the turns are {', '.join(turns) or 'none'}; user and assistant take turns, and the "
            "user has the first and the last word"
        )
