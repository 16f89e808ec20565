"""One line of the log per request, in JSON; without any text unless that is asked for."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from typing import Any

from dsjax.serve.replies import Replies

_logger = logging.getLogger("dsjax.serve.access")


class Entry:
    """What is known of a request so far.

    Attributes:
      text: of its choices so far, written only with `texts`.
    """

    def __init__(self, method: str, path: str, user: str, *, texts: bool) -> None:
        self._fields: dict[str, Any] = {"method": method, "path": path, "user": user}
        self._texts = texts
        self._began = time.monotonic()
        self._replies: Replies | None = None
        self._prompt: Any = None
        self.text: list[str] = []
        self.streaming = False  # its line is written when the stream ends

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def begin(self, replies: Replies, prompt: Sequence[Any]) -> None:
        """Notes what the engine is asked to do."""
        self._replies, self._prompt = replies, prompt

    def end(self, replies: Replies, failure: str) -> None:
        """Ends a streamed answer: writes its line and drops what is unfinished."""
        replies.__exit__()
        self.write(200, failure)

    def write(self, status: int, error: str = "") -> None:
        """Writes the line; metrics of the request's tokens go with it."""
        fields = {**self._fields, "status": status, "seconds": round(self.seconds, 4)}
        replies = self._replies
        if replies is not None:
            usage = replies.usage()
            fields |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
            fields["first_token_seconds"] = replies.first_seconds
            fields["finish"] = [choice.finish for choice in replies.choices]
            replies.account(self.seconds)
        if error:
            fields["error"] = error
        if self._texts and replies is not None:
            fields |= {"prompt": _plain(self._prompt), "text": self.text}
        _logger.info("%s", json.dumps(fields, default=str))


def _plain(prompt: Any) -> Any:
    return [str(getattr(each, "content", each)) for each in prompt or ()]
