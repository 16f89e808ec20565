"""Requests that run together: one row of a cache each, and what the host knows about the row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.config import ModelConfig
from dsjax.generate.decoding import Carry
from dsjax.generate.record import NOTHING, Wanted
from dsjax.generate.request import Request
from dsjax.generate.sampling import knobs

# Of a cache: a server's requests differ in length, and each length is another program.
_MIN_LENGTH, _MIN_LENGTH_ALONE = 256, 128
_FREE = Request((0,), 0)  # placeholder for a row without a request


@dataclasses.dataclass
class Open:
    """An unfinished request."""

    id: int
    request: Request
    experts: list[np.ndarray] = dataclasses.field(default_factory=list)  # of the chunks run so far


class Rows:
    """Requests and their carry.

    Attributes:
      slots: the request of each row; None for a free row.
      length: positions of the cache.
      position_B: int32, position of each row's newest token; while the prompt runs, the position
        that the first new token will take.
      recent_BW: int32, the W newest tokens, 0 before the start of the text.
      left_B: int32, how many tokens each row may still add.
      stop_ids_BX: int32, padded with -1.
      knobs: sampling settings.
      wanted: the reports that any of the rows asks for.
    """

    def __init__(self, slots: Sequence[Open | None], carry: Carry, length: int) -> None:
        self.slots, self.carry, self.length = list(slots), carry, length
        requests, width = self._requests(), carry.hidden_BWD.shape[1]
        lengths = [len(request.prompt) for request in requests]
        self.position_B: Any = np.array(lengths, np.int32)
        self.left_B: Any = np.array([request.max_new_tokens for request in requests], np.int32)
        recent = [[*[0] * width, *request.prompt][-width:] for request in requests]
        self.recent_BW: Any = np.array(recent, np.int32)
        self._set_up()

    @property
    def n_open(self) -> int:
        return sum(slot is not None for slot in self.slots)

    def free(self) -> list[int]:
        """Lists the free rows."""
        return [row for row, slot in enumerate(self.slots) if slot is None]

    def begin(self, row: int, token: int) -> None:
        """Records the first token after a row's prompt."""
        most, stop_ids = self.left_B[row], _of(self.slots[row]).stop_ids
        self.left_B[row] = 0 if token in stop_ids else max(most - 1, 0)
        self.recent_BW[row] = [*self.recent_BW[row, 1:], token]

    def release(self, row: int) -> None:
        """Frees a row. Its cache entries are never read again."""
        self.slots[row] = None
        self.left_B = np.array(self.left_B)  # arrays that a program returned are read-only
        self.left_B[row] = 0

    def take(self, other: Rows, moved: Mapping[int, int]) -> None:
        """Takes over rows from another batch, once their cache entries have been inserted.

        Args:
          moved: maps each of the other's rows to the row that it becomes here.
        """
        for name in ("position_B", "recent_BW", "left_B"):
            mine = np.array(getattr(self, name))
            mine[list(moved.values())] = getattr(other, name)[list(moved)]
            setattr(self, name, mine)
        for row, slot in moved.items():
            self.slots[slot] = other.slots[row]
            other.release(row)
        self._set_up()

    def _requests(self) -> list[Request]:
        return [_of(slot) for slot in self.slots]

    def _set_up(self) -> None:
        requests = self._requests()
        width = power_of_two(max(len(request.stop_ids) for request in requests))
        stop_ids = [
            [*request.stop_ids, *[-1] * (width - len(request.stop_ids))] for request in requests
        ]
        self.stop_ids_BX = np.array(stop_ids, np.int32)
        self.knobs = knobs([request.sampling for request in requests])
        self.wanted = NOTHING
        for request in requests:
            self.wanted = Wanted(*map(max, self.wanted, request.wanted))


def cache_length(
    config: ModelConfig, needed: int, *, chunk: int, n_drafts: int, streaming: bool = True
) -> int:
    """Chooses the length of a cache for texts of up to `needed` tokens.

    It is a power of two, so that few programs are compiled, but no more than the model's longest
    text takes. Either way whole chunks fit, and drafts beyond the end of the text.

    Args:
      streaming: whether requests of any length may come; see `Engine`.
    """
    whole_chunks = -(-(config.max_seq_len + n_drafts) // chunk) * chunk
    least = _MIN_LENGTH if streaming else _MIN_LENGTH_ALONE
    return min(max(power_of_two(needed + n_drafts), least), whole_chunks)


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def _of(slot: Open | None) -> Request:
    return slot.request if slot else _FREE
