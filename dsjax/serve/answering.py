"""Sending an answer: whole as JSON, or in chunks as server-sent events.

A client that leaves ends its request: a stream is closed by the server's framework, a whole answer
is watched for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dsjax.serve.choice import Delta
from dsjax.serve.errors import ApiError
from dsjax.serve.options import Options
from dsjax.serve.record import Entry
from dsjax.serve.replies import Replies
from dsjax.serve.service import FINGERPRINT

KEEP_ALIVE_SECONDS = 10.0
ChunkOf = Callable[[int, Delta], list[dict[str, Any]]]


class Answer:
    """What all parts of one answer have in common.

    Args:
      kind: of object, such as `chat.completion`.
    """

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self._head = {
            "id": self.id,
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def body(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        return {**self._head, "choices": choices, "usage": usage}


class Written(Protocol):
    """A choice as its route writes it.

    Attributes:
      text: what there is of it, for the log.
    """

    text: str

    def add(self, delta: Delta) -> None:
        """Takes a delta of a whole answer."""
        ...

    def body(self, index: int) -> dict[str, Any]:
        """Returns the whole."""
        ...

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Returns a delta of a stream; more than one part where two fields may not go together."""
        ...


async def respond(
    request: Request,
    replies: Replies,
    written: Sequence[Written],
    answer: Answer,
    options: Options,
    entry: Entry,
) -> Response:
    """Answers with the choices, whole or in chunks, whatever the request has chosen.

    Raises:
      ApiError: a choice failed before anything was sent.
      ClientLeft: the client has closed the connection.
    """
    if not options.stream:
        with replies:
            await whole(request, replies, lambda index, delta: written[index].add(delta))
            entry.text = [each.text for each in written]
            bodies = [each.body(index) for index, each in enumerate(written)]
            body = answer.body(bodies, replies.usage())
            return JSONResponse(body, headers={"X-Request-Id": answer.id})

    def done(failure: str) -> None:
        entry.text = [each.text for each in written]
        entry.end(replies, failure)

    replies.__enter__()
    entry.streaming = True
    try:
        return await stream(
            answer, replies, lambda index, delta: written[index].chunks(index, delta),
            usage_chunk=options.include_usage, done=done,
        )  # fmt: skip
    except BaseException:
        entry.streaming = False
        replies.__exit__()
        raise


async def whole(request: Request, replies: Replies, gather: Callable[[int, Delta], None]) -> None:
    """Gathers all deltas; ends early if the client leaves.

    Raises:
      ApiError: a choice failed.
      ClientLeft: the client has closed the connection.
    """

    async def run() -> None:
        async for item in replies.deltas():
            assert item is not None
            gather(*item)

    work = asyncio.create_task(run())
    leave = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({work, leave}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientLeft
        work.result()
    finally:
        for task in (work, leave):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ApiError):
            await work


class ClientLeft(Exception):
    """The client has closed the connection, so nobody reads an answer."""


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(
    answer: Answer,
    replies: Replies,
    chunks_of: ChunkOf,
    *,
    usage_chunk: bool,
    done: Callable[[str], None],
) -> Response:
    """Returns an answer in chunks. It begins when the first choice does, so that a request that
    cannot be served has its status.

    Args:
      chunks_of: makes chunks' `choices` of a delta; more than one where two fields of a delta may
        not go together.
      usage_chunk: whether usage comes in a chunk of its own; else the last choice's end brings it.
      done: called at the end, however it comes, with what has failed or "".
    """
    deltas = replies.deltas(KEEP_ALIVE_SECONDS)
    failure = ""
    first = await anext(deltas, None)

    async def events() -> AsyncIterator[str]:
        nonlocal failure
        item = first
        try:
            while True:
                if item is None:
                    yield ": keep-alive\n\n"
                else:
                    index, delta = item
                    over = all(choice.finish is not None for choice in replies.choices)
                    for number, choice in enumerate(parts := chunks_of(index, delta)):
                        last = over and number == len(parts) - 1 and delta.finish is not None
                        usage = replies.usage() if last and not usage_chunk else None
                        yield _event(answer.body([choice], usage))
                try:
                    item = await anext(deltas)
                except StopAsyncIteration:
                    break
            if usage_chunk:
                yield _event(answer.body([], replies.usage()))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            failure = error.message
            yield _event(error.body())

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "X-Request-Id": answer.id}
    return _Stream(events(), lambda: done(failure), media_type="text/event-stream", headers=headers)


class _Stream(StreamingResponse):
    """Calls `done` at the end, also if the client has left before the first chunk."""

    def __init__(
        self, events: AsyncIterator[str], done: Callable[[], None], **options: Any
    ) -> None:
        super().__init__(events, **options)
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
