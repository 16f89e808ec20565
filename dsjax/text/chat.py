"""Conversations as tokens, in DeepSeek's own formats or by a checkpoint's chat template.

A checkpoint's template takes precedence. Without one, its control tokens determine the format, not
the model's name: V3.1 has search tokens, R1 has <think>, V3 has only the tokens of the two roles. A
tokenizer with none of these belongs to a base model, which cannot chat. V4's has all of them and
more; its format is none of those below, so that it counts as a base model's too, and a warning says
so.

  V3    [begin] system [User] ... [Assistant] ... [end] [User] ... [Assistant]
  R1    the same; earlier replies lose their thought, and the new one begins with [<think>] "\\n",
        as R1's authors recommend
  V3.1  as V3, with [</think>] after each [Assistant]; a reply that should think begins with
        [<think>] instead
  V3.2  as V3.1, with another form of calls; after the results of tools the reply thinks again

Tools, their calls and results: see dsjax/text/tool_calls.py, and dsml.py for V3.2's. After results
the reply goes on without an [Assistant].

Control tokens are inserted by id. Text in messages is always encoded as text, even if it spells a
control token.

Sources: the chat templates and model cards that DeepSeek released with V3, R1 and V3.1, and the
encoding script that it released with V3.2 in place of a template.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dsjax.files import read_json
from dsjax.text import dsml, tool_calls
from dsjax.text.template import Template, find_template
from dsjax.text.tokenizer import BOS, EOS
from dsjax.text.tool_calls import Control
from dsjax.text.vocabulary import END_THINK, THINK, Vocabulary

USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
SEARCH = "<\uff5csearch\u2581begin\uff5c>"
REMINDER = "<\uff5clatest_reminder\uff5c>"  # V4's tokenizers alone have it

Tools = Sequence[Mapping[str, Any]]

_logger = logging.getLogger(__name__)

_ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: str  # "system", "user", "assistant" or "tool"
    content: str
    # what else the message has: tool_calls in OpenAI's form, tool_call_id, reasoning_content, ...
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def calls(self) -> Sequence[Mapping[str, Any]]:
        return self.fields.get("tool_calls") or ()


def v3(messages: Sequence[Message], thinking: bool | None, tools: Tools = ()) -> list[str]:
    """DeepSeek-V3 and V3-0324.

    Raises:
      ValueError: thinking was requested.
    """
    if thinking:
        raise ValueError(
            "this checkpoint's tokenizer has no <think>, so its model cannot be asked to think; "
            "omit --thinking"
        )
    parts = _system(messages, tools, fenced=True)
    for number, message in enumerate(messages):
        if message.role == "user":
            parts += [Control(USER), message.content, Control(ASSISTANT)]
        elif message.role == "assistant":
            parts += _said(message, message.content, fenced=True)
        parts += _results(messages, number, fenced=True)
    return parts


def r1(messages: Sequence[Message], thinking: bool | None, tools: Tools = ()) -> list[str]:
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
    thought = [] if messages[-1].role == "tool" else [Control(THINK), "\n"]
    return [*v3(spoken, None, tools), *thought]


def v3_1(messages: Sequence[Message], thinking: bool | None, tools: Tools = ()) -> list[str]:
    """DeepSeek-V3.1, which thinks on request."""
    parts = _system(messages, tools, fenced=False)
    for number, message in enumerate(messages):
        if message.role == "user":
            parts += [Control(USER), message.content, Control(ASSISTANT)]
        elif message.role == "assistant":
            answer = message.content.split(END_THINK, 1)[-1]
            opened = number > 0 and messages[number - 1].role == "tool"
            parts += [] if opened else [Control(END_THINK)]
            parts += _said(message, answer, fenced=False)
        parts += _results(messages, number, fenced=False)
    if messages[-1].role == "tool":
        return parts
    return [*parts, Control(THINK if thinking else END_THINK)]


def v3_2(messages: Sequence[Message], thinking: bool | None, tools: Tools = ()) -> list[str]:
    """DeepSeek-V3.2, which thinks on request, after the results of tools too.

    The thoughts of replies since the user's last message stay: the model goes on with them.
    """
    last_user = max(n for n, message in enumerate(messages) if message.role == "user")
    instructions = "\n\n".join(each.content for each in messages if each.role == "system")
    described = ["\n\n", *dsml.describe(tools)] if tools else []
    parts = [Control(BOS), instructions, *described]
    for number, message in enumerate(messages):
        opened = Control(THINK if thinking and number >= last_user else END_THINK)
        if message.role == "user":
            parts += [Control(USER), message.content, Control(ASSISTANT), opened]
        elif message.role == "assistant":
            thought, answer = _thought(message)
            if thinking and number > last_user:
                parts += [thought, Control(END_THINK)]
            calls = dsml.write_calls(message.calls) if message.calls else []
            parts += [answer, *calls, Control(EOS)]
        elif message.role == "tool" and messages[number - 1].role != "tool":
            parts += [*dsml.write_results(_results_from(messages, number)), opened]
    return parts


def _thought(message: Message) -> tuple[str, str]:
    """Returns a reply's thought and answer."""
    apart = message.fields.get("reasoning_content") or message.fields.get("reasoning")
    if isinstance(apart, str):
        return apart, message.content
    thought, end, answer = message.content.partition(END_THINK)
    return (thought.removeprefix(THINK), answer) if end else ("", message.content)


