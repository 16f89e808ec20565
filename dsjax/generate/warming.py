"""Compiling every program of a service before its first request comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsjax.generate import decoding
from dsjax.generate.decoding import Carry
from dsjax.generate.prefill import Prefill
from dsjax.generate.programs import Programs
from dsjax.generate.prompts import Chunk, Prompts
from dsjax.generate.request import Request
from dsjax.generate.rows import ROWS_AT_A_TIME, Open, Rows, steer
from dsjax.generate.sampling import Knobs
from dsjax.generate.shapes import Shapes


class Warming:
    """The programs for all shapes and for requests like the examples, the smallest first."""

    def __init__(
        self,
        programs: Programs,
        prompting: Prefill,
        shapes: Shapes,
        examples: Sequence[Request],
        n_drafts: int,
    ) -> None:
        self._programs, self._prompting = programs, prompting
        self._shapes, self._examples, self._n_drafts = shapes, examples, n_drafts

    def run(self) -> Iterator[tuple[int, int]]:
        """Compiles one program after the other, and yields before the first and after each how many
        are done and how many there are.
        """
        every = [compile_one for size in self._sizes() for compile_one in self._of(*size)]
        if (prefixes := self._prompting.prefixes) and prefixes.on_disk:
            every.insert(0, prefixes.warm_files)
        yield 0, len(every)
        for number, compile_one in enumerate(every):
            compile_one()
            yield number + 1, len(every)

    def _sizes(self) -> list[tuple[int, int]]:
        return [(batch, length) for length in self._shapes.lengths for batch in self._shapes.rows]

    def _of(self, batch: int, length: int) -> Iterator[Callable[[], object]]:
        """Yields what compiles each program for a cache of this size."""
        runs_prompts = batch in self._shapes.newcomers
        yield lambda: self._allocates(batch, length)
        if runs_prompts:
            if self._prompting.apart:
                yield lambda: self._prompting.empty_carry(batch, length)
            for size in self._shapes.chunks:
                yield lambda size=size: self._prefills(batch, length, size)
        for example in self._examples:
            yield lambda example=example: self._decodes(batch, length, example)
            if self._programs.on_gpu and not example.steering:
                yield lambda example=example: self._decodes(batch, length, example, unattended=True)
        for source in self._shapes.sources(batch, length):
            yield lambda source=source: self._moves(batch, length, source)
        if self._prompting.apart:
            yield lambda: self._takes_over(batch, length)
        if prefixes := self._prompting.prefixes:
            if runs_prompts:
                yield lambda: prefixes.warm_fill(self._prompting.empty_carry(batch, length))
            if runs_prompts or not self._prompting.apart:
                yield lambda: prefixes.warm_save(self._prompting.empty_carry(batch, length))

    def _allocates(self, batch: int, length: int) -> Carry:
        return self._programs.compiled(
            decoding.empty_carry, batch=batch, length=length, n_drafts=self._n_drafts
        )()

    def _prefills(self, batch: int, length: int, size: int) -> None:
        newcomers = self._newcomers(batch, length)
        tokens_BX = np.zeros((batch, size + self._n_drafts), np.int32)
        zeros_B = np.zeros(batch, np.int32)
        chunk = Chunk(tokens_BX, zeros_B, zeros_B, newcomers.embeddings(zeros_B, size))
        self._prompting.compiled(newcomers, chunk, self._knobs(newcomers))

    def _decodes(
        self, batch: int, length: int, example: Request, *, unattended: bool = False
    ) -> None:
        carry = self._allocates(batch, length)
        rows = Rows(self._slots(example, batch), carry, length)
        self._programs.compiled(
            decoding.decode, carry, rows.position_B, rows.recent_BW, rows.left_B,
            rows.stop_ids_BX, self._knobs(rows), None if unattended else np.int32(1), np.int32(0),
            wanted=rows.wanted,
        )  # fmt: skip

    def _moves(self, batch: int, length: int, source: tuple[int, int]) -> None:
        places_X = np.zeros(min(batch, source[0], ROWS_AT_A_TIME), np.int32)
        carry, other = self._allocates(batch, length), self._allocates(*source)
        self._programs.compiled(decoding.insert, carry, other, places_X, places_X)

    def _takes_over(self, batch: int, length: int) -> None:
        """Compiles what hands rows of prompts over to a batch of this size, and replies back."""
        source = batch if batch in self._shapes.newcomers else self._shapes.newcomers[0]
        sent = self._prompting.warm_sending(self._newcomers(source, length))
        slots = self._slots(self._examples[0], batch)
        self._prompting.warm_taking(Rows(slots, self._allocates(batch, length), length), sent)

    def _newcomers(self, batch: int, length: int) -> Prompts:
        slots = self._slots(self._examples[0], batch)
        carry = self._prompting.empty_carry(batch, length)
        return Prompts(slots, carry, length, n_drafts=self._n_drafts, examples=self._examples)

    def _knobs(self, batch: Prompts | Rows) -> Knobs:
        vocab_size = self._programs.model.config.vocab_size
        return steer(batch.knobs, batch.slots, vocab_size) if batch.steered else batch.knobs

    def _slots(self, example: Request, batch: int) -> list[Open]:
        """Returns requests with prompts of their own."""
        return [
            Open(number, dataclasses.replace(example, owner=str(number))) for number in range(batch)
        ]
