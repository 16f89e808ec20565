"""Answers /v1/chat/completions."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dsjax.generate.request import Given, Request
from dsjax.infer.pictured import PICTURES, PicturedFormat
from dsjax.serve import picture_parts
from dsjax.serve.answering import Answer, respond
from dsjax.serve.chat_request import ChatRequest, read_chat
from dsjax.serve.choice import Choice, Delta
from dsjax.serve.errors import ApiError
from dsjax.serve.record import Entry
from dsjax.serve.replies import Replies
from dsjax.serve.service import AnyFormat, Service
from dsjax.serve.tools import bind
from dsjax.text.chat import Message


async def complete_chat(
    http: HttpRequest, values: Any, service: Service, entry: Entry, *, user: str
) -> Response:
    """Answers one request.

    Raises:
      ApiError: it cannot be served.
      ClientLeft: nobody waits for the answer.
    """
    asked = read_chat(values, service, user=user)
    requests, choices = await asyncio.to_thread(_prepare, asked, service)
    replies = Replies(
        service.worker, service.metrics, service.limits, requests, choices,
        n=asked.options.n, user=asked.options.user,
    )  # fmt: skip
    entry.begin(replies, asked.messages)
    kind = "chat.completion.chunk" if asked.options.stream else "chat.completion"
    answer = Answer("chatcmpl", kind, asked.model)
    messages = [_Message(service, asked.top is not None) for _ in choices]
    return await respond(http, replies, messages, answer, asked.options, entry)


def _prepare(asked: ChatRequest, service: Service) -> tuple[list[Request], list[Choice]]:
    """Encodes the conversation; slow, so it runs outside the event loop."""
    form, coder = service.form, service.vocabulary.coder
    assert form is not None
    messages = [_without_thought(message) for message in asked.messages]
    if isinstance(form, PicturedFormat):
        messages = picture_parts.decoded(messages, form)
    prompt = _prompt(asked, messages, form)
    given = _given(messages, prompt, service)
    began: list[int] = []
    grammars: list[Any] = [None] * asked.options.n
    if asked.tools.required:
        began, text = bind(asked.tools, form)
        prompt = [*_unthinking(prompt, form), *began]
        grammars = [service.grammars.lark(text, "tools") for _ in grammars]
    elif asked.grammar:
        grammars = [asked.grammar(service.grammars) for _ in grammars]
    requests = service.requests(
        prompt, asked.options, default_tokens=None, report=asked.top is not None,
        grammars=grammars, given=given,
    )  # fmt: skip
    choices = [
        Choice(
            coder,
            prompt=prompt,
            stop_ids=service.vocabulary.stop_ids,
            think_ids=service.vocabulary.think_ids,
            stops=asked.options.stops,
            fenced=form.fenced if asked.tools.given and not form.marked else None,
            marked=form.marked and bool(asked.tools.given),
            within_calls=began,
            top=asked.top,
        )
        for _ in requests
    ]
    return requests, choices


def _prompt(asked: ChatRequest, messages: Sequence[Message], form: AnyFormat) -> list[int]:
    try:
        prompt = form.encode(messages, thinking=asked.thinking, tools=asked.tools.given)
        if asked.prefix is not None:
            prompt += _begun(asked.prefix, form, prompt)
    except ValueError as error:
        raise ApiError(422, f"messages: {error}", param="messages") from error
    return prompt


def _given(messages: Sequence[Message], prompt: Sequence[int], service: Service) -> Given | None:
    """Looks at the pictures of a conversation, in the worker's thread: on several devices, programs
    that two threads start may wait for each other.
    """
    if not any(message.fields.get(PICTURES) for message in messages):
        return None
    looking = service.looking
    if looking is None:
        raise ApiError(503, "the server is starting; try again", retry_after=1)
    return service.worker.call(lambda: looking.given(messages, prompt)).result()


def _without_thought(message: Message) -> Message:
    """Drops the thought of an earlier turn, except of one that has called tools."""
    if message.calls or "reasoning_content" not in message.fields:
        return message
    fields = {key: value for key, value in message.fields.items() if key != "reasoning_content"}
    return Message(message.role, message.content, fields)


def _begun(prefix: Message, form: AnyFormat, prompt: list[int]) -> list[int]:
    """Returns the tokens of a reply's beginning; takes back a thought that the prompt has opened
    and the beginning has not.
    """
    coder, think_ids = form.vocabulary.coder, form.vocabulary.think_ids
    thought = prefix.fields.get("reasoning_content", "")
    if not thought or think_ids is None:
        prompt[:] = _unopened(prompt, form)
        return coder.encode(form.gap + prefix.content)
    opened = _unopened(prompt, form)
    begin = [] if len(opened) < len(prompt) else [think_ids[0]]
    ids = [*begin, *coder.encode(thought)]
    return [*ids, think_ids[1], *coder.encode(prefix.content)] if prefix.content else ids


def _unopened(prompt: Sequence[int], form: AnyFormat) -> list[int]:
    """Returns the prompt without a thought that it opens at its end."""
    think_ids = form.vocabulary.think_ids
    if think_ids is not None:
        for place in range(len(prompt) - 1, -1, -1):
            if prompt[place] == think_ids[0]:
                return list(prompt[:place])
            if prompt[place] == think_ids[1]:
                break
    return list(prompt)


def _unthinking(prompt: Sequence[int], form: AnyFormat) -> list[int]:
    """Returns the prompt of a reply that does not think, be it one that opens a thought."""
    opened = _unopened(prompt, form)
    think_ids = form.vocabulary.think_ids
    if form.marked and think_ids is not None and len(opened) < len(prompt):
        return [*opened, think_ids[1]]
    return opened


class _Message:
    """A message, gathered from deltas or sent in chunks."""

    def __init__(self, service: Service, report: bool) -> None:
        self._service, self._report = service, report
        self.text = self._thought = ""
        self._calls: list[dict[str, Any]] = []
        self._reports: list[Any] = []
        self._finish: str | None = None
        self._begun = False

    def add(self, delta: Delta) -> None:
        self.text += delta.content
        self._thought += delta.thought
        self._reports += delta.reports
        for piece in delta.calls:
            if piece.name is not None:
                self._calls.append(_call(piece.name))
            self._calls[piece.number]["function"]["arguments"] += piece.arguments
        self._finish = delta.finish or self._finish

    def body(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self._thought:
            message["reasoning_content"] = self._thought
        if self._calls:
            message["content"] = self.text or None
            message["tool_calls"] = self._calls
        logprobs = _logprobs(self._service, self._reports) if self._report else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finish,
        }

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        self.text += delta.content
        parts: list[dict[str, Any]] = []
        if delta.thought:
            parts.append({"content": None, "reasoning_content": delta.thought})
        if delta.content:
            parts.append({"content": delta.content})
        if delta.calls:
            parts.append({"tool_calls": [_piece(piece) for piece in delta.calls]})
        parts = parts or [{}]
        if not self._begun:
            self._begun = True
            parts[0] = {"role": "assistant", "content": "", **parts[0]}
        chunks = [
            {"index": index, "delta": part, "logprobs": None, "finish_reason": None}
            for part in parts
        ]
        if self._report and delta.reports:
            chunks[-1]["logprobs"] = _logprobs(self._service, delta.reports)
        chunks[-1]["finish_reason"] = delta.finish
        return chunks


def _call(name: str) -> dict[str, Any]:
    id = f"call_{secrets.token_hex(12)}"
    return {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}


def _piece(piece: Any) -> dict[str, Any]:
    if piece.name is None:
        return {"index": piece.number, "function": {"arguments": piece.arguments}}
    return {"index": piece.number, **_call(piece.name)}


def _logprobs(service: Service, reports: Sequence[Any]) -> dict[str, Any]:
    """Returns a chat's `logprobs`: those of the answer apart from those of the thought."""
    answer = [report for report in reports if not report.thought]
    thought = [report for report in reports if report.thought]
    found: dict[str, Any] = {"content": service.logprob_entries(answer), "refusal": None}
    if thought:
        found["reasoning_content"] = service.logprob_entries(thought)
    return found
