"""What a conversion shows: a bar with bytes per second and the time left on a terminal, plain lines
anywhere else.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_SECONDS_BETWEEN_LINES = 30.0


class Transfer:
    """Context that shows how many bytes of a known total have come through."""

    def __init__(self, console: Console):
        self._console = console
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Starts to show `what`, of whose bytes `done` were there before."""
        self._what, self._total, self._done, self._before = what, total, done, done
        self._started = self._shown = time.monotonic()
        if self._console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(TextColumn(what), *columns, console=self._console, transient=True)
            self._task = self._bar.add_task(what, total=total, completed=done)
            self._bar.start()

    def advance(self, n_bytes: int) -> None:
        self._done += n_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._shown > _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            rate = (self._done - self._before) / (self._shown - self._started)
            left = (self._total - self._done) / max(rate, 1.0)
            self.say(
                f"{self._what}: {size(self._done)} of {size(self._total)}, {size(rate)}/s, "
                f"{left:.0f} s left"
            )

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


class Converted(NamedTuple):
    """What one call has done; what an interrupted one had done before it is not counted."""

    tensors: int
    n_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = size(self.n_bytes / max(self.seconds, 1e-9))
        return f"{self.tensors:,} tensors, {size(self.n_bytes)} in {self.seconds:.1f} s, {rate}/s"


def size(n_bytes: float) -> str:
    """1_310_000_000_000 -> '1.31 TB': three digits, powers of a thousand as disks are sold."""
    units = ["bytes", "KB", "MB", "GB", "TB"]
    while n_bytes >= 999.5 and len(units) > 1:
        n_bytes, units = n_bytes / 1000, units[1:]
    return f"{n_bytes:.0f} {units[0]}" if n_bytes >= 99.95 else f"{n_bytes:.3g} {units[0]}"
