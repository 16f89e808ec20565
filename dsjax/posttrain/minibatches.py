"""Answers to packed rows: minibatches of equal shapes, with the weights of the loss as data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsjax.data.shuffling import shuffled, stream_key
from dsjax.model import token_sets
from dsjax.posttrain.advantages import Average, token_weights
from dsjax.posttrain.rollout import Answer


class Sample(NamedTuple):
    """An answer to train on."""

    prompt: Sequence[int]
    answer: Answer
    advantages: np.ndarray | float  # [tokens of the answer], or one for all

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer.tokens)


class Layout(NamedTuple):
    """The shape of packed rows.

    Attributes:
      length: tokens per row, T + 1.
      unit: rows that a minibatch is a multiple of.
      micro_batch: rows per forward pass; divides `unit`.
      pad: the id of padding.
      n_experts: among which padding spreads its choices, where choices are replayed.
    """

    length: int
    unit: int
    micro_batch: int
    pad: int
    n_experts: int


def split_samples(
    samples: Sequence[Sample], count: int, *, seed: int, step: int
) -> list[list[Sample]]:
    """Deals a step's samples out to `count` minibatches, in a random order."""
    order = shuffled(len(samples), stream_key("minibatches", seed, step))
    return [[samples[i] for i in part] for part in np.array_split(order, count)]


def pack(
    minibatches: Sequence[Sequence[Sample]], layout: Layout, average: Average, longest: int
) -> dict[str, np.ndarray]:
    """Packs samples into rows, as `dsjax.posttrain.policy` reads them.

    Every minibatch gets as many rows as the fullest one needs, rounded up to few sizes, since each
    is another compilation.

    Args:
      longest: the most tokens of an answer, for the "constant" average.

    Returns:
      arrays [minibatches, micro-batches, rows, T + 1], and if the answers have them, `experts`
      [minibatches, micro-batches, rows, T + 1, L, K] and `kept` [minibatches, micro-batches, rows,
      T + 1, X].
    """
    packed = [_rows(samples, layout.length) for samples in minibatches]
    units = rounded_up(max(-(-max(map(len, packed)) // layout.unit), 1))
    shape = (len(packed), units * layout.unit, layout.length)
    batch = {
        "tokens": np.full(shape, layout.pad, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "weights": np.zeros(shape, np.float32),
        "advantages": np.zeros(shape, np.float32),
        "samp": np.zeros(shape, np.float32),
    }
    if experts := _empty_experts(minibatches, shape, layout):
        batch["experts"] = experts[0]
    sets = (s.answer.kept for samples in minibatches for s in samples)
    if (first := next((words for words in sets if words is not None), None)) is not None:
        batch["kept"] = np.full((*shape, first.shape[-1]), token_sets.EVERYTHING, np.uint32)
    for number, (samples, rows) in enumerate(zip(minibatches, packed, strict=True)):
        lengths = [len(sample.answer.tokens) for sample in samples]
        weights = token_weights(lengths, average, longest)
        for row, members in enumerate(rows):
            start = 0
            for segment, index in enumerate(members, start=1):
                place = (number, row, slice(start, start + samples[index].length))
                _write(batch, place, samples[index], segment, weights[index])
                start += samples[index].length
    cut = len(packed), -1, layout.micro_batch
    return {name: array.reshape(*cut, *array.shape[2:]) for name, array in batch.items()}


def rounded_up(count: int) -> int:
    """Returns the next number of at most three significant bits: 1 to 8, 10, 12, 14, 16, 20 ..."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step


def _rows(samples: Sequence[Sample], length: int) -> list[list[int]]:
    """Fills rows with samples, longest first, each into the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(samples)), key=lambda i: (-samples[i].length, i)):
        needed = samples[index].length
        row = next((r for r, left in enumerate(room) if left >= needed), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(index)
        room[row] -= needed
    return rows


def _empty_experts(
    minibatches: Sequence[Sequence[Sample]], shape: tuple[int, ...], layout: Layout
) -> list[np.ndarray]:
    """Allocates expert choices [minibatches, rows, T + 1, L, K]; empty if there are none.

    Padding takes turns among all experts: were it all the first's, that one would be overrun.
    """
    given = (s.answer.experts for samples in minibatches for s in samples)
    first = next((experts for experts in given if experts is not None), None)
    if first is None:
        return []
    _, layers, chosen = first.shape
    turns = np.arange(shape[-1])[:, None] * chosen + np.arange(chosen)[None]
    turns = (turns % layout.n_experts).astype(np.int32)[:, None]
    return [np.broadcast_to(turns, (*shape, layers, chosen)).copy()]


def _write(
    batch: dict[str, np.ndarray],
    place: tuple[int, int, slice],
    sample: Sample,
    segment: int,
    weight: float,
) -> None:
    number, row, span = place
    prompt, answer = sample.prompt, sample.answer
    own = slice(span.start + len(prompt), span.stop)
    batch["tokens"][number, row, span] = [*prompt, *answer.tokens]
    batch["segment_ids"][number, row, span] = segment
    batch["weights"][number, row, own] = weight
    batch["advantages"][number, row, own] = sample.advantages
    batch["samp"][number, row, own] = answer.logprobs
    if answer.kept is not None:
        batch["kept"][number, row, own] = answer.kept
    if answer.experts is not None:
        # The last token was never run, and nothing that counts depends on its experts.
        batch["experts"][number, row, span.start : span.stop - 1] = answer.experts
