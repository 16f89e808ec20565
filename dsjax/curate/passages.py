"""Cuts passages that occurred before out of texts, as in "Deduplicating training data makes
language models better" (arXiv 2107.06499), by a suffix array over the bytes of a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

_BETWEEN = 0xFF  # between texts: no byte of UTF-8


def without_repeats(texts: Sequence[str], least: int) -> list[str]:
    """Returns the texts without every passage of `least` bytes or more that occurred before, in
    an earlier text or earlier in the same one. White space that a cut leaves at the ends goes too.

    Raises:
      ValueError: pydivsufsort is not installed.
    """
    encoded = [text.encode() for text in texts]
    data = np.frombuffer(b"".join(part + bytes([_BETWEEN]) for part in encoded), np.uint8)
    repeats = _repeated(data, least)
    result, start = [], 0
    for text, part in zip(texts, encoded, strict=True):
        kept = ~repeats[start : start + len(part)]
        start += len(part) + 1
        if not kept.all():
            whole = np.frombuffer(part, np.uint8)
            text = whole[kept].tobytes().decode().strip()
        result.append(text)
    return result


def library() -> str:
    """Returns name and version of the library, for the key of a stage.

    Raises:
      ValueError: it is not installed.
    """
    _suffixes(np.zeros(2, np.uint8))
    return f"pydivsufsort {version('pydivsufsort')}"


def _repeated(data: np.ndarray, least: int) -> np.ndarray:
    """Tells which bytes lie in a passage that occurred before: bool, cut to whole characters."""
    count = len(data)
    covered = np.zeros(count, bool)
    if count <= least:
        return covered
    suffixes, shared = _suffixes(data)
    # Suffixes next to each other that share their first `least` bytes; the smallest place of such
    # a group is where the passage is first.
    begins = np.append(True, shared[:-1] < least)
    firsts = np.minimum.reduceat(suffixes, np.flatnonzero(begins))
    later = suffixes != firsts[np.cumsum(begins) - 1]
    places = np.sort(suffixes[later])
    # Passages do not reach over the end of a text.
    ends = np.flatnonzero(data == _BETWEEN)
    places = places[places + least <= ends[np.searchsorted(ends, places)]]
    edges = np.zeros(count + 1, np.int32)
    np.add.at(edges, places, 1)
    np.add.at(edges, places + least, -1)
    covered = np.cumsum(edges[:-1]) > 0
    return _whole_characters(data, covered)


def _whole_characters(data: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Takes back the bytes of characters that are not covered whole."""
    starts = np.flatnonzero((data & 0xC0) != 0x80)
    whole = np.logical_and.reduceat(covered, starts)
    return np.repeat(whole, np.diff(np.append(starts, len(data))))


def _suffixes(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the suffix array, and how many bytes each suffix shares with the next."""
    try:
        import pydivsufsort
    except ImportError as error:
        raise ValueError(
            "finding repeated passages needs pydivsufsort: pip install 'dsjax[prepare]', or leave "
            "them: --set passages=0"
        ) from error
    writable = data.copy()
    suffixes = pydivsufsort.divsufsort(writable)
    return suffixes, pydivsufsort.kasai(writable, suffixes)
