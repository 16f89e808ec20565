"""Cuts a text into words: runs of letters and digits, and runs of punctuation.

Chinese and Japanese write no spaces, so that a sentence would be one word; there each character of
Han or kana is one. datatrove cuts with spaCy and jieba, which is slower by a factor of about fifty
and differs little: spaCy splits "don't" in two, jieba joins 1.6 characters on average.

Everything here is vectorised over the characters. Words are told apart by 64-bit hashes.
"""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import numpy as np

_HAN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
_KANA = ((0x3040, 0x30FF),)
_UNSPACED = (*_HAN, *_KANA, (0x0E00, 0x0E7F))  # Thai too
_SPACE, _WORD, _SIGN, _ALONE = range(4)  # classes of characters; _ALONE is a word by itself
_POWER = 0x9E3779B97F4A7C15
MOST = 1 << 23  # characters of a text that are looked at; more would take gigabytes


class Words(NamedTuple):
    """The words of a text in order."""

    numbers: np.ndarray  # int64 [words], equal for equal words
    lengths: np.ndarray  # int64 [words], characters
    kinds: list[str]  # each word that occurs, once; `numbers` counts in this list
    content: np.ndarray  # bool [kinds], whether there is a letter or digit in it
    letters: np.ndarray  # bool [kinds], whether there is a letter in it


class _Characters(NamedTuple):
    """What is known of every character: arrays by code point."""

    classes: np.ndarray  # uint8
    content: np.ndarray  # bool, letters and digits


def cut(text: str) -> Words:
    """Cuts a text, or its first `MOST` characters, into words and runs of punctuation; white space
    is dropped.
    """
    points = _points(text[:MOST])
    table = _characters()
    classes = table.classes[points]
    begins = np.ones(len(points), bool)
    begins[1:] = (classes[1:] != classes[:-1]) | (classes[1:] == _ALONE)
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(points))[: len(starts)]
    written = classes[starts] != _SPACE
    starts, ends = starts[written], ends[written]
    numbers, first = rank(_hashes(points, classes != _SPACE, starts, ends))
    places = zip(starts[first].tolist(), ends[first].tolist(), strict=True)
    kinds = [text[start:end] for start, end in places]
    return Words(
        numbers,
        ends - starts,
        kinds,
        np.array([kind.isalnum() or any(map(str.isalnum, kind)) for kind in kinds], bool),
        np.array([kind.isalpha() or any(map(str.isalpha, kind)) for kind in kinds], bool),
    )


def content_hashes(found: Words) -> np.ndarray:
    """Returns a hash of each word in lower case, without punctuation: uint64 [words with a letter
    or digit].
    """
    encoded = "\n".join(found.kinds).lower().encode("utf-8", "replace").split(b"\n")
    sums = np.fromiter(map(zlib.crc32, encoded[: len(found.kinds)]), np.uint64, len(found.kinds))
    return mix(sums)[found.numbers[found.content[found.numbers]]]


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


def rank(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers values: an int64 for each, equal for equal hashes, and where each number is first."""
    order, firsts = grouped(hashes)
    numbers = np.empty(len(hashes), np.int64)
    numbers[order] = np.cumsum(firsts) - 1
    return numbers, order[firsts]


def han_share(text: str) -> float:
    """Returns the share of Han among the characters that are not white space, 0 with kana."""
    points = _points(text)
    written = int((_characters().classes[points] != _SPACE).sum())
    if not written or _among(points, _KANA) > written / 20:
        return 0.0
    return _among(points, _HAN) / written


def content_share(text: str) -> float:
    """Returns the share of letters and digits among the characters of a text that is not empty."""
    points = _points(text[:MOST])
    return float(_characters().content[points].mean())


def _points(text: str) -> np.ndarray:
    """Returns the code points of a text: uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _among(points: np.ndarray, ranges: tuple[tuple[int, int], ...]) -> int:
    return sum(int(((points >= low) & (points <= high)).sum()) for low, high in ranges)


def _hashes(
    points: np.ndarray, written: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> np.ndarray:
    """Returns a hash of each word: a polynomial of its characters, between words nothing counts."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    begin, longest = int(starts[0]), int((ends - starts).max())
    spans = np.diff(np.append(starts, len(points)))  # with the white space behind
    offsets = np.arange(begin, len(points), dtype=np.int32)
    offsets -= np.repeat(starts.astype(np.int32), spans)
    powers = np.multiply.accumulate(np.full(longest, _POWER, np.uint64))
    values = powers.take(offsets, mode="clip")  # white space may be longer than any word
    values *= points[begin:] | np.uint32(1 << 31)  # so that none is 0
    values *= written[begin:]
    return mix(np.add.reduceat(values, starts - begin))


@functools.cache
def _characters() -> _Characters:
    every = "".join(map(chr, range(0x110000)))
    content, space = (
        np.fromiter(map(tells, every), bool, len(every)) for tells in (str.isalnum, str.isspace)
    )
    classes = np.where(content, _WORD, np.where(space, _SPACE, _SIGN)).astype(np.uint8)
    classes[ord("_")] = _WORD
    for low, high in _UNSPACED:
        classes[low : high + 1] = _ALONE
    return _Characters(classes, content)
