"""The body of /v1/chat/completions, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dsjax.infer.pictured import PICTURES, PicturedFormat
from dsjax.serve.fields import Fields, invalid
from dsjax.serve.grammar import Grammars
from dsjax.serve.options import HARMLESS, MOST_TOP, Options, read_options
from dsjax.serve.picture_parts import MOST_PICTURES, Sent, read_picture
from dsjax.serve.service import ALIASES, AnyFormat, Service
from dsjax.serve.steering import Grammar
from dsjax.serve.tools import Tools, read_tools
from dsjax.text.chat import Message
from dsjax.text.vocabulary import THINK

MOST_MESSAGES = 4096
_EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]
_ROLES = {"developer": "system", "function": "tool"}
MakeGrammar = Callable[[Grammars], Grammar]


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """What a client asks for.

    Attributes:
      model: as the client calls it.
      prefix: the beginning of the reply, which the model goes on with.
      thinking: None is the format's default.
      grammar: makes what the answer must follow, once per choice.
      top: likely tokens to report; None: no log-probabilities.
    """

    model: str
    messages: tuple[Message, ...]
    prefix: Message | None
    tools: Tools
    thinking: bool | None
    grammar: MakeGrammar | None
    top: int | None
    options: Options


def read_chat(values: Any, service: Service, *, user: str) -> ChatRequest:
    """Reads a body that is JSON.

    Raises:
      ApiError: 404 for the model, 422 for any other field.
    """
    fields = Fields(values)
    model = service.check_model(fields)
    form = service.form
    if form is None:
        raise invalid(
            "messages",
            "cannot be answered: the checkpoint is a base model, without a chat format; use "
            "/v1/completions",
        )
    messages, prefix = _messages(fields, sees=isinstance(form, PicturedFormat))
    options = read_options(fields, service.defaults, vocab_size=service.vocab_size, user=user)
    tools = read_tools(fields)
    top = None
    if fields.boolean("logprobs"):
        top = fields.integer("top_logprobs", 0, 0, MOST_TOP)
    elif fields.take("top_logprobs"):
        raise invalid("top_logprobs", "needs logprobs=true")
    request = ChatRequest(
        model=model,
        messages=messages,
        prefix=prefix,
        tools=tools,
        thinking=_thinking(fields, form, model),
        grammar=_grammar(fields),
        top=top,
        options=options,
    )
    fields.finish(HARMLESS)
    if request.grammar and tools.required:
        raise invalid("response_format", "does not go together with a tool_choice that calls one")
    return request


def _messages(fields: Fields, *, sees: bool) -> tuple[tuple[Message, ...], Message | None]:
    """Returns the messages, successive ones of a user joined, and the prefix."""
    items = fields.items("messages", most=MOST_MESSAGES)
    messages: list[Message] = []
    prefix = None
    for number, item in enumerate(items):
        inner = Fields(item, f"messages[{number}]")
        begins = inner.boolean("prefix")
        message = _message(inner, sees=sees)
        if begins:
            if message.role != "assistant" or number != len(items) - 1:
                raise invalid(inner.path("prefix"), "is for the last message, an assistant's")
            prefix = message
        elif messages and messages[-1].role == message.role == "user":
            messages[-1] = _joined(messages[-1], message)
        else:
            messages.append(message)
    if not messages:
        raise invalid("messages", "must have at least one message")
    n_pictures = sum(len(message.fields.get(PICTURES, ())) for message in messages)
    if n_pictures > MOST_PICTURES:
        raise invalid("messages", f"have {n_pictures} pictures; at most {MOST_PICTURES} may be")
    return tuple(messages), prefix


def _joined(first: Message, second: Message) -> Message:
    pictures = [each for message in (first, second) for each in message.fields.get(PICTURES, ())]
    fields = {**second.fields, PICTURES: pictures} if pictures else second.fields
    return Message("user", f"{first.content}\n\n{second.content}", fields)


def _message(fields: Fields, *, sees: bool) -> Message:
    roles = ["system", "user", "assistant", "tool", *_ROLES]
    role = fields.choice("role", roles)
    role = _ROLES.get(role, role)
    extra: dict[str, Any] = {}
    if role == "assistant" and fields.has("tool_calls"):
        calls = fields.items("tool_calls", most=128)
        extra["tool_calls"] = [
            _call(Fields(call, f"{fields.path('tool_calls')}[{number}]"))
            for number, call in enumerate(calls)
        ]
    thought = fields.take("reasoning_content") or fields.take("reasoning") or ""
    if not isinstance(thought, str):
        raise invalid(fields.path("reasoning_content"), "must be a text")
    if thought:
        extra["reasoning_content"] = thought
    if role == "tool":
        extra["tool_call_id"] = fields.text("tool_call_id", "")
    empty = bool(extra.get("tool_calls") or thought)
    content, pictures = _content(fields, empty=empty, sees=sees)
    if pictures:
        if role != "user":
            raise invalid(fields.path("content"), "has a picture, which is for a user's message")
        extra[PICTURES] = pictures
    fields.text("name", "")
    fields.finish({"refusal", "audio", "annotations", "function_call", "id"})
    return Message(role, content, extra)


def _call(fields: Fields) -> dict[str, Any]:
    fields.choice("type", ["function"], "function")
    inner = Fields(fields.take("function"), fields.path("function"))
    function = {"name": inner.text("name"), "arguments": inner.text("arguments", "{}")}
    return {"id": fields.text("id", ""), "type": "function", "function": function}


def _content(fields: Fields, *, empty: bool, sees: bool) -> tuple[str, list[Sent]]:
    """Returns the text of a message, and the pictures that go before it."""
    value = fields.take("content")
    path = fields.path("content")
    if value is None:
        if not empty:
            raise invalid(path, "is missing", "missing")
        return "", []
    if isinstance(value, str):
        return value, []
    if not isinstance(value, list):
        raise invalid(path, "must be a text or a list of parts")
    texts: list[str] = []
    pictures: list[Sent] = []
    for number, part in enumerate(value):
        inner = Fields(part, f"{path}[{number}]")
        kind = inner.text("type")
        if kind == "image_url" and sees:
            pictures.append(read_picture(inner))
        elif kind in ("text", "input_text", "output_text"):
            texts.append(inner.text("text"))
        else:
            reads = "text and pictures (image_url)" if sees else "text alone"
            raise invalid(inner.path("type"), f"is {kind[:40]!r}; this model reads {reads}")
    return "".join(texts), pictures


def _thinking(fields: Fields, form: AnyFormat, model: str) -> bool | None:
    """Returns whether the reply is to think, as far as the format offers a choice."""
    wanted, asked_by = None, "thinking"
    effort = fields.choice("reasoning_effort", _EFFORTS, "medium")
    if effort == "none":
        wanted, asked_by = False, "reasoning_effort"
    if fields.has("chat_template_kwargs"):
        inner = Fields(fields.take("chat_template_kwargs"), "chat_template_kwargs")
        for name in ("thinking", "enable_thinking"):
            wanted = inner.boolean(name) if inner.has(name) else wanted
        inner.finish()
    if fields.has("thinking"):
        inner = Fields(fields.take("thinking"), "thinking")
        wanted = inner.choice("type", ["enabled", "disabled"]) == "enabled"
        inner.finish({"budget_tokens"})
    offered = _offered(form)
    if wanted is None:
        by_name = ALIASES.get(model)
        return by_name if by_name is not None and offered == {True, False} else None
    if wanted not in offered:
        always = "always thinks" if offered == {True} else "cannot be told to think"
        raise invalid(asked_by, f"asks for what the model has no choice about: it {always}")
    return wanted if offered == {True, False} else None


def _offered(form: AnyFormat) -> set[bool]:
    """Returns what a format can be told about thinking."""
    if isinstance(form, PicturedFormat):
        return {False}
    if form.template is not None:
        source = form.template.source
        # R1's own template writes <think> at the end of every prompt.
        return {True, False} if "thinking" in source else {THINK in source}
    return {"V3": {False}, "R1": {True}}.get(form.name, {True, False})


def _grammar(fields: Fields) -> MakeGrammar | None:
    if not fields.has("response_format"):
        return None
    path = "response_format"
    inner = Fields(fields.take(path), path)
    kind = inner.choice("type", ["text", "json_object", "json_schema", "regex", "grammar"])
    make: MakeGrammar | None = None
    if kind == "json_object":
        make = lambda grammars: grammars.json_object(path)  # noqa: E731
    elif kind == "json_schema":
        schema = Fields(inner.take("json_schema"), f"{path}.json_schema")
        given, place = schema.take("schema", {}), schema.path("schema")
        make = lambda grammars: grammars.schema(given, place)  # noqa: E731
        schema.text("name", "")
        schema.text("description", "")
        schema.boolean("strict")
        schema.finish()
    elif kind == "regex":
        pattern, place = inner.text("regex"), inner.path("regex")
        make = lambda grammars: grammars.regex(pattern, place)  # noqa: E731
    elif kind == "grammar":
        grammar, place = inner.text("grammar"), inner.path("grammar")
        make = lambda grammars: grammars.lark(grammar, place)  # noqa: E731
    inner.finish()
    return make
