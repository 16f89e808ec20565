"""Text cut into windows that a model can read, such that every token is predicted once.

A document is scored as [begin] tokens: the first token is predicted from the begin token, and the
end of the document is not predicted. If the tokenizer wants no begin token, the end token takes its
place, as it precedes every document in training.

Longer documents are cut: the first window predicts all of its tokens, every later one only its last
`stride` tokens, the others being context. Windows are packed into rows and kept apart by segment
ids.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsjax.data import documents
from dsjax.text.tokenizer import Coder, what_is_lost
from dsjax.text.vocabulary import Vocabulary, open_vocabulary

_logger = logging.getLogger(__name__)

_DEFAULT_LENGTH = 4096
_SHORTEST_ROW = 64
_CHECKED_BYTES = 1 << 20
_BATCH_BYTES, _BATCH_DOCUMENTS = 4 << 20, 2048


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents as token ids."""

    documents: list[np.ndarray]  # int32, each preceded by its begin token
    bytes: int  # UTF-8 bytes of all documents; 0 where their tokens do not hold the whole text

    @property
    def tokens(self) -> int:
        """Counts the tokens to predict."""
        return sum(len(document) - 1 for document in self.documents)


class TextFiles(NamedTuple):
    """Text to score, in the formats of dsjax/data/documents.py."""

    names: Sequence[str]  # files or globs
    field: str = "text"  # the field or column with the text, in JSON lines and Parquet files
    bos: bool = True  # False: as if tokenizer_config.json said "add_bos_token": false


def read_text(files: TextFiles, folder: Path, vocab_size: int) -> Text:
    """Reads text and encodes it with the tokenizer of a checkpoint's folder.

    Raises:
      ValueError: the files cannot be read or hold no text, or the tokenizer does not suit a model
        of this vocabulary size.
    """
    vocabulary = open_vocabulary(folder, vocab_size)
    if not files.bos:
        vocabulary = dataclasses.replace(vocabulary, begins=False)
    try:
        found = documents.find_sources(files.names, key="--text")
        texts = (each.text for each in documents.read_documents(found, text_field=files.field))
        text = encode(vocabulary.coder, first_token(vocabulary), texts)
    except ValueError as error:  # the readers advise about a training run's keys
        advice = str(error).replace("data.text_field", "--text-field")
        raise ValueError(advice.replace("data.files", "--text")) from error
    if not text.documents:
        raise ValueError(f"--text {' '.join(files.names)}: there is no text in it")
    return text


def encode(coder: Coder, first: int, texts: Iterable[str]) -> Text:
    """Encodes documents in batches on all cores, and puts the token `first` before each.

    A tokenizer that does not give the first megabyte back leaves the bytes unknown, since bits per
    byte would mean nothing, and a warning says where.
    """
    encoded: list[np.ndarray] = []
    batch: list[str] = []
    total = waiting = checked = 0
    lost: str | None = None

    def flush() -> None:
        nonlocal checked, lost
        for text, ids in zip(batch, coder.encode_batch(batch), strict=True):
            encoded.append(np.concatenate([np.array([first], np.int32), ids.astype(np.int32)]))
            if lost is None and checked < _CHECKED_BYTES:
                lost = what_is_lost(coder, ids, text)
                checked += len(text)
        batch.clear()

    for text in texts:
        size = len(text.encode("utf-8"))
        batch.append(text)
        total, waiting = total + size, waiting + size
        if waiting >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            flush()
            waiting = 0
    flush()
    if lost is not None:
        _logger.warning("no bits per byte, as the tokenizer does not give the text back: %s", lost)
    return Text(encoded, 0 if lost is not None else total)


def first_token(vocabulary: Vocabulary) -> int:
    """Returns the id from which a document's first token is predicted.

    Raises:
      ValueError: the tokenizer has neither a begin nor an end token.
    """
    name = vocabulary.bos if vocabulary.begins and vocabulary.bos else vocabulary.eos
    if name is None:
        raise ValueError(
            "the tokenizer has neither a begin nor an end token to predict a text's first token "
            "from; name one in tokenizer_config.json as bos_token or eos_token"
        )
    return vocabulary.coder.control[name]


def window_length(asked: int, max_seq_len: int) -> int:
    """Returns the length of a window: `asked`, or by default (0) the model's limit, but at most
    4096.

    Raises:
      ValueError: `asked` exceeds the model's limit, or is below 2.
    """
    if not asked:
        return min(max_seq_len, _DEFAULT_LENGTH)
    if not 2 <= asked <= max_seq_len:
        raise ValueError(
            f"--sequence-length {asked} is not between 2 and the model's max_seq_len={max_seq_len}"
        )
    return asked


class Window(NamedTuple):
    """Tokens to run together."""

    owner: int  # the caller's number for it
    tokens: np.ndarray  # int32 [n + 1]: n are read, each predicting its successor
    first: int  # predictions before this position are context and not scored

    @property
    def size(self) -> int:
        return len(self.tokens) - 1


def cut(tokens: np.ndarray, *, length: int, stride: int, owner: int = 0) -> Iterator[Window]:
    """Cuts a document into windows that read at most `length` tokens.

    Every token except the first is scored once. After the first window, each one scores `stride`
    tokens (the last one perhaps fewer), preceded by at least `length - stride` tokens of context.
    """
    targets, done = len(tokens) - 1, 0
    while done < targets:
        end = min(done + (stride if done else length), targets)
        start = max(end - length, 0)
        yield Window(owner, tokens[start : end + 1], done - start)
        done = end


def pack(windows: Iterable[Window], length: int) -> Iterator[list[Window]]:
    """Fills rows of `length` positions with windows, in order."""
    row: list[Window] = []
    filled = 0
    for window in windows:
        assert 0 < window.size <= length
        if filled + window.size > length:
            yield row
            row, filled = [], 0
        row.append(window)
        filled += window.size
    if row:
        yield row


class Batch(NamedTuple):
    """Rows as arrays, int32 [rows, width]."""

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray  # numbers the windows of a row from 1; 0 is padding
    places: list[tuple[Window, int, int]]  # each window with its row and its start in that row


def stack(rows: Sequence[Sequence[Window]], *, n_rows: int, length: int) -> Batch:
    """Lays rows out as arrays, padded to `n_rows` rows and to a power of two of positions, at most
    `length`: few widths occur, so few programs are compiled.
    """
    filled = max(sum(window.size for window in row) for row in rows)
    width = min(max(1 << (filled - 1).bit_length(), _SHORTEST_ROW), length)
    inputs, targets, segment_ids = (np.zeros((n_rows, width), np.int32) for _ in range(3))
    places = []
    for number, row in enumerate(rows):
        start = 0
        for segment, window in enumerate(row, start=1):
            place = number, slice(start, start + window.size)
            inputs[place], targets[place] = window.tokens[:-1], window.tokens[1:]
            segment_ids[place] = segment
            places.append((window, number, start))
            start += window.size
    return Batch(inputs, targets, segment_ids, places)
