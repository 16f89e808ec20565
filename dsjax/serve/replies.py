"""The answer to one HTTP request: its choices as they arrive, and what they cost."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from dsjax.generate.request import Output, Request
from dsjax.serve.choice import Choice, Delta
from dsjax.serve.errors import ApiError
from dsjax.serve.metrics import Metrics
from dsjax.serve.worker import Cut, Ticket, Worker


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long requests may take, in seconds."""

    wait: float = 600.0  # until the first token
    total: float = 3600.0


class Replies:
    """Runs the choices of one HTTP request. Used as a context, which drops what is unfinished.

    Args:
      requests: one per choice, for the engine.
      choices: what reads each one's tokens.
      n: how many choices each prompt has, one after the other.
      user: whose turn it is, for the fair order.
    """

    def __init__(
        self,
        worker: Worker,
        metrics: Metrics,
        limits: Limits,
        requests: Sequence[Request],
        choices: Sequence[Choice],
        *,
        n: int,
        user: str,
    ) -> None:
        self._worker, self._metrics = worker, metrics
        self.choices = list(choices)
        self._n = n
        self._n_prompt = sum(len(request.prompt) for request in requests[::n])
        self._cached = [0] * len(requests[::n])  # tokens of each prompt that were known
        self.first_seconds: float | None = None  # until the first token
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Output | ApiError]] = asyncio.Queue()
        self._tickets = [
            Ticket(
                request, user, self._deliver, self._began + limits.wait,
                self._began + limits.total, index,
            )
            for index, request in enumerate(requests)
        ]  # fmt: skip

    def __enter__(self) -> Replies:
        """Queues the requests.

        Raises:
          ApiError: 429 or 503.
        """
        self._worker.submit(self._tickets)
        return self

    def account(self, seconds: float) -> None:
        """Counts the request, which took this long, in the metrics."""
        usage, metrics = self.usage(), self._metrics
        metrics.prompt.inc(usage["prompt_tokens"])
        metrics.cached.inc(usage["prompt_cache_hit_tokens"])
        metrics.whole.observe(seconds)
        longest = max(choice.n_tokens for choice in self.choices)
        if self.first_seconds is not None and longest > 1:
            metrics.between.observe((seconds - self.first_seconds) / (longest - 1))

    def __exit__(self, *exception: object) -> None:
        left = [ticket for ticket in self._tickets if self.choices[ticket.index].finish is None]
        if left:
            self._worker.cancel(left)
            self._metrics.aborted.inc(len(left))

    async def deltas(self, every: float | None = None) -> AsyncIterator[tuple[int, Delta] | None]:
        """Yields the index of a choice and what is new of it; with `every`, None after that many
        seconds of nothing.

        Raises:
          ApiError: a choice failed, or was not begun in time.
        """
        while any(choice.finish is None for choice in self.choices):
            event = await self._next(every)
            if event is None:
                yield None
                continue
            index, output = event
            choice = self.choices[index]
            if choice.finish is not None:
                continue
            if isinstance(output, Cut) and choice.n_tokens:
                yield index, choice.cut()
                continue
            if isinstance(output, ApiError):
                raise output
            self._note(index, output)
            if delta := choice.push(output):
                yield index, delta
            if choice.finish is not None and output.finish is None:
                self._worker.cancel([self._tickets[index]])

    def usage(self) -> dict[str, Any]:
        """Returns the tokens so far, as DeepSeek's API counts them."""
        prompt = self._n_prompt  # each once, however many choices it has
        completion = sum(choice.n_tokens for choice in self.choices)
        cached = sum(self._cached)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "reasoning_tokens": sum(choice.n_thought for choice in self.choices)
            },
            "prompt_cache_hit_tokens": cached,
            "prompt_cache_miss_tokens": prompt - cached,
        }

    def _note(self, index: int, output: Output) -> None:
        prompt = index // self._n
        self._cached[prompt] = max(self._cached[prompt], output.cached_tokens)
        seconds = time.monotonic() - self._began
        if self.first_seconds is None:
            self.first_seconds = seconds
            self._metrics.first_token.observe(seconds)
        self._metrics.generated.inc(len(output.tokens))

    async def _next(self, every: float | None) -> tuple[int, Output | ApiError] | None:
        if every is None:
            return await self._events.get()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(every):
                return await self._events.get()
        return None

    def _deliver(self, ticket: Ticket, event: Output | ApiError) -> None:
        # The loop has ended if the server is being torn down.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (ticket.index, event))
