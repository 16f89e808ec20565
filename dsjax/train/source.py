"""Where a run's batches come from: rows of a data set, or rollouts of the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from dsjax.data.loader import Loader, Rows
from dsjax.train.batches import held_rows, place_held


class Taken(NamedTuple):
    """What one optimizer step trains on."""

    batch: dict[str, jax.Array]  # on the devices, [micro-batches, sequences, ...]
    tokens: int  # that the step is counted as
    rows: range  # of the source's data: where to look when the step goes wrong
    metrics: Mapping[str, float] = {}  # the source's own numbers, logged with the step's


class Source(Protocol):
    """Hands out batches, and can be taken up again where a checkpoint was made.

    All processes make the same calls. A source may use collectives in `take`, and only there.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the data: equal on all processes, and equal again after a resume."""
        ...

    def take(self, n: int, state: Any) -> Taken:
        """Returns the next batch, made from the next `n` items (sequences, questions).

        Args:
          state: what the step is about to train. A source of rollouts generates with these weights;
            it must not keep them, since the step is given their buffers (donation). They may still
            be under way on the devices. A source that only reads ignores them.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs to go on after the batches taken so far, as JSON.

        It is asked between steps and saved with the weights of that moment. A source of rollouts
        saves what it has consumed (questions, seed), not what it generated.
        """
        ...

    def restore(self, record: Mapping[str, Any]) -> None:
        """Goes to where `record`, a `state()`, was taken.

        Raises:
          ValueError: the record is of other data; says what differs.
        """
        ...

    def close(self) -> None:
        """Stops threads that read ahead."""
        ...


class RowSource:
    """Reads rows of one length in order and spreads each batch over the mesh.

    Each process reads and places only the rows that its own devices hold.
    """

    def __init__(self, rows: Rows, mesh: Mesh, *, micro_batch_size: int, length: int) -> None:
        """`length` is that of the arrays of a row, T + 1."""
        self._mesh, self._micro_batch_size, self._length = mesh, micro_batch_size, length
        self._epochs = rows.epochs
        self._loader = Loader(rows, share=lambda n: held_rows(self._shape(n), mesh))
        self.identity = rows.identity
        self.state, self.restore = self._loader.state, self._loader.restore
        self.close = self._loader.close

    def _shape(self, n: int) -> tuple[int, int, int]:
        return n // self._micro_batch_size, self._micro_batch_size, self._length

    def take(self, n: int, state: Any) -> Taken:
        del state
        first = self._loader.next_row
        batch = place_held(self._loader.take(n), self._shape(n), self._mesh)
        metrics = {"epoch": self._epochs(first + n)}
        return Taken(batch, n * (self._length - 1), range(first, first + n), metrics)
