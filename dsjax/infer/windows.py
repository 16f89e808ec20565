"""Text cut into windows that a model can read, so that every token is predicted once.

A document is scored as [begin] tokens: the first token is predicted from the begin token, and the
document's end is not predicted. Where the tokenizer asks for no begin token, the end token stands
there, as it does before a document in training.

What is longer than a window is cut: the first window predicts all that it reads, and each later one
the `stride` tokens at its end, the rest of it being context. Windows are packed into rows, in which
segment ids keep them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsjax.data import documents
from dsjax.text.tokenizer import Coder
from dsjax.text.vocabulary import Vocabulary, open_vocabulary

_DEFAULT_LENGTH = 4096
_SHORTEST_ROW = 64
_BATCH_BYTES, _BATCH_DOCUMENTS = 4 << 20, 2048


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents as token ids."""

    documents: list[np.ndarray]  # int32, each with the token in front that it begins with
    bytes: int  # of the UTF-8 text of all of them

    @property
    def tokens(self) -> int:
        """How many there are to predict."""
        return sum(len(document) - 1 for document in self.documents)


class TextFiles(NamedTuple):
    """Text to score, as dsjax/data/documents.py reads it."""

    names: Sequence[str]  # files or globs
    field: str = "text"  # of JSON lines and Parquet files, the field that holds the text
    bos: bool = True  # False: no begin token, whatever tokenizer_config.json says


def read_text(files: TextFiles, folder: Path, vocab_size: int) -> Text:
    """Reads text and encodes it with the tokenizer of a checkpoint's folder.

    Raises:
      ValueError: the files cannot be read or hold no text, or the tokenizer is not one for a model
        of this vocabulary.
    """
    vocabulary = open_vocabulary(folder, vocab_size)
    if not files.bos:
        vocabulary = dataclasses.replace(vocabulary, begins=False)
    try:
        found = documents.find_sources(files.names, key="--text")
        texts = (each.text for each in documents.read_documents(found, text_field=files.field))
        text = encode(vocabulary.coder, first_token(vocabulary), texts)
    except ValueError as error:  # the readers name the keys of a training run
        advice = str(error).replace("data.text_field", "--text-field")
        raise ValueError(advice.replace("data.files", "--text")) from error
    if not text.documents:
        raise ValueError(f"--text {' '.join(files.names)}: there is no text in it")
    return text


def encode(coder: Coder, first: int, texts: Iterable[str]) -> Text:
    """Encodes documents, some at a time on all cores, with the token `first` in front of each."""
    encoded: list[np.ndarray] = []
    batch: list[str] = []
    total = waiting = 0

    def flush() -> None:
        for ids in coder.encode_batch(batch):
            encoded.append(np.concatenate([np.array([first], np.int32), ids.astype(np.int32)]))
        batch.clear()

    for text in texts:
        size = len(text.encode("utf-8"))
        batch.append(text)
        total, waiting = total + size, waiting + size
        if waiting >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            flush()
            waiting = 0
    flush()
    return Text(encoded, total)


def first_token(vocabulary: Vocabulary) -> int:
    """The id that stands before a document, from which its first token is predicted.

    Raises:
      ValueError: the tokenizer has neither a begin nor an end token.
    """
    name = vocabulary.bos if vocabulary.begins and vocabulary.bos else vocabulary.eos
    if name is None:
        raise ValueError(
            "the tokenizer has neither a begin nor an end token, so nothing can stand before a "
            "text's first token; name one in tokenizer_config.json as bos_token or eos_token"
        )
    return vocabulary.coder.control[name]


def window_length(asked: int, max_seq_len: int) -> int:
    """How many tokens a window reads: what is asked for, or by default (0) as many as the model
    takes, but no more than 4096.

    Raises:
      ValueError: more than the model takes, or fewer than 2.
    """
    if not asked:
        return min(max_seq_len, _DEFAULT_LENGTH)
    if not 2 <= asked <= max_seq_len:
        raise ValueError(
            f"--sequence-length {asked} is not between 2 and the model's max_seq_len={max_seq_len}"
        )
    return asked


class Window(NamedTuple):
    """Tokens to run together; of their predictions, those from `first` on count."""

    owner: int  # what the caller knows it by
    tokens: np.ndarray  # int32 [n + 1]: n that are read, each predicting the one after it
    first: int

    @property
    def size(self) -> int:
        return len(self.tokens) - 1


def cut(tokens: np.ndarray, *, length: int, stride: int, owner: int = 0) -> Iterator[Window]:
    """Cuts a document into windows that read at most `length` tokens.

    Every token but the first is scored once; all windows after the first, but for the last, score
    `stride` tokens with `length - stride` or more before them.
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
    segment_ids: np.ndarray  # windows of a row from 1; 0 is padding
    places: list[tuple[Window, int, int]]  # each with its row and where it starts there


def stack(rows: Sequence[Sequence[Window]], *, n_rows: int, length: int) -> Batch:
    """Lays rows out, padded to `n_rows` rows and to `length` positions, or to the power of two that
    is enough: a handful of widths, so that few programs serve any text.
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
