"""Chooses which of several equal or nearly equal documents stays.

Documents are taken in a fixed order. One is removed if it is like a document that stays. Joining
all that are like each other would be simpler, and wrong: a chain of small changes would make one
group of documents that have nothing in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

NONE = -1
# Below the threshold by this much, an estimate from 128 values is not worth an exact comparison:
# its standard deviation is 0.035 at a similarity of 0.8.
_DOUBT = 0.12


def exact(digests: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Finds documents with equal digests.

    Args:
      digests: [documents], anything that sorts.
      order: int64, the documents that take part; earlier ones stay.

    Returns:
      for each document the one that stays in its place, or NONE: int64 [documents].
    """
    result = np.full(len(digests), NONE)
    taken = digests[order]
    _, first, inverse = np.unique(taken, return_index=True, return_inverse=True)
    keeper = order[first[inverse.reshape(-1)]]
    result[order] = np.where(keeper == order, NONE, keeper)
    return result


def buckets(bands: np.ndarray) -> np.ndarray:
    """Numbers, in each band, the values that several documents share; NONE elsewhere: int64, as
    `bands` [documents, bands].
    """
    result = np.full(bands.shape, NONE)
    for band in range(bands.shape[1]):
        _, inverse, counts = np.unique(bands[:, band], return_inverse=True, return_counts=True)
        inverse = inverse.reshape(-1)
        result[:, band] = np.where(counts[inverse] > 1, inverse, NONE)
    return result


def near(
    shared: np.ndarray,
    signatures: np.ndarray,
    threshold: float,
    similarity: Callable[[int, int], float],
) -> list[tuple[int, int, float]]:
    """Finds documents that are like an earlier one that stays.

    Args:
      shared: int64 [documents, bands] from `buckets`, documents in their order.
      signatures: uint32 [documents, values].
      threshold: of the exact similarity, which `similarity` returns for two documents.

    Returns:
      (document, the one that stays, their similarity) for each that is removed, in order.
    """
    members: dict[tuple[int, int], list[int]] = {}
    removed: list[tuple[int, int, float]] = []
    for document in np.flatnonzero((shared != NONE).any(axis=1)).tolist():
        row = shared[document]
        keys = [(band, int(row[band])) for band in np.flatnonzero(row != NONE).tolist()]
        staying = sorted({other for key in keys for other in members.get(key, ())})
        found = _alike(document, staying, signatures, threshold, similarity)
        if found is None:
            for key in keys:
                members.setdefault(key, []).append(document)
        else:
            removed.append((document, *found))
    return removed


def _alike(
    document: int,
    staying: Sequence[int],
    signatures: np.ndarray,
    threshold: float,
    similarity: Callable[[int, int], float],
) -> tuple[int, float] | None:
    if not staying:
        return None
    estimates = (signatures[list(staying)] == signatures[document]).mean(axis=1)
    for place in np.argsort(-estimates, kind="stable").tolist():
        if estimates[place] < threshold - _DOUBT:
            break
        exactly = similarity(document, staying[place])
        if exactly >= threshold:
            return staying[place], exactly
    return None
