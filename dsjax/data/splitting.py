"""Which documents are trained on and which are held out: copies of a text are on the same side.

A hash of a document's name decides its side, so documents added later move none of the others. For
a text that occurs more than once, up to white space, a hash of the text decides for all its copies:
a copy in the training text of what is held out would be scored as learned.
"""

from __future__ import annotations

import hashlib

import numpy as np

TRAIN, HELDOUT, LEFT_OUT = 0, 1, 2
_WHOLE = 1 << 64  # positions are smaller
_PIECE = 1 << 20  # characters


def digest(text: str) -> int:
    """Returns a 64-bit hash of a text that white space does not change."""
    return int.from_bytes(digest_bytes(text, 8), "little")


def digest_bytes(text: str, size: int) -> bytes:
    """Returns a hash of so many bytes that white space does not change.

    A list of all words of a large text would take ten times its memory, so it is cut into pieces.
    """
    state = hashlib.blake2b(digest_size=size)
    begun = space = False  # whether a word was before, and white space behind it
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE]
        words = piece.split()
        if words and begun and (space or piece[0].isspace()):
            state.update(b" ")
        state.update(" ".join(words).encode("utf-8"))
        begun, space = begun or bool(words), piece[-1].isspace()
    return state.digest()


def by_fraction(positions: np.ndarray, digests: np.ndarray, fraction: float) -> np.ndarray:
    """Holds out about `fraction` of the documents, at least one text and never all of them.

    Args:
      positions: of the documents, in any order, uint64 [n], evenly distributed.
      digests: of their texts, uint64 [n]; two of them differ.

    Returns:
      the side of each, uint8 [n].
    """
    _, group, counts = np.unique(digests, return_inverse=True, return_counts=True)
    positions = np.where(counts[group] > 1, digests, positions)
    held = positions < np.uint64(min(int(fraction * _WHOLE), _WHOLE - 1))
    if not held.any():
        held = positions == positions.min()
    elif held.all():
        held = positions != positions.max()
    return np.where(held, HELDOUT, TRAIN).astype(np.uint8)


def by_file(held: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """Leaves out of training what is a copy of a held-out text.

    Args:
      held: whether each document is of a held-out file, bool [n].
      digests: of their texts, uint64 [n].

    Returns:
      the side of each, uint8 [n].
    """
    copies = ~held & np.isin(digests, digests[held])
    return np.where(held, HELDOUT, np.where(copies, LEFT_OUT, TRAIN)).astype(np.uint8)
