"""Cuts texts into words: runs of letters and digits, and runs of punctuation.

Chinese and Japanese write no spaces, so that a sentence would be one word; there each character of
Han or kana is one. datatrove cuts with spaCy and jieba, which is slower by a factor of about fifty
and differs little: spaCy splits "don't" in two, jieba joins 1.6 characters on average.

Everything here is vectorised over the characters of many texts, most of which are so short that one
by one the calls would take longer than what they do. No word is ever a string of its own: words are
told apart by 64-bit hashes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_KANA = ((0x3040, 0x30FF),)
_UNSPACED = (*_HAN, *_KANA, (0x0E00, 0x0E7F))  # Thai too
_SPACE, _WORD, _SIGN, _ALONE = range(4)  # classes of characters; _ALONE is a word by itself
_BASE = 0x9E3779B97F4A7C15  # of the polynomials that hash words; odd, so that it has an inverse
_LETTER = 1 << 32  # counts letters in the upper half of a number, letters and digits in the lower
MOST = 1 << 22  # characters of a text that are looked at; more would take gigabytes
_TOGETHER = 1 << 20  # characters that are cut in one call


class Words(NamedTuple):
    """The words of several texts, one after the other."""

    hashes: np.ndarray  # uint64 [words], equal for equal words
    lower: np.ndarray  # uint64 [words], equal for words that differ in case alone
    lengths: np.ndarray  # int64 [words], characters
    content: np.ndarray  # bool [words], whether there is a letter or digit in it
    letters: np.ndarray  # bool [words], whether there is a letter in it
    ends: np.ndarray  # int64 [texts], words up to the end of each text

    def per_text(self, values: np.ndarray) -> np.ndarray:
        """Adds values of words up by text: int64 [texts]."""
        sums = np.append(0, np.cumsum(values, dtype=np.int64))[np.append(0, self.ends)]
        return np.diff(sums)


class _Characters(NamedTuple):
    """What is known of every character: arrays by code point."""

    classes: np.ndarray  # uint8
    content: np.ndarray  # int64: 1 for a letter or digit, and _LETTER for a letter
    lower: np.ndarray  # uint32, its lower case where that is one character


def cut(texts: Sequence[str]) -> Words:
    """Cuts texts, of each its first `MOST` characters, into words and runs of punctuation; white
    space is dropped.
    """
    # A break between texts is white space, so no word reaches over it.
    sizes = np.array([min(len(text), MOST) + 1 for text in texts], np.int64)
    points = _points("\n".join(text[:MOST] for text in texts) + "\n")
    table = _characters()
    classes = table.classes[points]
    begins = np.ones(len(points), bool)
    begins[1:] = (classes[1:] != classes[:-1]) | (classes[1:] == _ALONE)
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(points))
    written = classes[starts] != _SPACE
    starts, ends = starts[written], ends[written]
    counted = _sums(table.content[points], starts, ends)
    return Words(
        _hashes(points, starts, ends),
        _hashes(table.lower[points], starts, ends),
        ends - starts,
        counted > 0,
        counted >= _LETTER,
        np.searchsorted(starts, np.cumsum(sizes)),
    )


def batches(places: Sequence[int], texts: Sequence[str]) -> Iterator[list[int]]:
    """Divides the texts at these places into those to cut in one call: many short, or one long."""
    batch: list[int] = []
    total = 0
    for place in places:
        if batch and total + len(texts[place]) > _TOGETHER:
            yield batch
            batch, total = [], 0
        batch.append(place)
        total += len(texts[place])
    if batch:
        yield batch


def hash_of(word: str) -> int:
    """Returns the hash that `cut` gives a word."""
    return int(cut([word]).hashes[0])


def content_hashes(text: str) -> np.ndarray:
    """Returns a hash of each word in lower case, without punctuation: uint64 [words with a letter
    or digit].
    """
    found = cut([text])
    return found.lower[found.content]


def mix(values: np.ndarray) -> np.ndarray:
    """Spreads uint64 values over all bits, one to one (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def grouped(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts places by hash: their order, equal hashes together and each as they come, and whether
    a place is the first of its hash.

    The upper bits of hashes are compared, beside which there is room for the place: 64 less those
    of the count. Sorting numbers is several times as fast as sorting places by number.
    """
    bits = max(len(hashes), 1).bit_length()
    low = np.uint64((1 << bits) - 1)
    packed = (hashes & ~low) | np.arange(len(hashes), dtype=np.uint64)
    packed.sort()
    order = (packed & low).astype(np.int64)
    upper = packed >> np.uint64(bits)
    firsts = np.ones(len(hashes), bool)
    firsts[1:] = upper[1:] != upper[:-1]
    return order, firsts


def han_share(text: str) -> float:
    """Returns the share of Han among the characters that are not white space, 0 with kana."""
    if text.isascii():
        return 0.0
    points = _points(text)
    written = int((_characters().classes[points] != _SPACE).sum())
    if not written or _among(points, _KANA) > written / 20:
        return 0.0
    return _among(points, _HAN) / written


def content_share(text: str) -> float:
    """Returns the share of letters and digits among the characters of a text that is not empty."""
    points = _points(text[:MOST])
    return float((_characters().content[points] > 0).mean())


def _points(text: str) -> np.ndarray:
    """Returns the code points of a text: uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _among(points: np.ndarray, ranges: tuple[tuple[int, int], ...]) -> int:
    return sum(int(((points >= low) & (points <= high)).sum()) for low, high in ranges)


def _sums(values: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Adds up the values of each word."""
    sums = np.empty(len(values) + 1, values.dtype)
    sums[0] = 0
    np.cumsum(values, out=sums[1:])
    return sums[ends] - sums[starts]


def _hashes(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns a hash of each word: a polynomial of its characters in powers of `_BASE`."""
    count = 1 << len(points).bit_length()
    weighted = (points + np.uint32(1)) * _powers(_BASE, count)[: len(points)]  # no NUL is 0
    # The powers go on from word to word: each is moved back by those before it.
    inverse = _powers(pow(_BASE, -1, 1 << 64), count)
    return mix(_sums(weighted, starts, ends) * inverse[starts])


@functools.lru_cache(maxsize=4)
def _powers(base: int, count: int) -> np.ndarray:
    """Returns 1, base, base^2, ...: uint64 [count], modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


@functools.cache
def _characters() -> _Characters:
    every = list(map(chr, range(0x110000)))
    content, letter, space = (
        np.fromiter(map(tells, every), bool, len(every))
        for tells in (str.isalnum, str.isalpha, str.isspace)
    )
    classes = np.where(content, _WORD, np.where(space, _SPACE, _SIGN)).astype(np.uint8)
    classes[ord("_")] = _WORD
    for low, high in _UNSPACED:
        classes[low : high + 1] = _ALONE
    lower = np.arange(len(every), dtype=np.uint32)
    for point in np.flatnonzero(letter | content).tolist():
        changed = every[point].lower()
        if len(changed) == 1:
            lower[point] = ord(changed)
    return _Characters(classes, content + _LETTER * letter.astype(np.int64), lower)
