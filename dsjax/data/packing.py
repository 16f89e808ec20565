"""Rows of one length from documents of any length: for training and for evaluation.

Training. Every epoch puts the documents in a new random order, each as [begin] tokens [end], and
concatenates them; the epochs follow one another in one endless stream. Window i is positions i*T to
i*T+T of the stream: T+1 tokens, of which T are predicted. Each token is thus predicted once per
epoch, no token is padding, and the tail of an epoch shares a window with the start of the next.
Rows are these windows, shuffled among those that begin in the same epoch, so that neighbours in a
batch come from different documents. Rows do not depend on batches or processes: the data of a run
is a function of the row numbers alone, and to resume it is enough to remember one number.

Fill-in-the-middle (V3 section 4.1). A share `fim_rate` of an epoch's documents is cut at two random
tokens and becomes
  [begin] <fim_begin> prefix <fim_hole> suffix <fim_end> middle [end]
The share is exact over epochs, not only on average: epoch e takes floor(rate * n * (e+1)) -
floor(rate * n * e) of n documents. The length of every epoch is therefore known in closed form, and
row i is found without reading what comes before it. Departure from the paper: cuts fall between
tokens, not between characters, so that a document is tokenized only once.

All randomness is SplitMix64 of (seed, epoch, document), by `dsjax.data.shuffling`. Only epochs in
use are laid out, at 17 bytes per document.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

import numpy as np

from dsjax.data.corpus import TokenizedDocuments
from dsjax.data.shuffling import mix, permute, stream_key
from dsjax.text.tokenizer import FIM_BEGIN, SpecialTokens

_FIM_TOKENS = 3


class PackedSequences:
    """Training rows by number, without end.

    `rows[i]` is {"tokens": int32 [T+1], "segment_ids": int32 [T+1]}; segment ids number the
    documents within the row from 1. Several threads may read.

    Raises:
      ValueError: an epoch is shorter than one row, or the tokenizer lacks the tokens of
        fill-in-the-middle.
    """

    def __init__(
        self,
        documents: TokenizedDocuments,
        special: SpecialTokens,
        *,
        sequence_length: int,
        seed: int = 0,
        fim_rate: float = 0.0,
    ) -> None:
        if fim_rate and special.fim is None:
            raise ValueError(
                f"data.fim_rate={fim_rate} needs the token {FIM_BEGIN!r} and its two companions, "
                "which the tokenizer does not have; set data.fim_rate=0"
            )
        self.sequence_length = sequence_length
        self.seed = seed
        self.fim_rate = fim_rate
        self._documents = documents
        self._special = special
        self._plain_lengths = documents.lengths + 2
        self._plain_epoch = int(self._plain_lengths.sum())
        if self._plain_epoch < sequence_length + 1:
            raise ValueError(
                f"the {len(documents)} train documents have {self._plain_epoch} tokens, one "
                f"sequence of data.sequence_length={sequence_length} needs {sequence_length + 1}; "
                "add text or lower data.sequence_length"
            )
        self._layouts: dict[int, _Layout] = {}
        self._lock = threading.Lock()

    @property
    def identity(self) -> dict[str, int | float | str]:
        """What determines every row; rows with the same identity are equal."""
        return {
            "fingerprint": self._documents.fingerprint,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "fim_rate": self.fim_rate,
        }

    def epoch_of(self, row: int) -> int:
        """Returns the epoch of a row: that of its window's first token."""
        position = row * self.sequence_length
        mean_length = self._plain_epoch + _FIM_TOKENS * self.fim_rate * len(self._documents)
        epoch = int(position / mean_length)
        while self._epoch_start(epoch) > position:
            epoch -= 1
        while self._epoch_start(epoch + 1) <= position:
            epoch += 1
        return epoch

    def epochs(self, row: int) -> float:
        """Returns how often the rows before `row` go through the documents."""
        epoch, position = self.epoch_of(row), row * self.sequence_length
        start, end = self._epoch_start(epoch), self._epoch_start(epoch + 1)
        return epoch + (position - start) / (end - start)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if row < 0:
            raise IndexError(f"row {row} is negative")
        return self.window(self.window_of(row))

    def window_of(self, row: int) -> int:
        """Returns the number of the window that a row holds."""
        epoch = self.epoch_of(row)
        first, end = (-(-self._epoch_start(e) // self.sequence_length) for e in (epoch, epoch + 1))
        return first + permute(row - first, end - first, stream_key("rows", self.seed, epoch))

    def window(self, index: int) -> dict[str, np.ndarray]:
        """Returns window `index` of the stream, as it is before rows are shuffled."""
        tokens = np.empty(self.sequence_length + 1, np.int32)
        segment_ids = np.empty(self.sequence_length + 1, np.int32)
        epoch = self.epoch_of(index)
        position = index * self.sequence_length - self._epoch_start(epoch)
        place = self._layout(epoch).place_of(position)
        filled, segment = 0, 0
        while filled < len(tokens):
            layout = self._layout(epoch)
            if place == len(layout.order):
                epoch, place, position = epoch + 1, 0, 0
                continue
            pieces = self._render(epoch, int(layout.order[place]), bool(layout.fim[place]))
            inside = position - int(layout.starts[place])
            written = _copy(pieces, inside, tokens[filled:])
            segment += 1
            segment_ids[filled : filled + written] = segment
            filled += written
            place += 1
            position = int(layout.starts[place])
        return {"tokens": tokens, "segment_ids": segment_ids}

    def _fim_before(self, epoch: int) -> int:
        """Returns how many documents were rearranged in all earlier epochs."""
        return int(self.fim_rate * len(self._documents) * epoch)

    def _epoch_start(self, epoch: int) -> int:
        return epoch * self._plain_epoch + _FIM_TOKENS * self._fim_before(epoch)

    def _layout(self, epoch: int) -> _Layout:
        with self._lock:
            if epoch not in self._layouts:
                self._layouts[epoch] = self._make_layout(epoch)
                while len(self._layouts) > 2:
                    del self._layouts[next(iter(self._layouts))]
            return self._layouts[epoch]

    def _make_layout(self, epoch: int) -> _Layout:
        count = len(self._documents)
        numbers = np.arange(count, dtype=np.uint64)
        order = np.argsort(mix(stream_key("order", self.seed, epoch), numbers), kind="stable")
        chosen = np.zeros(count, bool)
        n_fim = self._fim_before(epoch + 1) - self._fim_before(epoch)
        if n_fim:
            ranks = mix(stream_key("fim", self.seed, epoch), numbers)
            chosen[np.argsort(ranks, kind="stable")[:n_fim]] = True
        fim = chosen[order]
        starts = np.zeros(count + 1, np.int64)
        np.cumsum(self._plain_lengths[order] + _FIM_TOKENS * fim, out=starts[1:])
        return _Layout(order, fim, starts)

    def _render(self, epoch: int, document: int, fim: bool) -> list[np.ndarray]:
        """Returns the document as pieces to concatenate: slices of mapped memory, not yet read."""
        tokens = self._documents[document]
        if not fim:
            return [_one(self._special.bos), tokens, _one(self._special.eos)]
        assert self._special.fim is not None
        number = np.array([document], np.uint64)
        cuts = (
            int(mix(stream_key(side, self.seed, epoch), number)[0]) for side in ("left", "right")
        )
        left, right = sorted(cut % (len(tokens) + 1) for cut in cuts)
        begin, hole, end = map(_one, self._special.fim)
        body = [begin, tokens[:left], hole, tokens[right:], end, tokens[left:right]]
        return [_one(self._special.bos), *body, _one(self._special.eos)]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The layout of one epoch, by place in its order."""

    order: np.ndarray  # the document at each place
    fim: np.ndarray  # whether it is rearranged
    starts: np.ndarray  # its first position; one more entry, the epoch's length

    def place_of(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1


def _one(token: int) -> np.ndarray:
    return np.array([token], np.int32)


def _copy(pieces: Sequence[np.ndarray], skip: int, out: np.ndarray) -> int:
    """Copies `pieces`, less their first `skip` elements, until `out` is full; returns how many."""
    written = 0
    for piece in pieces:
        if skip >= len(piece):
            skip -= len(piece)
            continue
        part = piece[skip : skip + len(out) - written]
        out[written : written + len(part)] = part
        written += len(part)
        skip = 0
        if written == len(out):
            break
    return written


@dataclasses.dataclass(frozen=True)
class HeldoutSequences:
    """Evaluation rows by number; `rows[i]` has the shapes of a training row.

    A row holds one window of one document: T tokens to predict and the one before them, padded with
    segment id 0. Every token after a document's begin token, its end token included, is predicted
    in exactly one row, so
      bits per byte = summed loss in nats / ln 2 / summed row_bytes
    is exact over all rows. The bytes of a document are divided among its windows in proportion to
    their predicted tokens.
    """

    documents: TokenizedDocuments
    special: SpecialTokens
    sequence_length: int
    row_documents: np.ndarray  # int64 [rows]
    row_starts: (
        np.ndarray
    )  # int64 [rows], index of the window's first token in [begin] tokens [end]
    row_bytes: np.ndarray  # float64 [rows]

    def __len__(self) -> int:
        return len(self.row_documents)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        tokens = np.full(self.sequence_length + 1, self.special.pad, np.int32)
        segment_ids = np.zeros(self.sequence_length + 1, np.int32)
        body = self.documents[int(self.row_documents[row])]
        pieces = [_one(self.special.bos), body, _one(self.special.eos)]
        written = _copy(pieces, int(self.row_starts[row]), tokens)
        segment_ids[:written] = 1
        return {"tokens": tokens, "segment_ids": segment_ids}

    @property
    def total_bytes(self) -> int:
        """UTF-8 bytes of all held-out text."""
        return self.documents.total_bytes

    def spread(self, count: int) -> list[int]:
        """Returns at most `count` evenly spaced row numbers, the same ones every time."""
        count = min(count, len(self))
        return [index * len(self) // count for index in range(count)]

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns the given rows, stacked."""
        return stack([self[row] for row in rows])


def heldout_sequences(
    documents: TokenizedDocuments, special: SpecialTokens, *, sequence_length: int
) -> HeldoutSequences:
    """Cuts held-out documents into evaluation rows of `sequence_length` predicted tokens."""
    predicted = documents.lengths + 1
    windows = -(-predicted // sequence_length)
    row_documents = np.repeat(np.arange(len(documents)), windows)
    first_rows = np.cumsum(windows) - windows
    row_starts = (np.arange(len(row_documents)) - first_rows[row_documents]) * sequence_length
    in_row = np.minimum(predicted[row_documents] - row_starts, sequence_length)
    row_bytes = documents.byte_counts[row_documents] * (in_row / predicted[row_documents])
    return HeldoutSequences(
        documents, special, sequence_length, row_documents, row_starts, row_bytes
    )


def stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stacks rows to a batch: each array gets a leading dim."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
