"""The requests that run together, one per row of a cache."""

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

_MIN_LENGTH = 256  # of a cache
_FREE = Request((0,), 0)  # stands in the arrays for a row that no request has


@dataclasses.dataclass
class Open:
    """A request that is not finished."""

    id: int
    request: Request
    experts: list[np.ndarray] = dataclasses.field(default_factory=list)  # of the prompt so far


class Rows:
    """Requests and their cache.

    Attributes:
      slots: the request of each row; None where the row is free.
      position_B: int32, where each row's newest token stands; while its prompt runs, where the
        first new one will.
      recent_BW: int32, the newest tokens, 0 where there are none yet.
      left_B: int32, how many tokens each row may still add.
      stop_ids_BX: int32, filled up with -1.
      knobs: how each row draws.
      wanted: what any of the rows wants reported.
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
        """The rows that no request has."""
        return [row for row, slot in enumerate(self.slots) if slot is None]

    def begin(self, row: int, token: int) -> None:
        """Takes in the first token after a row's prompt."""
        most, stop_ids = self.left_B[row], _of(self.slots[row]).stop_ids
        self.left_B[row] = 0 if token in stop_ids else max(most - 1, 0)
        self.recent_BW[row] = [*self.recent_BW[row, 1:], token]

    def release(self, row: int) -> None:
        """Makes a row free; what its cache holds is never read again."""
        self.slots[row] = None
        self.left_B = np.array(self.left_B)  # what a program returned cannot be written to
        self.left_B[row] = 0

    def take(self, other: Rows, moved: Mapping[int, int]) -> None:
        """Takes over the numbers of another's rows; keys are its rows, values ours."""
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


def cache_length(config: ModelConfig, needed: int, *, chunk: int, n_drafts: int) -> int:
    """Length of a cache for texts of `needed` tokens: a power of two, or what the longest text that
    the model allows needs if that is less; either way room for whole chunks, and for drafts beyond
    the end.
    """
    whole_chunks = -(-(config.max_seq_len + n_drafts) // chunk) * chunk
    return min(max(power_of_two(needed + n_drafts), _MIN_LENGTH), whole_chunks)


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()


def _of(slot: Open | None) -> Request:
    return slot.request if slot else _FREE
