"""Whole conversations as tokens, and which of them a model is trained on.

A reply is trained as it is generated: after the very tokens that a prompt ends with, up to and with
the token that ends it. So the ids of a conversation are put together from pieces, the prompt's and
the reply's, each encoded by itself, and the mask comes with the pieces. What is trained, of every
assistant turn that is not left out by weight 0:

  V3         the reply and its end token, in every turn
  V3.1       the same; the prompt ends with [</think>], or with [<think>] where a thought follows
  R1         the last turn alone, its thought included: the format cuts earlier thoughts, so earlier
             replies stand without the prompt that they were generated from. The prompt ends with
             [<think>] "\\n". A reply without a thought is trained with an empty one, since R1 is
             always asked to think
  template   every turn after which the rest of the conversation begins with what came before it;
             others, such as those whose thought the template cuts, are context. The last turn
             must be so
  no format  the completion and the end token, of a prompt and a completion that are texts

Where V3.1 cuts the thought of an earlier turn, that turn is context too. A thought is what precedes
</think> in a reply, or the field `reasoning_content` that DeepSeek's API returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsjax.text.chat import ASSISTANT, USER, ChatFormat
from dsjax.text.template import Template
from dsjax.text.tokenizer import BOS, EOS
from dsjax.text.vocabulary import END_THINK, THINK, Vocabulary

ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message of a conversation."""

    role: str  # one of ROLES
    content: str
    trained: bool = True  # whether a reply counts
    # what the message has besides, for templates: tool_calls, tool_call_id, reasoning_content, ...
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Turns up to a reply, or a text and what follows it.

    Attributes:
      place: file and line, for messages.
      tools: what the assistant may call, in OpenAI's form.
      plain: whether it is a prompt and a completion, both texts; as the turns of a user and of the
        assistant for a model that has a format, and as they stand for one that has none.
    """

    turns: tuple[Turn, ...]
    place: str
    tools: tuple[dict[str, Any], ...] = ()
    plain: bool = False


class Encoded(NamedTuple):
    """A conversation as tokens."""

    ids: np.ndarray  # int32 [n]
    trained: np.ndarray  # bool [n], whether the token is predicted in training


class Piece(NamedTuple):
    """A control token's name, or a text that is encoded by itself."""

    text: str
    is_control: bool
    trained: bool


def choose_format(name: str, vocabulary: Vocabulary) -> ChatFormat:
    """Returns DeepSeek's format V3, R1 or V3.1, in place of a checkpoint's template.

    Raises:
      ValueError: the tokenizer lacks tokens of the format; names them.
    """
    needed = (BOS, EOS, USER, ASSISTANT, *(() if name == "V3" else (THINK, END_THINK)))
    missing = [token for token in needed if token not in vocabulary.coder.control]
    if missing:
        raise ValueError(
            f"sft.format={name} needs the control tokens {', '.join(missing)}, which the "
            "checkpoint's tokenizer does not have; name a tokenizer that has them with "
            "sft.tokenizer, or use another format"
        )
    return ChatFormat(name, vocabulary)


def encode_conversations(
    conversations: Sequence[Conversation], vocabulary: Vocabulary, form: ChatFormat | None
) -> list[Encoded]:
    """Encodes conversations together: templates render in one process, and text is encoded on all
    cores.

    Args:
      form: None for a base model, for which only plain conversations have a meaning.

    Raises:
      ValueError: a conversation does not suit the format, or the template fails; names the place.
    """
    if form is not None and form.template is not None:
        pieces = _by_template(conversations, form)
    elif form is not None:
        pieces = [_deepseek(form.name, each) for each in conversations]
    else:
        pieces = [_without_format(vocabulary, each) for each in conversations]
    return _encode(pieces, vocabulary)


def _encode(conversations: Sequence[Sequence[Piece]], vocabulary: Vocabulary) -> list[Encoded]:
    coder = vocabulary.coder
    texts = [piece.text for each in conversations for piece in each if not piece.is_control]
    ids = iter(coder.encode_batch(texts)) if texts else iter(())
    encoded = []
    for pieces in conversations:
        parts = [
            np.asarray([coder.control[piece.text]]) if piece.is_control else next(ids)
            for piece in pieces
        ]
        trained = [
            np.full(len(part), piece.trained) for part, piece in zip(parts, pieces, strict=True)
        ]
        encoded.append(Encoded(np.concatenate(parts).astype(np.int32), np.concatenate(trained)))
    return encoded


def _text(text: str, *, trained: bool = False) -> Piece:
    return Piece(text, False, trained)


def _control(name: str, *, trained: bool = False) -> Piece:
    return Piece(name, True, trained)


