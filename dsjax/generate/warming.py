"""Compiling every program of a service before its first request comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsjax.generate import decoding
from dsjax.generate.decoding import Carry
from dsjax.generate.prefixes import Prefixes
from dsjax.generate.programs import Programs
from dsjax.generate.prompts import Prompts
from dsjax.generate.request import Request
from dsjax.generate.rows import ROWS_AT_A_TIME, Open, Rows, Shapes, steer


def warm(
    programs: Programs,
    shapes: Shapes,
    examples: Sequence[Request],
    n_drafts: int,
    prefixes: Prefixes | None,
    progress: Callable[[int, int], None],
) -> None:
    """Compiles the programs for all shapes and for requests like the examples.

    Args:
      prefixes: what is known of past prompts, if anything is kept.
      progress: called with the number of programs done and in total.
    """
    sizes = [(batch, length) for length in shapes.lengths for batch in shapes.rows]
    total = len(sizes) * (len(examples) * (1 + len(shapes.chunks)) + bool(prefixes))
    total += sum(len(list(_sources(length, shapes))) for _, length in sizes)
    done = 0
    progress(done, total)

    def empty(batch: int, length: int) -> Carry:
        return programs.compiled(
            decoding.empty_carry, batch=batch, length=length, n_drafts=n_drafts
        )()

    for batch, length in sizes:
        carry = empty(batch, length)
        for compile_next in (
            _running(programs, shapes, examples, n_drafts, carry, length),
            _moving(programs, shapes, empty, carry, length),
        ):
            for _ in compile_next:
                done += 1
                progress(done, total)
        if prefixes:
            prefixes.warm(carry)
            done += 1
            progress(done, total)


def _running(
    programs: Programs,
    shapes: Shapes,
    examples: Sequence[Request],
    n_drafts: int,
    carry: Carry,
    length: int,
) -> Iterator[None]:
    """Compiles what runs prompts and decodes in a cache of this size, and yields after each."""
    batch = len(carry.hidden_BWD)
    vocab_size = programs.model.config.vocab_size
    for example in examples:
        slots = [
            Open(number, dataclasses.replace(example, owner=str(number))) for number in range(batch)
        ]
        newcomers = Prompts(slots, carry, length, n_drafts=n_drafts)
        rows = Rows(slots, carry, length)
        knobs = steer(rows.knobs, slots, vocab_size) if rows.steered else rows.knobs
        zeros_B = np.zeros(batch, np.int32)
        for size in shapes.chunks:
            tokens_BX = np.zeros((batch, size + n_drafts), np.int32)
            programs.compiled(
                decoding.prefill, carry, tokens_BX, zeros_B, zeros_B, newcomers.rows_X, knobs,
                wanted=rows.wanted,
            )  # fmt: skip
            yield
        programs.compiled(
            decoding.decode, carry, rows.position_B, rows.recent_BW, rows.left_B,
            rows.stop_ids_BX, knobs, np.int32(1), np.int32(0), wanted=rows.wanted,
        )  # fmt: skip
        yield


def _moving(
    programs: Programs,
    shapes: Shapes,
    empty: Callable[[int, int], Carry],
    carry: Carry,
    length: int,
) -> Iterator[None]:
    """Compiles what moves rows into a cache of this size, and yields after each."""
    batch = len(carry.hidden_BWD)
    for other_batch, other_length in _sources(length, shapes):
        other = empty(other_batch, other_length)
        places_X = np.zeros(min(batch, other_batch, ROWS_AT_A_TIME), np.int32)
        programs.compiled(decoding.insert, carry, other, places_X, places_X)
        yield


def _sources(length: int, shapes: Shapes) -> Iterator[tuple[int, int]]:
    """Yields the sizes of the caches whose rows may move into one of this length."""
    for other in shapes.lengths:
        if other <= length:
            yield from ((batch, other) for batch in shapes.rows)
