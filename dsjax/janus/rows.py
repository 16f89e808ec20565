"""Training rows of examples that see, read and draw, in a fixed ratio.

Examples are packed whole into rows of one length, each row of one kind, each example seeing itself
alone (`dsjax.posttrain.rows.pack`). Every micro-batch has the same numbers of rows of each kind, in
the order see, text, draw; a kind is read epoch after epoch at its own pace, each epoch in an order
of its own. All of it follows from seed and row number, so to resume it is enough to remember one
number.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dsjax.data.shuffling import mix, permute, stream_key
from dsjax.infer.drawing import blanked
from dsjax.infer.pictured import PicturedFormat
from dsjax.janus.encodings import square_of
from dsjax.janus.examples import Examples
from dsjax.posttrain.rows import pack
from dsjax.vision import pictures


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of every row.

    Attributes:
      length: tokens, T + 1.
      n_pictures: squares for which there is room.
      size: sides of a square.
      large: sides of what a second tower sees of it; 0: there is none.
      n_drawings: by a flow, for which there is room.
      latents: of such a drawing, rows, columns and channels; (): the model does not draw by a flow.
      drawn: sides of what a tower sees of such a drawing; 0: nothing.
    """

    length: int
    n_pictures: int
    size: int
    large: int = 0
    n_drawings: int = 0
    latents: tuple[int, ...] = ()
    drawn: int = 0


