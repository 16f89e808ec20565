"""Ctrl-C and SIGTERM: the first finishes the step and saves the run, the second ends it at once.

Python runs signal handlers between two of its own instructions, so a handler alone would wait for a
long step or compilation to return. The kernel therefore also writes each signal's number to a pipe,
and a thread that reads the pipe does what is urgent.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GRACE_SECONDS = 2.0  # for the main thread to exit by itself while there is nothing to save


def swallows(frame: FrameType | None) -> bool:
    """Tells whether an exception that a signal's handler raises would be lost, in JAX's callback of
    the garbage collection, or become another, in the import of a compiled module, which may be an
    optional one.

    Args:
      frame: what the signal interrupted, as Python tells the handler.
    """
    if frame is not None and frame.f_code.co_name.endswith("gc_callback"):
        return True
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), importlib.machinery.ExtensionFileLoader):
            return True
        frame = frame.f_back
    return False


class StopRequest:
    """Context in which signals ask the training loop to stop instead of killing it.

    Until `defer` is called there is nothing to save: the first signal raises SystemExit, or ends
    the process if a compilation keeps Python from raising it. Outside the main thread, where Python
    allows no handlers, signals keep their usual meaning.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._deferred = False

    @property
    def exit_code(self) -> int | None:
        """128 + the first signal received (130, 143); None before one."""
        return 128 + self._received[0] if self._received else None

    def defer(self) -> None:
        """Makes signals wait: from here on the loop reads `exit_code` after each step.

        Raises:
          SystemExit: a signal came before.
        """
        if not self._deferred and self.exit_code is not None:
            raise SystemExit(self.exit_code)
        self._deferred = True

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Context in which signals wait before `defer` is called, for work that reads `exit_code`
        itself and keeps what it has finished.

        Raises:
          SystemExit: a signal came before, or came too late for that work to read it.
        """
        before = self._deferred
        self.defer()
        try:
            yield
        finally:
            self._deferred = before
        if not before and self.exit_code is not None:
            raise SystemExit(self.exit_code)

    def __enter__(self) -> StopRequest:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            self._old_wakeup = signal.set_wakeup_fd(self._write_end)
            self._old_handlers = {
                number: signal.signal(number, self._handle) for number in _SIGNALS
            }
            self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_wakeup)
            os.close(self._write_end)  # the watcher reads the end of the pipe and returns
            self._watcher.join()
            os.close(self._read_end)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between two Python instructions."""
        # Where an exception would be lost, `_watch` ends the process after the grace period.
        if not self._deferred and not swallows(frame):
            raise SystemExit(128 + number)

    def _watch(self) -> None:
        """Runs in its own thread, as soon as a signal arrives."""
        patience = None
        while True:
            ready, _, _ = select.select([self._read_end], [], [], patience)
            if not ready:
                os._exit(self.exit_code or 1)
            received = os.read(self._read_end, 64)
            if not received:
                return
            for number in received:
                if number not in _SIGNALS:
                    continue
                if self._received:
                    os._exit(128 + number)
                self._received.append(number)
                patience = None if self._deferred else _GRACE_SECONDS
                what = "finishing this step, then saving" if self._deferred else "stopping"
                name = signal.Signals(number).name
                print(
                    f"\n{name} received: {what}; once more to leave at once",
                    file=sys.stderr,
                    flush=True,
                )
