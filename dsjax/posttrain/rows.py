"""Training rows from conversations: packed whole into rows of one length, each seeing itself alone.

A conversation is never cut over two rows, so rows are filled as a bin packing: the longest first,
each into the row with the least room that it fits ("best fit decreasing"), which leaves few percent
empty. That is done once: with isolated attention and a loss that divides by all tokens of a batch,
it does not matter which conversations share a row. Every epoch takes the rows in another order,
a function of seed and epoch alone, so to resume it is enough to remember one number.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dsjax.data.packing import stack
from dsjax.data.shuffling import permute, stream_key
from dsjax.posttrain.messages import TokenizedConversations
from dsjax.text.tokenizer import Coder


class ConversationRows:
    """Conversations packed into rows, in a fixed order.

    `rows[i]` is {"tokens", "segment_ids": int32 [T + 1], "weights": float32 [T + 1]}. Segment ids
    number the conversations within the row from 1, 0 is padding; a token of weight 1 is predicted
    in training, from the tokens before it, one of weight 0 is only read.

    Args:
      numbers: which conversations; each has at most `sequence_length` + 1 tokens.
      pad: any id; segment id and weight mark padding.
    """

    def __init__(
        self,
        conversations: TokenizedConversations,
        numbers: np.ndarray,
        *,
        sequence_length: int,
        pad: int,
    ) -> None:
        self.sequence_length = sequence_length
        self._conversations, self._pad = conversations, pad
        self.bins = pack(conversations.lengths[numbers], sequence_length + 1)
        self._numbers = numbers
        self.tokens = int(conversations.lengths[numbers].sum())
        # A conversation's first token is never predicted.
        self.trained = sum(int(conversations.one(number)[1][1:].sum()) for number in numbers)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        tokens = np.full(self.sequence_length + 1, self._pad, np.int32)
        segment_ids = np.zeros(self.sequence_length + 1, np.int32)
        weights = np.zeros(self.sequence_length + 1, np.float32)
        end = 0
        for segment, place in enumerate(self.bins[row], 1):
            ids, trained = self._conversations.one(int(self._numbers[place]))
            span = slice(end, end + len(ids))
            tokens[span], segment_ids[span], weights[span] = ids, segment, trained
            end += len(ids)
        return {"tokens": tokens, "segment_ids": segment_ids, "weights": weights}

    @property
    def fill(self) -> float:
        """The share of positions that hold a token."""
        return self.tokens / (len(self) * (self.sequence_length + 1))

    @property
    def fingerprint(self) -> str:
        """A hash of all rows."""
        digest = hashlib.blake2b(f"{self.sequence_length} {self._pad}".encode(), digest_size=16)
        for number in self._numbers:
            for array in self._conversations.one(int(number)):
                digest.update(array.tobytes())
            digest.update(b"|")
        return digest.hexdigest()

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the given rows, stacked."""
        return stack([self[row] for row in rows])

    def prompts(self) -> list[tuple[int, ...]]:
        """Returns the tokens before each conversation's first trained one, each prompt once, in the
        order in which they first occur.
        """
        found = {}
        for number in self._numbers:
            ids, trained = self._conversations.one(int(number))
            found[tuple(ids[: int(np.argmax(trained))].tolist())] = None
        found.pop((), None)
        return list(found)

    def spread(self, count: int) -> list[int]:
        """Returns at most `count` evenly spaced row numbers, the same ones every time."""
        count = min(count, len(self))
        return [index * len(self) // count for index in range(count)]


class HeldoutRows:
    """Rows to score, with the bytes of the text that each predicts."""

    def __init__(self, rows: ConversationRows, coder: Coder) -> None:
        self.batch, self.spread, self._count = rows.batch, rows.spread, len(rows)
        self.row_bytes = np.array(
            [len(coder.decode(row["tokens"][row["weights"] > 0]).encode()) for row in rows],
            np.float64,
        )

    def __len__(self) -> int:
        return self._count


class FiniteRows(Protocol):
    """Rows of which there are so many, in a fixed order."""

    sequence_length: int

    @property
    def fingerprint(self) -> str:
        """A hash of all rows."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, row: int, /) -> dict[str, np.ndarray]: ...


class ShuffledRows:
    """Training rows by number, without end: all of them once per epoch, in an order of its own.

    Args:
      together: rows that stay neighbours in every order, such as a pair's two answers.
    """

    def __init__(self, rows: FiniteRows, *, seed: int, together: int = 1) -> None:
        self.rows, self.seed, self._together = rows, seed, together
        self._fingerprint = rows.fingerprint

    @property
    def identity(self) -> dict[str, int | float | str]:
        """What determines every row; rows with the same identity are equal."""
        return {
            "fingerprint": self._fingerprint,
            "seed": self.seed,
            "sequence_length": self.rows.sequence_length,
        }

    def epochs(self, row: int) -> float:
        """Returns how often the rows before `row` go through all of them."""
        return row / len(self.rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if row < 0:
            raise IndexError(f"row {row} is negative")
        group, side = divmod(row, self._together)
        groups = len(self.rows) // self._together
        epoch, place = divmod(group, groups)
        place = permute(place, groups, stream_key("rows", self.seed, epoch))
        return self.rows[place * self._together + side]


def pack(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Distributes items over as few bins of `room` as best fit decreasing needs; returns the items
    of each bin. The result depends on the lengths alone.
    """
    assert not len(lengths) or lengths.max() <= room, "longer items have been dropped or cut"
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # bins by the room that they have left
    rooms: list[int] = []  # those amounts of room, ascending, each once
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            index, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            index = with_room[left].pop()
            if not with_room[left]:
                del rooms[at]
        bins[index].append(item)
        left -= length
        if left:
            if not with_room[left]:
                bisect.insort(rooms, left)
            with_room[left].append(index)
    return bins


def hold_out(digests: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Divides conversations by their content: returns the numbers of those to train on, and of the
    held-out ones, `fraction` of all but one at least, both in order. Equal conversations are on the
    same side.

    Args:
      digests: uint64 [n], `TokenizedConversations.digests`.
      fraction: 0 holds none out.
    """
    count = len(digests)
    wanted = min(max(round(fraction * count), 1), count - 1) if fraction else 0
    if wanted <= 0:
        return np.arange(count), np.arange(0)
    border = np.sort(digests)[wanted - 1]
    held = digests <= border
    # All alike, or one apart: something must be left to train on.
    held = held if not held.all() else np.zeros(count, bool)
    return np.flatnonzero(~held), np.flatnonzero(held)
