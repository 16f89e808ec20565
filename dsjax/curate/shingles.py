"""Texts as sets of shingles, and how alike two sets are.

A shingle is five words in a row, in lower case and without punctuation; in Chinese, five
characters. The Jaccard similarity of two texts is the share of their shingles that both have.
MinHash (Broder 1997) estimates it: of each of 128 random orders of all shingles, a text's signature
keeps the first that the text has, and two texts agree in a value with the probability of their
similarity. Texts that agree in all values of a band of them are worth comparing.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from dsjax.curate import words
from dsjax.curate.words import Words

WORDS = 5
VALUES = 128  # of a signature
_SEED = 1
_FOUND = 0.9  # the share of pairs at the threshold that shall meet in a band
_STEP = np.uint64(0x9E3779B97F4A7C15)


def shingles(found: Words) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of the shingles of several texts, at least one of each, as they come, one
    text after the other; and how many there are up to the end of each: uint64, int64 [texts].
    """
    hashes = found.lower[found.content]
    ends = np.cumsum(found.per_text(found.content))
    sizes = np.diff(ends, prepend=0)
    counts = np.maximum(sizes - WORDS + 1, 1)
    starts = np.cumsum(counts) - counts
    result = np.zeros(int(counts.sum()), np.uint64)
    if len(hashes) >= WORDS:
        # All that reach over no end of a text.
        every = grams(hashes, WORDS)
        left = np.repeat(ends, sizes)[: len(every)] - np.arange(len(every))
        result[np.repeat(sizes >= WORDS, counts)] = every[left >= WORDS]
    for text in np.flatnonzero((sizes > 0) & (sizes < WORDS)).tolist():
        result[starts[text]] = grams(hashes[ends[text] - sizes[text] : ends[text]], sizes[text])[0]
    return result, starts + counts


def shingle_set(text: str) -> np.ndarray:
    """Returns the hashes of a text's shingles, sorted, each once: uint64."""
    ordered = np.sort(shingles(words.cut([text]))[0])
    return ordered[np.append(True, ordered[1:] != ordered[:-1])]


def grams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Returns a hash of every n words in a row.

    Args:
      hashes: uint64 [words], n or more.
    """
    count = len(hashes) - n + 1
    result = np.zeros(count, np.uint64)
    for place in range(n):
        result = result * _STEP + hashes[place : place + count]
    return words.mix(result)


def signatures(found: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the signatures of texts with these shingles: uint32 [texts, VALUES].

    Args:
      found, ends: as `shingles` returns them.

    Raises:
      ValueError: rensa is not installed.
    """
    try:
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise ValueError(
            "finding near duplicates needs rensa: pip install 'dsjax[prepare]', or leave them: "
            "--set duplicates=exact"
        ) from error
    bounds = np.append(0, ends).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(found, bounds, VALUES, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(ends), VALUES)


def library() -> str:
    """Returns name and version of the library, for the key of a stage."""
    signatures(np.zeros(1, np.uint64), np.ones(1, np.int64))
    return f"rensa {version('rensa')}"


def rows_per_band(threshold: float) -> int:
    """Returns how many values make a band, so that pairs of this similarity meet in at least one
    band nine times of ten, and of other pairs as few as can be.
    """
    for rows in range(VALUES // 2, 1, -1):
        if 1 - (1 - threshold**rows) ** (VALUES // rows) >= _FOUND:
            return rows
    return 1


def bands(found: np.ndarray, rows: int) -> np.ndarray:
    """Returns a hash of each band of signatures: uint64 [texts, bands].

    Args:
      found: uint32 [texts, VALUES].
    """
    count = VALUES // rows
    values = found[:, : count * rows].reshape(len(found), count, rows).astype(np.uint64)
    result = np.zeros(values.shape[:2], np.uint64)
    for row in range(rows):
        result = words.mix(result * _STEP + values[:, :, row] + np.uint64(1))
    return result


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the similarity of two sorted sets."""
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / (len(first) + len(second) - both)
