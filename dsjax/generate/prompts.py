"""Newcomers, whose prompts run together in a cache of their own, chunk by chunk.

Equal prompts run once: each distinct one has a row, which is copied for every request that
continues it. So a group of samples of one question costs one prompt. What is known of a prompt
(`dsjax.generate.prefixes`) does not run at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dsjax.generate.decoding import Carry, Drawn
from dsjax.generate.request import Given, Request
from dsjax.generate.rows import FREE, Open, wanted
from dsjax.generate.sampling import knobs
from dsjax.generate.shapes import power_of_two
from dsjax.model.transformer import Embeddings

MIN_CHUNK = 16


class Chunk(NamedTuple):
    """The next tokens of all prompts, as `decoding.prefill` takes them."""

    tokens_BX: np.ndarray
    starts_B: np.ndarray
    lengths_B: np.ndarray
    embeddings: Embeddings | None = None  # [B, T], without the D tokens after the chunk


class Started(NamedTuple):
    """A chunk that the devices have been asked to run."""

    chunk: Chunk
    drawn: Drawn
    began: float  # time.perf_counter()

    @property
    def ended(self) -> bool:
        """Tells whether the results are there, so that reading them waits for nothing."""
        return self.drawn.tokens_X.is_ready()  # pyright: ignore[reportAttributeAccessIssue]


class Prompts:
    """Newcomers and the carry that their prompts run in.

    Attributes:
      slots: the newcomers; None for a place without one.
      prompts: the distinct prompts with their scopes, one for each row of the carry.
      rows_X: int32, the row of the carry that holds the prompt of each slot.
      known_B: int32, how many tokens of each prompt were known; set before the first chunk.
      shared: whether any row belongs to several slots.
      length: positions of the cache.
      started: the chunk that runs; None between two.
      knobs: sampling settings of the slots.
      wanted: the reports that any of them asks for, or of the examples.
      steered: whether any of them has a steering, or of the examples.
    """

    def __init__(
        self,
        slots: Sequence[Open | None],
        carry: Carry,
        length: int,
        *,
        n_drafts: int,
        examples: Sequence[Request] = (),
    ) -> None:
        """
        Args:
          examples: with them every newcomer counts as asking for what any of these does, so that
            there is one kind of program; beside a chunk of prompts that takes no time.
        """
        self.slots, self.carry, self.length = list(slots), carry, length
        self.started: Started | None = None
        self._n_drafts = n_drafts
        requests = [(slot or FREE).request for slot in slots]
        self.knobs = knobs([request.sampling for request in requests])
        self.wanted = wanted([*requests, *examples])
        self.steered = any(request.steering for request in [*requests, *examples])
        gives = [each.given for each in [*requests, *examples] if each.given]
        self._given_dim = gives[0].values.shape[1] if gives else None
        self.prompts = distinct(slots)
        row_of = {prompt: row for row, prompt in enumerate(self.prompts)}
        own = [row_of.get((each.scope, each.prompt), 0) for each in requests]
        self._given: dict[int, Given] = {
            row: each.given for row, each in zip(own, requests, strict=True) if each.given
        }
        self.rows_X = np.array(own, np.int32)
        self.shared = len(self.prompts) < self.n_open
        self._lengths_B = np.zeros(len(carry.hidden_BWD), np.int32)
        self._lengths_B[: len(self.prompts)] = [len(prompt) for _, prompt in self.prompts]
        self.known_B = np.zeros_like(self._lengths_B)
        self._ran_B = np.zeros_like(self._lengths_B)  # how many of their tokens are in the cache
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

    def know(self, row: int, count: int) -> None:
        """Records that the cache holds a prompt's first tokens, before any has run.

        Args:
          count: a multiple of the smallest chunk.
        """
        self.known_B[row] = self._ran_B[row] = count

    def in_cache(self, slot: int) -> Sequence[int]:
        """Returns the tokens of a slot's prompt that are in the cache."""
        row = self.rows_X[slot]
        return self.prompts[row][1][: self._ran_B[row]]

    def chunk(self, most: int, sizes: Sequence[int] = ()) -> Chunk:
        """Returns the next tokens of all prompts, at most `most` of each.

        A prompt that has run begins again, which computes what its cache holds already.

        Args:
          sizes: the only ones that may be, ascending; (): any power of two from MIN_CHUNK on.
        """
        rest_B = self._lengths_B - self._ran_B
        starts_B = np.where(rest_B > 0, self._ran_B, 0)
        # The cache must have room for a chunk from each of these starts on.
        room = power_of_two(self.length - int(starts_B.max()) + 1) // 2
        size = min(max(power_of_two(int(rest_B.max())), MIN_CHUNK), most, room)
        if sizes:
            # Two small chunks rather than a large one that would be mostly padding.
            sizes = [size for size in sizes if size <= room]
            size = max([size for size in sizes if size < 2 * rest_B.max()] or sizes[:1])
        tokens_BX = np.zeros((len(rest_B), size + self._n_drafts), np.int32)
        for row, (_, prompt) in enumerate(self.prompts):
            part = prompt[starts_B[row] : starts_B[row] + tokens_BX.shape[1]]
            tokens_BX[row, : len(part)] = part
        lengths_B = np.where(rest_B > 0, self._lengths_B, 0)
        return Chunk(tokens_BX, starts_B, lengths_B, self.embeddings(starts_B, size))

    def embeddings(self, starts_B: np.ndarray, size: int) -> Embeddings | None:
        """Returns what is given of the next tokens; None if no prompt, nor an example, is given
        anything.
        """
        if self._given_dim is None:
            return None
        given_BT: Any = np.zeros((len(starts_B), size), bool)
        values_BTD: Any = np.zeros((*given_BT.shape, self._given_dim), np.float32)
        for row, given in self._given.items():
            places = given.places - starts_B[row]
            inside = (places >= 0) & (places < size)
            given_BT[row, places[inside]] = True
            values_BTD[row, places[inside]] = given.values[inside]
        return Embeddings(given_BT, values_BTD)

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


def distinct(slots: Sequence[Open | None]) -> list[tuple[str, tuple[int, ...]]]:
    """Lists the scopes and prompts without repetition, in order of their first appearance."""
    requests = [slot.request for slot in slots if slot]
    return list(dict.fromkeys((request.scope, request.prompt) for request in requests))
