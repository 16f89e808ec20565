"""Requests that run together: one row of a cache each, and what the host knows about the row."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.generate.decoding import Carry
from dsjax.generate.page_files import Fetched
from dsjax.generate.record import NOTHING, Wanted
from dsjax.generate.request import Request
from dsjax.generate.sampling import Knobs, Sampling, knobs
from dsjax.generate.shapes import power_of_two

ROWS_AT_A_TIME = 32  # that one call copies to another cache


@dataclasses.dataclass(eq=False)
class Open:
    """An unfinished request.

    Attributes:
      tokens: the prompt and what has been added to it. Once the prompt has run, these are all but
        the last one in the cache.
      left: how many tokens may still be added.
      fetched: what of the prompt comes from disk.
      experts: of the chunks of the prompt that have run.
    """

    id: int
    request: Request
    fetched: Fetched | None = None
    tokens: list[int] = dataclasses.field(init=False)
    left: int = dataclasses.field(init=False)
    experts: list[np.ndarray] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens, self.left = list(self.request.prompt), self.request.max_new_tokens

    def add(self, tokens: Sequence[int]) -> None:
        """Adds new tokens, of which a stop id can only be the last."""
        self.tokens += tokens
        if self.request.steering:
            for token in tokens:
                self.request.steering.push(token)
        stopped = bool(tokens) and tokens[-1] in self.request.stop_ids
        self.left = 0 if stopped else self.left - len(tokens)


# Stands for a row without a request; it draws nothing.
FREE = Open(0, Request((0,), 0, sampling=Sampling(temperature=0)))


class Rows:
    """Requests and their carry.

    Attributes:
      slots: the request of each row; None for a free row.
      rows_X: int32, the row of the carry that each slot has.
      length: positions of the cache.
      position_B: int32, position of each row's newest token.
      recent_BW: int32, the W newest tokens, 0 before the start of the text.
      left_B: int32, how many tokens each row may still add.
      stop_ids_BX: int32, padded with -1.
      knobs: sampling settings.
      likeliest: whether they make every row take its most likely token.
      wanted: the reports that any of the rows asks for.
      steered: whether any of them has a steering. Like `wanted` and `likeliest`, it stays until the
        rows change, so that the program does.
    """

    def __init__(self, slots: Sequence[Open | None], carry: Carry, length: int) -> None:
        self.slots, self.carry, self.length = list(slots), carry, length
        self.rows_X = np.arange(len(self.slots), dtype=np.int32)
        self._set_up()

    @property
    def n_open(self) -> int:
        return len(self.open())

    def open(self) -> list[int]:
        """Lists the rows that have a request."""
        return [row for row, slot in enumerate(self.slots) if slot]

    def free(self) -> list[int]:
        """Lists the free rows."""
        return [row for row, slot in enumerate(self.slots) if slot is None]

    def in_cache(self, row: int) -> Sequence[int]:
        """Returns the tokens of a row's request that are in the cache."""
        slot = self.slots[row]
        return slot.tokens[:-1] if slot else ()

    def release(self, row: int) -> None:
        """Frees a row. Its cache entries are never read again."""
        self.slots[row] = None
        self.left_B = np.array(self.left_B)  # arrays that a program returned are read-only
        self.left_B[row] = 0

    def put(self, newcomers: Mapping[int, Open | None]) -> None:
        """Puts requests into free rows, once their cache entries have been inserted there."""
        for row, open_ in newcomers.items():
            self.slots[row] = open_
        self._set_up()

    def _set_up(self) -> None:
        rows = [slot or FREE for slot in self.slots]
        requests, width = [row.request for row in rows], self.carry.hidden_BWD.shape[1]
        self.position_B: Any = np.array([len(row.tokens) - 1 for row in rows], np.int32)
        self.left_B: Any = np.array([row.left for row in rows], np.int32)
        recent = [[*[0] * width, *row.tokens[-width:]][-width:] for row in rows]
        self.recent_BW: Any = np.array(recent, np.int32)
        width = power_of_two(max(len(request.stop_ids) for request in requests))
        stop_ids = [
            [*request.stop_ids, *[-1] * (width - len(request.stop_ids))] for request in requests
        ]
        self.stop_ids_BX = np.array(stop_ids, np.int32)
        self.knobs = knobs([request.sampling for request in requests])
        self.likeliest = not np.any(self.knobs.temperature_B)
        self.wanted = wanted(requests)
        self.steered = any(request.steering for request in requests)


def wanted(requests: Sequence[Request]) -> Wanted:
    """Returns the reports that any of the requests asks for."""
    found = NOTHING
    for request in requests:
        most: Any = map(max, found, request.wanted)
        found = Wanted(*most)
    return found


def steer(knobs: Knobs, slots: Sequence[Open | None], vocab_size: int) -> Knobs:
    """Returns sampling settings with the bias that each request's steering wants now."""
    bias_BV = np.zeros((len(slots), vocab_size), np.float32)
    for row, slot in enumerate(slots):
        own = slot.request.steering.bias() if slot and slot.request.steering else None
        if own is not None:
            bias_BV[row] = own
    return knobs._replace(bias_BV=bias_BV)
