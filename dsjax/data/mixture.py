"""Rows of several sets of documents, each with its share of all rows, whatever its size.

Row i belongs to one of the sets, and is the next row of that set: both follow from i in closed
form, so the data of a run is still a function of the row numbers alone, and the one number that a
checkpoint holds is the position in every set. Shares are exact: of the first rows up to any
multiple of BLOCK a set has its share, within as many rows as there are sets; inside a block the
order is random.

A set is read as often as its share asks for, epoch after epoch, each in an order of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from dsjax.data.packing import PackedSequences
from dsjax.data.shuffling import permute, stream_key

BLOCK = 1024
_ONE = 32  # bits: shares are whole numbers of 2**-32


class MixedRows:
    """Training rows by number, without end; `dsjax.data.loader.Rows`."""

    def __init__(
        self, parts: Sequence[PackedSequences], weights: Sequence[float], *, seed: int
    ) -> None:
        """
        Args:
          parts: with one sequence length.
          weights: of the parts' rows, positive, in any unit.
        """
        assert len(parts) == len(weights) and len({part.sequence_length for part in parts}) == 1
        self.parts, self.seed = parts, seed
        self.shares = [weight / sum(weights) for weight in weights]
        # Of what the parts before leave, each takes this much.
        left = [sum(weights[index:]) for index in range(len(weights))]
        self._taken = [round(w / rest * 2**_ONE) for w, rest in zip(weights, left, strict=True)]

    @property
    def identity(self) -> dict[str, int | float | str]:
        """What determines every row; rows with the same identity are equal."""
        own = [part.identity for part in self.parts]
        fingerprints = " ".join(str(each["fingerprint"]) for each in own)
        digest = hashlib.blake2b(fingerprints.encode(), digest_size=16).hexdigest()
        weights = ",".join(f"{share:.9g}" for share in self.shares)
        return own[0] | {"fingerprint": digest, "weights": weights}

    def epochs(self, row: int) -> float:
        """Returns how often the rows before `row` go through as many tokens as all parts have."""
        tokens = [part.sequence_length / part.epochs(1) for part in self.parts]
        return row * self.parts[0].sequence_length / sum(tokens)

    def counts(self, row: int) -> list[int]:
        """Returns how many of the rows before `row` are of each part."""
        counts = []
        for share in self._taken[:-1]:
            counts.append(row * share >> _ONE)
            row -= counts[-1]
        return [*counts, row]

    def place(self, row: int) -> tuple[int, int]:
        """Returns the part of a row, and its number there."""
        block, inside = divmod(row, BLOCK)
        row = block * BLOCK + permute(inside, BLOCK, stream_key("mixture", self.seed, block))
        for part, share in enumerate(self._taken[:-1]):
            before = row * share >> _ONE
            if (row + 1) * share >> _ONE > before:
                return part, before
            row -= before
        return len(self.parts) - 1, row

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if row < 0:
            raise IndexError(f"row {row} is negative")
        part, own = self.place(row)
        return self.parts[part][own]
