"""Batches of training rows, read ahead by Grain's threads.

Rows have global numbers, and an optimizer step takes the next n of them. With several processes,
each reads those rows of a batch that its own devices hold. The global batch, and the state, are
therefore the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from dsjax.data.packing import stack

_STATE_VERSION = 1
_REMEDIES = {
    "version": "the checkpoint is of another version of dsjax",
    "fingerprint": "the text, the split or the tokenizer has changed",
    "seed": "set data.seed back",
    "sequence_length": "set data.sequence_length back",
    "fim_rate": "set data.fim_rate back",
    "weights": "set data.weights back",
}


class Rows(Protocol):
    """Training rows by number, without end: a finite data set repeats, epoch after epoch.

    `PackedSequences` and `MixedRows` are two kinds. Several threads read rows at the same time.
    """

    @property
    def identity(self) -> Mapping[str, int | float | str]:
        """What determines every row: rows with the same identity are equal."""
        ...

    def epochs(self, row: int, /) -> float:
        """Returns how often the rows before `row` go through the data."""
        ...

    def __getitem__(self, row: int, /) -> dict[str, np.ndarray]:
        """Returns the arrays of a row; names, shapes and dtypes are the same in all rows."""
        ...


class Loader:
    """Hands out this process's share of the rows, in order.

    Args:
      rows: the same on all processes.
      share: n -> which of the rows 0 to n - 1 of a batch this process reads, ascending.
      threads: number of readers, which keep two batches ready.

    Attributes:
      next_row: number of the first row of the next batch.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        share: Callable[[int], np.ndarray] = np.arange,
        threads: int = 2,
    ) -> None:
        self._rows = rows
        self._share = share
        self._threads = threads
        self.next_row = 0
        self._batch_size = 0
        self._held = share(0)
        self._reader: Any = None

    def take(self, n: int) -> dict[str, np.ndarray]:
        """Takes the next `n` rows, and returns this process's share of them, stacked:
        {"tokens", "segment_ids"}, int32 [rows of the share, T+1].
        """
        if self._reader is None or n != self._batch_size:
            # Grain is told all coming rows in advance, assuming that n stays. After a change (a
            # batch-size ramp) it starts again, at the cost of the first batch.
            self.close()
            self._batch_size, self._held = n, self._share(n)
            self._reader = self._read_ahead()
        try:
            batch = stack([next(self._reader) for _ in self._held])
        except BaseException:
            self.close()  # an interrupt may have come between two rows
            raise
        self.next_row += n
        return batch

    def state(self) -> dict[str, int | float | str]:
        """Returns what `restore` needs, as JSON, equal on all processes.

        Rows read ahead but not taken do not count.
        """
        return {"version": _STATE_VERSION, "next_row": self.next_row, **self._rows.identity}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Goes to where `record`, a `state()`, was taken, on any number of processes.

        Raises:
          ValueError: the record belongs to other rows; lists all that differs.
        """
        own = self.state()
        differing = [key for key in own if key != "next_row" and record.get(key) != own[key]]
        if differing:
            lines = [
                f"{key} was {record.get(key)}, is {own[key]} ({_REMEDIES.get(key, 'set it back')})"
                for key in differing
            ]
            raise ValueError("the data is not that of the checkpoint: " + "; ".join(lines))
        next_row = record.get("next_row")
        if not isinstance(next_row, int) or next_row < 0:
            raise ValueError(
                f"the checkpoint's data state has next_row={next_row!r}, which is no row number; "
                "the checkpoint is damaged: go back to an earlier one"
            )
        self.close()
        self.next_row = next_row

    def close(self) -> None:
        """Stops reading ahead; the next `take` starts it again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read_ahead(self) -> Any:
        import grain  # here, since importing it takes a second

        share = _Share(self._rows, self.next_row, self._held, self._batch_size)
        # Threads, not worker processes: a row is a few copies from mapped memory, and a parent that
        # is killed leaves its workers running.
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=2 * len(self._held)
        )
        return iter(grain.MapDataset.source(share).to_iter_dataset(options))


class _Share:
    """One process's rows, for Grain to read by index, if every step takes `batch_size`."""

    def __init__(self, rows: Rows, first: int, held: np.ndarray, batch_size: int) -> None:
        self._rows = rows
        self._first = first
        self._held = held
        self._batch_size = batch_size

    def __len__(self) -> int:
        return 1 << 62  # rows do not end, but Grain needs a length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, place = divmod(index, len(self._held))
        return self._rows[self._first + step * self._batch_size + int(self._held[place])]
