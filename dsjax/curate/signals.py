"""Measures prose: the quantities that the rules of Gopher (arXiv 2112.11446, table A1), C4 and
FineWeb bound, defined as in datatrove's filters.

Shares lie in 0..1. A share of characters is relative to all characters of the text. A text in
Chinese has characters for words, so the orders of its n-grams are longer by 1.6, the characters of
an average word.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from dsjax.curate import words
from dsjax.curate.words import Words

TOP_ORDERS = (2, 3, 4)
REPEATED_ORDERS = (5, 6, 7, 8, 9, 10)
_CHARACTERS_PER_WORD = {"zh": 1.6}

STOP_WORDS = {
    "en": ("the", "be", "to", "of", "and", "that", "have", "with"),
    # The commonest characters that are words of grammar.
    "zh": tuple(
        "\u7684\u4e86\u662f\u5728\u6709\u548c\u4e0d\u8fd9\u4e5f\u5c31\u90fd\u800c\u53ca\u4e0e"
        "\u7740\u6216\u4e00\u4e2a\u6ca1\u6211\u4eec\u4f60"
    ),
}
_ELLIPSES = ("...", "\u2026")
_BULLETS = ("\u2022", "-")
_ENDS = tuple('.!?"\u3002\uff01\uff1f\uff0e\u061f\u0964')
_SENTENCE_ENDS = (
    *(mark + behind for mark in ".!?" for behind in (" ", "\n", '"', ")", "\u201d")),
    *("\u3002", "\uff01", "\uff1f"),
)
_GARBLED = re.compile("[\ufffd\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_SHORT_LINE = 30  # characters

NAMES = (
    "words",
    "mean_word",
    "hashes",
    "ellipses",
    "bullet_lines",
    "ellipsis_lines",
    "letter_words",
    "stop_words",
    "duplicate_lines",
    "duplicate_paragraphs",
    "duplicate_line_characters",
    "duplicate_paragraph_characters",
    *(f"top_{n}_gram" for n in TOP_ORDERS),
    *(f"repeated_{n}_grams" for n in REPEATED_ORDERS),
    "ended_lines",
    "short_lines",
    "repeated_line_characters",
    "breaks_per_word",
    "sentences",
    "curly_brackets",
    "lorem_ipsum",
)


def garbled(text: str) -> float:
    """Returns the share of replacement and control characters, what a wrong decoding leaves."""
    return len(_GARBLED.findall(text)) / max(len(text), 1)


def prose(texts: Sequence[str], found: Words, language: str) -> list[dict[str, float]]:
    """Measures texts of one language that are not empty: the signals of `NAMES` of each.

    Args:
      found: their words.
    """
    scale = _CHARACTERS_PER_WORD.get(language, 1.0)
    characters = np.array([len(text) for text in texts])
    columns = _word_signals(found, language) | _gram_signals(found, characters, scale)
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    sizes = np.diff(found.ends, prepend=0).tolist()
    return [
        dict(zip(columns, row, strict=True))
        | _share_signals(text, max(size, 1))
        | _line_signals(text)
        | _web_signals(text)
        for text, size, row in zip(texts, sizes, rows, strict=True)
    ]


def _word_signals(found: Words, language: str) -> dict[str, np.ndarray]:
    """Measures the words: an array of the texts for each signal."""
    sizes = np.diff(found.ends, prepend=0)
    n_words = found.per_text(found.content)
    texts = np.repeat(np.arange(len(sizes)), sizes)
    present = np.zeros(len(sizes))
    for word in STOP_WORDS[language]:
        there = found.hashes == np.uint64(_hash_of(word))
        present += np.bincount(texts[there], minlength=len(sizes)) > 0
    return {
        "words": n_words.astype(float),
        "mean_word": found.per_text(found.lengths * found.content) / np.maximum(n_words, 1),
        "letter_words": found.per_text(found.letters) / np.maximum(sizes, 1),
        "stop_words": present,
    }


_hash_of = functools.cache(words.hash_of)


def _share_signals(text: str, n_words: int) -> dict[str, float]:
    return {
        "hashes": text.count("#") / n_words,
        "ellipses": sum(map(text.count, _ELLIPSES)) / n_words,
        "breaks_per_word": text.count("\n") / n_words,
    }


def _line_signals(text: str) -> dict[str, float]:
    stripped = [line.strip() for line in text.splitlines()]
    lines = [line for line in text.split("\n") if line] or [""]
    written = [line for line in lines if line and not line.isspace()]
    parts = (part.strip("\n") for part in text.strip().split("\n\n"))
    paragraphs = [part for part in parts if part] or [""]
    unbroken = len(text) - text.count("\n")
    return {
        "bullet_lines": _share(stripped, [line.startswith(_BULLETS) for line in stripped]),
        "ellipsis_lines": _share(stripped, [line.endswith(_ELLIPSES) for line in stripped]),
        "duplicate_lines": 1 - len(set(lines)) / len(lines),
        "duplicate_line_characters": _repeated(lines) / len(text),
        "duplicate_paragraphs": 1 - len(set(paragraphs)) / len(paragraphs),
        "duplicate_paragraph_characters": _repeated(paragraphs) / len(text),
        "ended_lines": _share(written, [line.endswith(_ENDS) for line in written]),
        "short_lines": _share(written, [len(line) <= _SHORT_LINE for line in written]),
        "repeated_line_characters": _repeated(written) / max(unbroken, 1),
    }


def _web_signals(text: str) -> dict[str, float]:
    return {
        "sentences": float(sum(map((text.rstrip() + "\n").count, _SENTENCE_ENDS))),
        "curly_brackets": float(text.count("{")),
        "lorem_ipsum": float(text.lower().count("lorem ipsum")),
    }


def _share(lines: Sequence[str], flags: Sequence[bool]) -> float:
    return flags.count(True) / max(len(lines), 1)


def _repeated(parts: Sequence[str]) -> int:
    """Returns the characters of all parts that occurred before."""
    return sum(map(len, parts)) - sum(map(len, set(parts)))


def _gram_signals(found: Words, characters: np.ndarray, scale: float) -> dict[str, np.ndarray]:
    """Measures the commonest short n-grams and all repeated long ones: an array of the texts for
    each signal.

    An n-gram can only occur twice where the one shorter by a word does, so each order looks at the
    places that the last one left.
    """
    tops = {round(n * scale): n for n in TOP_ORDERS}
    repeats = {round(n * scale): n for n in REPEATED_ORDERS}
    sizes = np.diff(found.ends, prepend=0)
    starts = found.ends - sizes
    text_of = np.repeat(np.arange(len(sizes)), sizes)
    stops = np.repeat(found.ends, sizes)
    ends = np.append(0, np.cumsum(found.lengths))
    # Words of different texts are different words.
    keys = found.hashes + words.mix(text_of.astype(np.uint64) + np.uint64(1))
    places, hashes = np.arange(len(keys)), keys
    result: dict[str, np.ndarray] = {}
    for n in range(2, max(repeats) + 1):
        inside = places + n <= stops[places]
        places, hashes = places[inside], hashes[inside]
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + keys[places + n - 1]
        order, firsts = words.grouped(hashes)
        if n in tops:
            groups = np.flatnonzero(firsts)
            counts = np.diff(np.append(groups, len(order)))
            most, place = _commonest(places[order[groups]], counts, text_of, starts)
            long_enough = sizes >= n
            lengths = ends[place[long_enough] + n] - ends[place[long_enough]] + tops[n] - 1
            total = np.zeros(len(sizes))
            total[long_enough] = lengths * most[long_enough]
            result[f"top_{tops[n]}_gram"] = total / characters
        again, several = np.empty((2, len(order)), bool)
        again[order] = ~firsts
        if n in repeats:
            total = _repeated_characters(places[again], n, ends, text_of)
            result[f"repeated_{repeats[n]}_grams"] = (
                np.bincount(*total, minlength=len(sizes)) / characters
            )
        several[order] = ~firsts | np.append(~firsts[1:], False)[: len(order)]
        places, hashes = places[several], hashes[several]
    return result


def _commonest(
    firsts: np.ndarray, counts: np.ndarray, text_of: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds each text's commonest n-gram: how often it occurs, and where first. Of equals it is the
    first in the text, so the text's first one if each occurs once.

    Args:
      firsts: where each n-gram is first, int64 [n-grams].
      counts: of each.
    """
    owners = text_of[firsts]
    most = np.ones(len(starts), np.int64)
    np.maximum.at(most, owners, counts)
    chosen = (counts == most[owners]) & (counts > 1)
    place = np.where(most > 1, len(text_of), starts)
    np.minimum.at(place, owners[chosen], firsts[chosen])
    return most, place


def _repeated_characters(
    places: np.ndarray, n: int, ends: np.ndarray, text_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds n-grams that occurred before, reading on behind each one.

    Args:
      places: where they begin, in order.

    Returns:
      for each stretch of them its text and its characters.
    """
    gaps = np.flatnonzero(np.diff(places) > 1)
    starts = places[np.append(0, gaps + 1)[: len(places)]]
    lasts = places[np.append(gaps, len(places) - 1)[: len(places)]]
    stretches: list[int] = []
    behind = 0
    for start, last in zip(starts.tolist(), lasts.tolist(), strict=True):
        if start < behind:
            start = behind
        if start <= last:
            behind = start + -(-(last - start + 1) // n) * n
            stretches += (start, behind)
    begun, ended = np.array(stretches, np.int64).reshape(-1, 2).T
    return text_of[begun], ends[ended] - ends[begun]