_FORMATS = {"V3": v3, "R1": r1, "V3.1": v3_1, "V3.2": v3_2}


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The conversation format of one checkpoint.

    Attributes:
      name: "V3", "R1", "V3.1", "V3.2", or "template" for the checkpoint's own template.
      gap: what is between a prompt and the text of its reply.
    """

    name: str
    vocabulary: Vocabulary
    template: Template | None = None
    gap: ClassVar[str] = ""

    @property
    def fenced(self) -> bool:
        """Whether calls of tools have V3's form rather than V3.1's."""
        if self.template is not None:
            return "```json" in self.template.source
        return self.name != "V3.1"

    @property
    def marked(self) -> bool:
        """Whether calls of tools are V3.2's markup, see dsjax/text/dsml.py."""
        return self.name == "V3.2" or (
            self.template is not None and dsml.DSML in self.template.source
        )

    def encode(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool | None = None,
        tools: Tools = (),
    ) -> list[int]:
        """Encodes a conversation up to the point where the assistant's reply begins.

        Args:
          thinking: whether the reply should think first; None is the format's default.
          tools: what the assistant may call, in OpenAI's form.

        Raises:
          ValueError: the turns are not system ... user assistant ... user, the format offers no
            choice about thinking or has no form for tools, or the template fails.
        """
        _check_turns(messages)
        used = bool(tools) or any(each.calls or each.role == "tool" for each in messages)
        if self.template is not None:
            if used:
                self.template.check_tools(tools, messages)
            given = [
                {"role": each.role, "content": each.content, **each.fields} for each in messages
            ]
            return self.template.encode(given, self.vocabulary, thinking=thinking, tools=tools)
        if used and self.name != "V3.2" and not tool_calls.can_call(self.vocabulary.coder):
            raise ValueError(
                "this checkpoint's tokenizer has no tokens for calls of tools, so its model cannot "
                "call any; leave tools and their results out"
            )
        coder = self.vocabulary.coder
        parts = _FORMATS[self.name](messages, thinking, tools)
        if self.name == "V3.2":
            parts = dsml.as_tokens(parts, coder.control)
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
    if REMINDER in control:
        _say_v4(folder)
        return None
    if vocabulary.think_ids is None:
        return ChatFormat("V3", vocabulary)
    if dsml.DSML in control or _model_type(folder) == "deepseek_v32":
        return ChatFormat("V3.2", vocabulary)
    return ChatFormat("V3.1" if SEARCH in control else "R1", vocabulary)


@functools.cache  # warns once about a folder that is opened twice
def _say_v4(folder: Path) -> None:
    _logger.warning(
        "%s has the tokenizer of DeepSeek-V4, whose chat format dsjax does not have: it can "
        "continue text and train on it; to chat, put a chat_template.jinja there",
        folder,
    )


def _model_type(folder: Path) -> object:
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else None
    return config.get("model_type") if isinstance(config, dict) else None


def _system(messages: Sequence[Message], tools: Tools, *, fenced: bool) -> list[str]:
    instructions = [message.content for message in messages if message.role == "system"]
    described = tool_calls.describe(tools, fenced=fenced) if tools else []
    return [Control(BOS), "\n\n".join(instructions), *described]


def _said(message: Message, answer: str, *, fenced: bool) -> list[str]:
    """Returns an earlier reply with its calls."""
    calls = tool_calls.write_calls(message.calls, fenced=fenced) if message.calls else []
    return [answer, *calls, Control(EOS)]


def _results(messages: Sequence[Message], number: int, *, fenced: bool) -> list[str]:
    """Returns the results that begin with this message; [] if none do."""
    if messages[number].role != "tool" or (number and messages[number - 1].role == "tool"):
        return []
    return tool_calls.write_results(_results_from(messages, number), fenced=fenced)


def _results_from(messages: Sequence[Message], number: int) -> list[str]:
    """Returns the results in this message and those right after it."""
    after = itertools.takewhile(lambda message: message.role == "tool", messages[number:])
    return [message.content for message in after]


def _check_turns(messages: Sequence[Message]) -> None:
    roles = [message.role for message in messages]
    unknown = sorted(set(roles) - set(_ROLES))
    if unknown:
        raise ValueError(f"message role {unknown[0]!r} is none of {', '.join(_ROLES)}")
    turns = [message for message in messages if message.role != "system"]
    expected = {"user"}
    for turn in turns:
        if turn.role not in expected:
            break
        after = {"user": {"assistant"}, "assistant": {"tool"} if turn.calls else {"user"}}
        expected = after.get(turn.role, {"tool", "assistant"})
    else:
        if turns and turns[-1].role in ("user", "tool"):
            return
    raise ValueError(
        f"the turns are {', '.join(turn.role for turn in turns) or 'none'}; user and assistant "
        "must alternate, beginning and ending with the user; results of tools follow the "
        "assistant's calls"
    )