def _without_format(vocabulary: Vocabulary, conversation: Conversation) -> list[Piece]:
    place = conversation.place
    if not conversation.plain:
        raise ValueError(
            f"{place}: messages need a chat format, and this is a base model: it has no template "
            f"and its tokenizer no tokens for turns, such as {USER}. Give prompt and answer as "
            "texts, or name a tokenizer that has such tokens with sft.tokenizer of tools/sft.py"
        )
    if vocabulary.eos is None:
        raise ValueError(
            f"{place}: the checkpoint names no end token, so a completion cannot end; write "
            '"eos_token" in its tokenizer_config.json'
        )
    prompt, completion = conversation.turns
    first = [_control(vocabulary.bos)] if vocabulary.begins and vocabulary.bos else []
    end = _control(vocabulary.eos, trained=completion.trained)
    reply = _reply_text(completion.content, vocabulary, completion.trained)
    return [*first, _text(prompt.content), *reply, end]


def _reply_text(text: str, vocabulary: Vocabulary, trained: bool) -> list[Piece]:
    """Returns a reply's text, in which the tags of a thought are tokens if there are such."""
    if vocabulary.think_ids is None:
        return [_text(text, trained=trained)]
    pieces = []
    for number, part in enumerate(text.split(THINK)):
        pieces += [_control(THINK, trained=trained)] if number else []
        for place, inner in enumerate(part.split(END_THINK)):
            pieces += [_control(END_THINK, trained=trained)] if place else []
            pieces.append(_text(inner, trained=trained))
    return pieces


def _deepseek(name: str, conversation: Conversation) -> list[Piece]:
    """Returns a conversation in one of DeepSeek's own formats."""
    turns = conversation.turns
    _check_turns(name, conversation)
    system = "\n\n".join(turn.content for turn in turns if turn.role == "system")
    pieces = [_control(BOS), _text(system)]
    for turn in turns:
        if turn.role == "user":
            pieces += [_control(USER), _text(turn.content), _control(ASSISTANT)]
        elif turn.role == "assistant":
            pieces += _reply(name, turn, last=turn is turns[-1])
    return pieces


def _reply(name: str, turn: Turn, *, last: bool) -> list[Piece]:
    """Returns what stands between a user's turn and the next, the end of the prompt included."""
    thought, answer = ("", turn.content) if name == "V3" else _split_thought(name, turn)
    trained = turn.trained
    opening: list[Piece] = []
    body: list[Piece] = []
    if name == "R1" and last:
        opening = [_control(THINK), _text("\n")]
        if not thought:
            thought, answer = "\n", f"\n\n{answer}"  # as R1 writes it when it does not think
        body = [_text(thought, trained=trained), _control(END_THINK, trained=trained)]
    elif name == "R1":
        trained = False
    elif name in ("V3.1", "V3.2") and thought and last:
        opening = [_control(THINK)]
        body = [_text(thought, trained=trained), _control(END_THINK, trained=trained)]
    elif name in ("V3.1", "V3.2"):
        opening = [_control(END_THINK)]
        trained = trained and not thought
    return [*opening, *body, _text(answer, trained=trained), _control(EOS, trained=trained)]


def _split_thought(name: str, turn: Turn) -> tuple[str, str]:
    """Returns thought and answer; R1's thought ends at the last </think>, V3.1's at the first, as
    their templates cut it.
    """
    apart = turn.fields.get("reasoning_content")
    if isinstance(apart, str) and apart:
        return (f"{apart}\n", f"\n\n{turn.content}") if name == "R1" else (apart, turn.content)
    if END_THINK not in turn.content:
        return "", turn.content
    cut = turn.content.rpartition if name == "R1" else turn.content.partition
    thought, _, answer = cut(END_THINK)
    thought = thought.removeprefix(THINK)
    # The prompt has them already.
    return (thought.removeprefix("\n") or "\n" if name == "R1" else thought), answer


