"""Stages `evaluation` and `contaminated`: finds documents that quote evaluation files.

As for DeepSeekMath (arXiv 2402.03300, section 2.1), a document is removed if it has any ten words
in a row of an evaluation text, or all of one of three to nine words; words are compared without
case and punctuation. In Chinese sixteen characters are ten words, and five are three. Duplicates
are looked for afterwards, so that no document is removed in favour of one that goes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsjax.curate import shards, words
from dsjax.curate.deciding import PASSED, SCHEMA
from dsjax.curate.shingles import grams
from dsjax.data import documents
from dsjax.files import replacing

VERSION = 2
CONTAMINATED = "contaminated"
# Where records of evaluation files have their question.
FIELDS = (
    *("prompt", "problem", "question", "question_content", "query", "input", "text", "content"),
    "messages",
)
# What is looked for: so many in a row, and shorter texts of at least so many.
_WORDS, _CHARACTERS = (10, 3), (16, 5)
_HAN_SHARE = 0.5
_PIECE, _OVERLAP = 1 << 21, 1000  # characters of a text that are looked at together


@dataclasses.dataclass(frozen=True)
class Job:
    """A shard of documents, the verdicts on them, and the folder that `index` has written."""

    documents: Path
    verdicts: Path
    index: Path


def identity(files: Sequence[documents.Source]) -> list[Any]:
    """Returns what the index depends on, as JSON."""
    return [[file.name, file.kind, file.size, file.mtime_ns] for file in files]


def index(files: Sequence[documents.Source], folder: Path, number: int) -> dict[str, Any]:
    """Writes N.npy for each number N of words in a row that is looked for: their hashes, sorted.

    Returns:
      how many texts there are, and how many of them are too short to look for.

    Raises:
      ValueError: a file cannot be read, or a record has no question.
    """
    del number
    found: dict[int, list[np.ndarray]] = {}
    count = short = 0
    for text in _questions(files):
        hashes = words.content_hashes(text)
        most, fewest = _CHARACTERS if words.han_share(text) > _HAN_SHARE else _WORDS
        count += 1
        if len(hashes) < fewest:
            short += 1
            continue
        n = min(most, len(hashes))
        found.setdefault(n, []).append(np.unique(grams(hashes, n)))
    for n, parts in found.items():
        with replacing(folder / f"{n}.npy") as file:
            np.save(file, np.unique(np.concatenate(parts)))
    return {"texts": count, "short": short}


def mark(job: Job, folder: Path, number: int) -> dict[str, Any]:
    """Writes NUMBER.parquet, the verdicts with `CONTAMINATED` on what quotes an evaluation text."""
    known = {int(path.stem): np.load(path) for path in sorted(job.index.glob("*.npy"))}
    found = 0
    with shards.Writer(folder / f"{number:05}.parquet", SCHEMA) as writer:
        rows = zip(shards.rows(job.documents, ["text"]), shards.rows(job.verdicts), strict=True)
        for row, judged in rows:
            if judged["verdict"] == PASSED and quotes(row["text"], known):
                judged = {"verdict": CONTAMINATED}
                found += 1
            writer.add(judged)
    return {"found": found}


def quotes(text: str, known: Mapping[int, np.ndarray]) -> bool:
    """Tells whether a text has N words in a row whose hash is in the sorted array `known[N]`."""
    for start in range(0, len(text), _PIECE):
        hashes = words.content_hashes(text[start : start + _PIECE + _OVERLAP])
        for n, wanted in known.items():
            if len(hashes) < n:
                continue
            found = grams(hashes, n)
            places = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
            if (wanted[places] == found).any():
                return True
    return False


def _questions(files: Sequence[documents.Source]) -> Iterator[str]:
    for file in files:
        if file.kind in ("text", "python"):
            yield from (document.text for document in documents.read_documents([file]))
            continue
        for place, record in documents.read_records([file]):
            texts = [text for name in FIELDS for text in _texts(record.get(name))]
            if not texts:
                raise ValueError(
                    f"{place}: an evaluation record has its question under one of "
                    f"{', '.join(FIELDS)}, and this one has {', '.join(sorted(record)[:20])}; "
                    "rename the field"
                )
            yield from texts


def _texts(value: object) -> Iterator[str]:
    """Yields a text, or what the user says in a conversation."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for turn in value:
            if isinstance(turn, dict) and turn.get("role", "user") == "user":
                yield from _texts(turn.get("content"))
