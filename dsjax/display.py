"""What a user watches: a bar at the bottom of a terminal, plain lines anywhere else.

`Display` counts steps and shares of a job, `Transfer` counts bytes; both stop with their context.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS_BETWEEN_LINES = 30.0  # of a transfer that no terminal shows


class _Screen:
    """Context that prints lines and, on a terminal, shows at most one bar below them."""

    def __init__(self, console: Console):
        self.console = console
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def say(self, text: str) -> None:
        """Prints a line as it stands: brackets are no markup, and only the terminal wraps it."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Ends the bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(
        self, *columns: ProgressColumn, total: int | None, done: int = 0, transient: bool = True
    ) -> None:
        """Starts a bar; on anything but a terminal, and while a bar is shown, does nothing."""
        if self.console.is_terminal and self._bar is None:
            self._bar = Progress(*columns, console=self.console, transient=transient)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def _update(self, done: int, text: str | None = None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text)


class Display(_Screen):
    """Shows a run: its steps, and jobs before and after them."""

    def start_steps(self, done: int, total: int) -> None:
        """Starts counting steps, of which `done` were done before; a second call does nothing."""
        self._total = total
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._start(*columns, *times, total=total, done=done, transient=False)

    def step(self, done: int) -> None:
        self._update(done)

    def log(self, step: int, short: str, full: str, step_seconds: float) -> None:
        """Shows the numbers of a step: `short` beside the bar, or `full` on a line of its own."""
        if self._bar is not None:
            self._update(step, short)
        else:
            left = duration((self._total - step) * step_seconds)
            self.say(f"step {step}/{self._total}  {full}  eta {left}")

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Context that shows that `what` goes on, of which nobody knows how far it has come: a
        spinner and its seconds on a terminal, unless a bar is shown, and a line anywhere else.
        """
        self.say(what)
        idle = self._bar is None
        self._start(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), total=None)
        try:
            yield
        finally:
            if idle:
                self.stop()

    def counting(self, what: str) -> Callable[[int, int], None]:
        """Returns a callback (done, total) that shows how far `what` has come.

        It is a bar on a terminal, and a line per quarter anywhere else.
        """
        shown = -1

        def show(done: int, total: int) -> None:
            nonlocal shown
            if self.console.is_terminal:
                self._start(TextColumn(what), BarColumn(), TimeRemainingColumn(), total=total)
                self._update(done)
                if done >= total:
                    self.stop()
                return
            quarter = 4 * done // max(total, 1)
            if quarter > shown:
                shown = quarter
                self.say(f"{what}: {25 * quarter}%")

        return show


class Transfer(_Screen):
    """Shows how many bytes of a known total have been moved, how fast, and the time left."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Starts showing `what`, of whose bytes an earlier call has moved `done`."""
        self._what, self._total, self._done, self._before = what, total, done, done
        self._started = self._shown = time.monotonic()
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._start(TextColumn(what), *columns, total=total, done=done)

    def advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        self._update(self._done)
        if self._bar is None and time.monotonic() - self._shown > _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            rate = (self._done - self._before) / (self._shown - self._started)
            left = (self._total - self._done) / max(rate, 1.0)
            self.say(
                f"{self._what}: {size(self._done)} of {size(self._total)}, {size(rate)}/s, "
                f"{left:.0f} s left"
            )


def duration(seconds: float) -> str:
    """3725.0 -> '1:02:05'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(n_bytes: float) -> str:
    """1_310_000_000_000 -> '1.31 TB': three digits, powers of 1000, as disks are sold."""
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while n_bytes >= 999.5 and len(units) > 1:
        n_bytes, units = n_bytes / 1000, units[1:]
    return f"{n_bytes:.0f} {units[0]}" if n_bytes >= 99.95 else f"{n_bytes:.3g} {units[0]}"