def _check_turns(name: str, conversation: Conversation) -> None:
    turns, place = conversation.turns, conversation.place
    called = [field for turn in turns for field in ("tool_calls",) if turn.fields.get(field)]
    named = "tools" if conversation.tools else called[0] if called else ""
    if named or any(turn.role == "tool" for turn in turns):
        raise ValueError(
            f"{place}: {named or 'role tool'}: the format {name} has no form for tools; begin with "
            "a checkpoint whose chat template has one, or leave such conversations out"
        )
    roles = [turn.role for turn in turns if turn.role != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(
            f"{place}: the turns are {', '.join(roles) or 'none'}; user and assistant must "
            "alternate, beginning with the user and ending with the assistant"
        )
    if turns[-1].role != "assistant":
        raise ValueError(f"{place}: the last message is the system's; put it first")


class _Rendered(NamedTuple):
    """A conversation as a template renders it, and up to, and with, each reply to train."""

    whole: str
    prefixes: list[tuple[str, str]]


def _by_template(conversations: Sequence[Conversation], form: ChatFormat) -> list[list[Piece]]:
    assert form.template is not None
    source = form.template.source
    marks = []
    for each in conversations:
        _check_tools(source, form.template.place, each)
        marks.append(form.template.unused_mark(_messages(each, form.template), each.tools))
    wanted = [_contexts(each, form, mark) for each, mark in zip(conversations, marks, strict=True)]
    try:
        texts = form.template.render([context for contexts in wanted for context in contexts])
    except ValueError as error:
        if len(conversations) == 1:
            raise ValueError(f"{conversations[0].place}: {error}") from error
        # Find the one: it alone says its place.
        return [pieces for each in conversations for pieces in _by_template([each], form)]
    rest = iter(texts)
    pieces = []
    for each, mark, contexts in zip(conversations, marks, wanted, strict=True):
        whole, *parts = (next(rest) for _ in contexts)
        prefixes = list(zip(parts[::2], parts[1::2], strict=True))
        pieces.append(_cut(each, _Rendered(whole, prefixes), mark, form))
    return pieces


def _messages(conversation: Conversation, template: Template) -> list[dict[str, Any]]:
    """Returns the messages as a template reads them."""
    return [
        template.as_read({"content": turn.content, **turn.fields, "role": turn.role})
        for turn in conversation.turns
    ]


def _contexts(conversation: Conversation, form: ChatFormat, mark: str) -> list[dict[str, Any]]:
    """Returns what to render: the whole and, for each reply to train, its prompt and its end."""
    template = form.template
    assert template is not None
    messages = _messages(conversation, template)

    def context(count: int, *, reply: bool) -> dict[str, Any]:
        tools = conversation.tools or None
        return template.context(messages[:count], form.vocabulary, mark, reply=reply, tools=tools)

    contexts = [context(len(messages), reply=False)]
    for number, turn in enumerate(conversation.turns):
        if _counts(turn):
            contexts += [context(number, reply=True), context(number + 1, reply=False)]
    return contexts


def _counts(turn: Turn) -> bool:
    return turn.role == "assistant" and turn.trained


def _cut(
    conversation: Conversation, rendered: _Rendered, mark: str, form: ChatFormat
) -> list[Piece]:
    """Divides a rendered conversation into what is trained and what is not."""
    whole, place = rendered.whole, conversation.place
    pieces: list[Piece] = []
    done = 0
    for number, (prompt, through) in enumerate(rendered.prefixes):
        last = number == len(rendered.prefixes) - 1 and _counts(conversation.turns[-1])
        if not (whole.startswith(prompt) and whole.startswith(through)
                and done <= len(prompt) <= len(through)):  # fmt: skip
            if last:
                raise ValueError(
                    f"{place}: the chat template writes the last reply differently from how the "
                    "model generates it (a prompt is not the beginning of the conversation), so "
                    "what to train is not determined; use DeepSeek's own format with "
                    "sft.format=R1, V3.1 or V3, or repair the template"
                )
            continue
        pieces += _pieces(whole[done : len(prompt)], mark, form)
        pieces += _ended(_pieces(whole[len(prompt) : len(through)], mark, form), form, place)
        done = len(through)
    return pieces + _pieces(whole[done:], mark, form)


def _pieces(text: str, mark: str, form: ChatFormat) -> list[Piece]:
    def split() -> Iterator[Piece]:
        for part in text.split(mark):
            for inner, is_control in form.vocabulary.coder.split_control(part):
                yield Piece(inner, is_control, False)

    return [piece for piece in split() if piece.text]


def _ended(pieces: Sequence[Piece], form: ChatFormat, place: str) -> list[Piece]:
    """Marks a reply up to its end token; what a template writes after that is not generated."""
    coder, stops = form.vocabulary.coder, form.vocabulary.stop_ids
    ends = [
        number for number, piece in enumerate(pieces)
        if piece.is_control and coder.control[piece.text] in stops
    ]  # fmt: skip
    if not ends:
        assert form.template is not None
        named = ", ".join(name for name, i in coder.control.items() if i in stops) or "none"
        raise ValueError(
            f"{place}: {form.template.place} ends a reply without a token that ends generation "
            f"({named}), so the model would not learn to stop; add the token that the template "
            "writes there to eos_token_id in generation_config.json"
        )
    return [piece._replace(trained=number <= ends[-1]) for number, piece in enumerate(pieces)]


def _check_tools(source: str, template: str, conversation: Conversation) -> None:
    """Refuses what the template would silently leave out."""
    turns = conversation.turns
    used = {
        "tools": bool(conversation.tools),
        "tool_calls": any(turn.fields.get("tool_calls") for turn in turns),
        "tool": any(turn.role == "tool" for turn in turns),
    }
    for name, is_used in used.items():
        if is_used and name not in source:
            raise ValueError(
                f"{conversation.place}: {template} does not read {name}; leave such conversations "
                "out, or begin with a checkpoint whose template does"
            )
    if not turns or turns[-1].role != "assistant":
        raise ValueError(
            f"{conversation.place}: the last message is {turns[-1].role if turns else 'missing'}; "
            "a conversation to train on ends with the assistant's"
        )