class ExampleRows:
    """Rows of one kind by number, without end; `dsjax.janus.objective` says what is in a row.

    Args:
      numbers: which of the examples.
      blank: share of the drawings of an epoch whose prompt is blanked out.
    """

    def __init__(
        self,
        examples: Examples,
        numbers: np.ndarray,
        form: PicturedFormat,
        length: int,
        *,
        blank: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.bins = pack(examples.tokens.lengths[numbers], examples.room(length))
        squares = examples.n_squares
        self.most_pictures = 0
        if squares is not None:
            self.most_pictures = max(int(squares[numbers[each]].sum()) for each in self.bins)
        self.most_drawings = 0 if examples.latents is None else max(map(len, self.bins))
        self._examples, self._numbers, self._form = examples, numbers, form
        self._blank, self._seed = blank, seed

    def __len__(self) -> int:
        """The rows of an epoch."""
        return len(self.bins)

    def row(self, number: int, shape: Shape) -> dict[str, np.ndarray]:
        """Returns a row; a picture that cannot be decoded raises ValueError with its name."""
        epoch, place = divmod(number, len(self))
        place = permute(place, len(self), stream_key("rows", self._seed, epoch))
        row = empty_row(shape, min(self._form.vocabulary.stop_ids, default=0))
        end = n_shown = 0
        for segment, member in enumerate(self.bins[place], 1):
            example = int(self._numbers[member])
            ids, trained = self._examples.tokens.one(example)
            span = slice(end, end + len(ids))
            row["tokens"][span], row["weights"][span] = ids, trained
            row["segment_ids"][span] = segment
            if self._examples.codes is not None:
                self._draw_codes(row, span, example, epoch)
            elif self._examples.latents is not None:
                self._draw_latents(row, span, example, epoch)
                if shape.drawn:
                    picture = self._examples.pictures[example]
                    row["drawn"][segment - 1] = square_of(picture, shape.drawn)
            elif self._examples.pictures:
                n_shown += self._show(row, span, example, n_shown)
            end += len(ids)
        return row

    def _draw_codes(
        self, row: dict[str, np.ndarray], span: slice, example: int, epoch: int
    ) -> None:
        codes = self._examples.codes
        assert codes is not None
        n = codes.shape[1]
        row["codes"][span][-n:] = codes[example]
        if self._is_blank(example, epoch):
            ids = row["tokens"][span]
            ids[:-n] = blanked(self._form, ids[:-n].tolist())

    def _draw_latents(
        self, row: dict[str, np.ndarray], span: slice, example: int, epoch: int
    ) -> None:
        latents, number = self._examples.latents, row["segment_ids"][span.start] - 1
        assert latents is not None
        places = self._form.places(row["tokens"][span].tolist())  # the time's, then the latents'
        row["features"][span][places] = number * len(places) + np.arange(len(places))
        row["latents"][number] = latents[example]
        row["seeds"][number] = self._random("noise", example, epoch) >> 32
        row["starts"][number] = span.start + places[0]
        if self._is_blank(example, epoch):
            # As in guidance: all but the first token keep their places and are not seen.
            row["segment_ids"][span][1 : places[0]] *= -1

    def _show(self, row: dict[str, np.ndarray], span: slice, example: int, first: int) -> int:
        """Puts a picture into a row, after its first squares; returns how many it takes."""
        file = self._examples.pictures[example]
        picture = self._form.decode(file.read(), str(file))
        squares = slice(first, first + len(picture.squares))
        views = pictures.views(picture.squares, self._form.rules)
        for name, seen in zip(("pictures", "large"), views, strict=False):
            row[name][squares] = seen
        places = self._form.places(row["tokens"][span].tolist())
        row["features"][span][places] = self._form.numbered(picture, first, len(row["pictures"]))
        return len(picture.squares)

    def _is_blank(self, example: int, epoch: int) -> bool:
        return self._random("blank", example, epoch) < self._blank * 2**64

    def _random(self, what: str, example: int, epoch: int) -> int:
        """Returns a number of 64 bits."""
        key = stream_key(what, self._seed, epoch)
        return int(mix(key, np.array([example], np.uint64))[0])

    @property
    def fingerprint(self) -> str:
        """A hash of all examples, pictures by name, latents by the hash in their file's name."""
        digest = hashlib.blake2b(digest_size=16)
        latents = self._examples.latents
        if latents is not None:
            assert isinstance(latents, np.memmap)
            digest.update(Path(str(latents.filename)).name.encode())
        for number in self._numbers:
            for array in self._examples.tokens.one(int(number)):
                digest.update(array.tobytes())
            if self._examples.codes is not None:
                digest.update(self._examples.codes[number].tobytes())
            if self._examples.pictures:
                digest.update(f"{self._examples.pictures[number][:3]}".encode())
            digest.update(b"|")
        return digest.hexdigest()


def empty_row(shape: Shape, pad: int) -> dict[str, np.ndarray]:
    """Returns a row without examples, filled with `pad`, which may be any id."""
    T, n = shape.length, shape.n_drawings
    row = {
        "tokens": np.full(T, pad, np.int32),
        "segment_ids": np.zeros(T, np.int32),
        "weights": np.zeros(T, np.float32),
        "codes": np.full(T, -1, np.int32),
        "features": np.full(T, -1, np.int32),
        "pictures": np.zeros((shape.n_pictures, shape.size, shape.size, 3), np.uint8),
    }
    if shape.large:
        row["large"] = np.zeros((shape.n_pictures, shape.large, shape.large, 3), np.uint8)
    if shape.latents:
        row["latents"] = np.zeros((n, 2, *shape.latents), np.float32)
        row["seeds"] = np.zeros(n, np.uint32)
        row["starts"] = np.full(n, -1, np.int32)
    if shape.drawn:
        row["drawn"] = np.zeros((n, shape.drawn, shape.drawn, 3), np.uint8)
    return row


class MixedKinds:
    """Rows of all kinds by number, without end; `dsjax.data.loader.Rows`.

    Args:
      parts: in the order see, text, draw; None where `counts` is 0.
      counts: rows of each in a micro-batch.
    """

    def __init__(
        self,
        parts: Sequence[ExampleRows | None],
        counts: Sequence[int],
        shape: Shape,
        *,
        seed: int,
        blank: float,
    ) -> None:
        self.shape, self._parts, self._counts = shape, parts, counts
        fingerprints = " ".join(part.fingerprint if part else "" for part in parts)
        digest = hashlib.blake2b(fingerprints.encode(), digest_size=16)
        self._identity: dict[str, int | float | str] = {
            "fingerprint": digest.hexdigest(),
            "seed": seed,
            "sequence_length": shape.length - 1,
            "counts": ":".join(map(str, counts)),
            "blank": blank,
        }

    @property
    def identity(self) -> Mapping[str, int | float | str]:
        """What determines every row; rows with the same identity are equal."""
        return self._identity

    def place(self, row: int) -> tuple[int, int]:
        """Returns the kind of a row, and its number among the rows of its kind."""
        micro_batch, inside = divmod(row, sum(self._counts))
        for kind, count in enumerate(self._counts):
            if inside < count:
                return kind, micro_batch * count + inside
            inside -= count
        raise AssertionError("a micro-batch has as many rows as its kinds together")

    def epochs(self, row: int) -> float:
        """Returns how often the rows before `row` go through the kind that is read most often."""
        shares = [
            count / len(part) for part, count in zip(self._parts, self._counts, strict=True) if part
        ]
        return row / sum(self._counts) * max(shares)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if row < 0:
            raise IndexError(f"row {row} is negative")
        kind, number = self.place(row)
        part = self._parts[kind]
        assert part is not None, "a kind without examples has no rows"
        return part.row(number, self.shape)
