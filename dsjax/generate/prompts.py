"""Newcomers, whose prompts run together in a cache of their own, chunk by chunk.

Equal prompts run once: each distinct one has a row, which is copied for every request that
continues it. So a group of samples of one question costs one prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsjax.generate.decoding import Carry
from dsjax.generate.rows import FREE, Open, power_of_two, wanted
from dsjax.generate.sampling import knobs

MIN_CHUNK = 16


class Chunk(NamedTuple):
    """The next tokens of all prompts, as `decoding.prefill` takes them."""

    tokens_BX: np.ndarray
    starts_B: np.ndarray
    lengths_B: np.ndarray


class Prompts:
    """Newcomers and the carry that their prompts run in.

    Attributes:
      slots: the newcomers; None for a place without one.
      rows_X: int32, the row of the carry that holds the prompt of each slot.
      shared: whether any row belongs to several slots.
      length: positions of the cache.
      knobs: sampling settings of the slots.
      wanted: the reports that any of them asks for.
    """

    def __init__(
        self, slots: Sequence[Open | None], carry: Carry, length: int, *, n_drafts: int
    ) -> None:
        self.slots, self.carry, self.length = list(slots), carry, length
        self._n_drafts = n_drafts
        requests = [(slot or FREE).request for slot in slots]
        self.knobs = knobs([request.sampling for request in requests])
        self.wanted = wanted(requests)
        self._prompts = distinct(slots)
        row_of = {prompt: row for row, prompt in enumerate(self._prompts)}
        self.rows_X = np.array([row_of.get(each.prompt, 0) for each in requests], np.int32)
        self.shared = len(self._prompts) < sum(slot is not None for slot in slots)
        self._lengths_B = np.zeros(len(carry.hidden_BWD), np.int32)
        self._lengths_B[: len(self._prompts)] = [len(prompt) for prompt in self._prompts]
        self._ran_B = np.zeros_like(self._lengths_B)  # how many tokens of each prompt have run
        self._sharing = Counter(int(self.rows_X[i]) for i, slot in enumerate(slots) if slot)

    @property
    def n_open(self) -> int:
        return sum(slot is not None for slot in self.slots)

    @property
    def done(self) -> bool:
        """Tells whether all prompts have run."""
        return bool((self._ran_B >= self._lengths_B).all())

    def ready(self) -> list[int]:
        """Lists the slots whose prompts have run."""
        ran_B = self._ran_B >= self._lengths_B
        return [i for i, slot in enumerate(self.slots) if slot and ran_B[self.rows_X[i]]]

    def release(self, slot: int) -> None:
        """Drops a newcomer, and its prompt if no other shares it."""
        self.slots[slot] = None
        row = int(self.rows_X[slot])
        self._sharing[row] -= 1
        if not self._sharing[row]:
            self._ran_B[row] = self._lengths_B[row]

    def chunk(self, most: int) -> Chunk:
        """Returns the next tokens of all prompts, at most `most` of each.

        A prompt that has run begins again, which computes what its cache holds already.
        """
        rest_B = self._lengths_B - self._ran_B
        size = min(max(power_of_two(int(rest_B.max())), MIN_CHUNK), most)
        starts_B = np.where(rest_B > 0, self._ran_B, 0)
        tokens_BX = np.zeros((len(rest_B), size + self._n_drafts), np.int32)
        for row, prompt in enumerate(self._prompts):
            part = prompt[starts_B[row] : starts_B[row] + tokens_BX.shape[1]]
            tokens_BX[row, : len(part)] = part
        return Chunk(tokens_BX, starts_B, np.where(rest_B > 0, self._lengths_B, 0))

    def advance(self, chunk: Chunk) -> dict[int, int]:
        """Records that a chunk has run.

        Returns:
          how many of its tokens belong to the prompt of each slot; slots without any are absent.
        """
        size = chunk.tokens_BX.shape[1] - self._n_drafts
        own_B = np.clip(chunk.lengths_B - chunk.starts_B, 0, size)
        self._ran_B += own_B
        counts = {i: int(own_B[self.rows_X[i]]) for i, slot in enumerate(self.slots) if slot}
        return {i: count for i, count in counts.items() if count}


def distinct(slots: Sequence[Open | None]) -> list[tuple[int, ...]]:
    """Lists the prompts without repetition, in order of their first appearance."""
    return list(dict.fromkeys(slot.request.prompt for slot in slots if slot))
