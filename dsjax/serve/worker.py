"""The thread that owns the engine: requests come in by a queue, tokens leave as they are drawn.

Requests wait here and not in the engine, in fair order and bounded; the engine gets one more than
it can run, so that it knows that somebody waits. Whatever a step raises ends the requests that were
running with an error, and the thread goes on: caches and known prefixes are gone, the weights are
not.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from dsjax.generate.engine import Engine
from dsjax.generate.request import Output, Request
from dsjax.serve.errors import ApiError
from dsjax.serve.fair_queue import FairQueue

_logger = logging.getLogger(__name__)
_RETRY_SECONDS = 5


class Deliver(Protocol):
    """Takes what happens to a request, in the worker's thread; an error is the last event."""

    def __call__(self, ticket: Ticket, event: Output | ApiError) -> None: ...


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request at the worker."""

    request: Request
    user: str
    deliver: Deliver
    begin_by: float  # time.monotonic() at which it is given up if nothing has come of it
    end_by: float  # and at which it is cut off
    index: int = 0  # of the choice, among those of one HTTP request
    id: int | None = None  # at the engine
    begun: bool = False


class Cut(ApiError):
    """A reply that ends before its time, because the server does; what there is of it counts."""

    def __init__(self, why: str) -> None:
        super().__init__(503, why)


class Worker:
    """Serves requests with one engine in a thread of its own.

    Args:
      max_batch: requests that the engine runs together.
      max_waiting: requests that may wait.
      observe: called after each step, in the worker's thread.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_waiting: int,
        observe: Callable[[Worker], None] = lambda worker: None,
    ) -> None:
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._waiting: FairQueue[Ticket] = FairQueue(max_waiting)
        self._running: dict[int, Ticket] = {}
        self._cancelled: list[Ticket] = []
        self._calls: list[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._observe = observe
        self._meanwhile: Iterator[object] | None = None
        self._engine: Engine | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def engine(self) -> Engine | None:
        return self._engine

    @property
    def n_waiting(self) -> int:
        with self._wake:
            return len(self._waiting)

    @property
    def n_running(self) -> int:
        return len(self._running)

    def start(self, engine: Engine, meanwhile: Iterator[object] | None = None) -> None:
        """Begins to serve.

        Args:
          meanwhile: work of which an item is done whenever there is no request; raises nothing.
        """
        self._engine, self._meanwhile = engine, meanwhile
        self._thread.start()

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queues requests, all or none.

        Raises:
          ApiError: 422, there would be no room for them even if nobody else asked; 429, there is
            none now; 503, the worker is stopping.
        """
        most = self._max_batch + self._max_waiting
        if len(tickets) > most:
            raise ApiError(
                422,
                f"n times the number of prompts is {len(tickets)}; this server takes at most "
                f"{most} replies at once (--max-batch and --max-waiting); ask for fewer",
                param="n",
            )
        with self._wake:
            if self._stopping:
                raise ApiError(503, "the server is shutting down; try again", retry_after=1)
            room = self._waiting.room() + self._max_batch - len(self._running)
            if len(tickets) > room:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests wait already; try again later",
                    retry_after=_RETRY_SECONDS,
                )
            for ticket in tickets:
                self._waiting.push(ticket.user, ticket)
            self._wake.notify()

    def cancel(self, tickets: Sequence[Ticket]) -> None:
        """Drops requests; finished ones are ignored, and nothing more is delivered of the others
        once the current step has ended.
        """
        with self._wake:
            self._cancelled += tickets
            self._wake.notify()

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Runs a function in the worker's thread between two steps, and returns its future."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._wake:
            if self._stopping:
                raise ApiError(503, "the server is shutting down; try again", retry_after=1)
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def stop(self) -> None:
        """Cuts off all requests and ends the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self.alive:
            self._thread.join()

    def _run(self) -> None:
        engine = self._engine
        assert engine is not None
        while True:
            with self._wake:
                while not (
                    self._waiting or self._cancelled or self._calls or engine.busy
                    or self._meanwhile or self._stopping
                ):  # fmt: skip
                    self._wake.wait()
                calls, self._calls = self._calls, []
                cancelled, self._cancelled = self._cancelled, []
                for ticket in cancelled:
                    self._waiting.remove(ticket)
            for function, future in calls:
                _settle(function, future)
            for ticket in cancelled:
                self._drop(engine, ticket)
            self._expire(engine)
            if self._stopping:
                self._cut_off(engine)
                return
            self._admit(engine)
            if engine.busy:
                self._step(engine)
            elif self._meanwhile and next(self._meanwhile, self) is self:
                self._meanwhile = None
            self._observe(self)

    def _admit(self, engine: Engine) -> None:
        """Gives the engine one request more than it can run."""
        while len(self._running) <= self._max_batch:
            with self._wake:
                if not self._waiting:
                    return
                ticket = self._waiting.pop()
            try:
                ticket.id = engine.add(ticket.request)
            except ValueError as error:
                ticket.deliver(ticket, ApiError(400, str(error)))
                continue
            self._running[ticket.id] = ticket

    def _step(self, engine: Engine) -> None:
        try:
            outputs = engine.step()
        except Exception:
            _logger.exception("a step failed")
            engine.abandon()
            failed = list(self._running.values())
            self._running.clear()
            for ticket in failed:
                ticket.deliver(ticket, ApiError(500, "the model failed; the server's log says how"))
            return
        for id, output in outputs.items():
            ticket = self._running[id]
            ticket.begun = True
            if output.finish is not None:
                del self._running[id]
            ticket.deliver(ticket, output)

    def _drop(self, engine: Engine, ticket: Ticket) -> None:
        if ticket.id is not None and self._running.pop(ticket.id, None):
            engine.cancel(ticket.id)

    def _expire(self, engine: Engine) -> None:
        """Gives up requests that have waited, or run, for too long."""
        now = time.monotonic()
        with self._wake:
            late = [ticket for ticket in self._waiting if ticket.begin_by < now]
            for ticket in late:
                self._waiting.remove(ticket)
        late += [each for each in self._running.values() if not each.begun and each.begin_by < now]
        for ticket in late:
            self._drop(engine, ticket)
            message = "the request waited too long for its turn; try again later"
            ticket.deliver(ticket, ApiError(503, message, retry_after=_RETRY_SECONDS))
        for ticket in list(self._running.values()):
            if ticket.end_by < now:
                self._drop(engine, ticket)
                ticket.deliver(ticket, Cut("the request ran for longer than the server allows"))

    def _cut_off(self, engine: Engine) -> None:
        with self._wake:
            waiting = [self._waiting.pop() for _ in range(len(self._waiting))]
            calls, self._calls = self._calls, []
        for _, future in calls:
            future.set_exception(Cut("the server is shutting down"))
        for ticket in [*self._running.values(), *waiting]:
            self._drop(engine, ticket)
            ticket.deliver(ticket, Cut("the server is shutting down"))


def _settle(function: Callable[[], Any], future: concurrent.futures.Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
