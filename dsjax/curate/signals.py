"""Measures prose: the quantities that the rules of Gopher (arXiv 2112.11446, table A1), C4 and
FineWeb bound, defined as in datatrove's filters.

Shares lie in 0..1. A share of characters is relative to all characters of the text. A text in
Chinese has characters for words, so the orders of its n-grams are longer by 1.6, the characters of
an average word.
"""

from __future__ import annotations

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


def prose(text: str, found: Words, language: str) -> dict[str, float]:
    """Measures a text that is not empty: the signals of `NAMES`.

    Args:
      found: its words.
    """
    return _word_signals(text, found, language) | _line_signals(text) | _web_signals(text)


def _word_signals(text: str, found: Words, language: str) -> dict[str, float]:
    count = len(found.numbers)
    occurring = np.bincount(found.numbers, minlength=len(found.kinds))
    n_words = int(occurring[found.content].sum())
    length = int(found.lengths[found.content[found.numbers]].sum())
    return {
        "words": float(n_words),
        "mean_word": length / max(n_words, 1),
        "hashes": text.count("#") / max(count, 1),
        "ellipses": sum(map(text.count, _ELLIPSES)) / max(count, 1),
        "letter_words": float(occurring[found.letters].sum()) / max(count, 1),
        "stop_words": float(len(set(STOP_WORDS[language]).intersection(found.kinds))),
        "breaks_per_word": text.count("\n") / max(count, 1),
        **_gram_signals(found, len(text), _CHARACTERS_PER_WORD.get(language, 1.0)),
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
    return sum(flags) / max(len(lines), 1)


def _repeated(parts: Sequence[str]) -> int:
    """Returns the characters of all parts that occurred before."""
    return sum(map(len, parts)) - sum(map(len, set(parts)))


def _gram_signals(found: Words, characters: int, scale: float) -> dict[str, float]:
    """Measures the commonest short n-grams and all repeated long ones.

    An n-gram can only occur twice where the one shorter by a word does, so each order looks at the
    places that the last one left.
    """
    tops = {round(n * scale): n for n in TOP_ORDERS}
    repeats = {round(n * scale): n for n in REPEATED_ORDERS}
    ends = np.concatenate([[0], np.cumsum(found.lengths)])
    keys = words.mix(found.numbers.astype(np.uint64) + np.uint64(1))
    places, hashes = np.arange(len(keys)), keys
    result: dict[str, float] = {}
    for n in range(2, max(repeats) + 1):
        inside = places + n <= len(keys)
        places, hashes = places[inside], hashes[inside]
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + keys[places + n - 1]
        order, firsts = words.grouped(hashes)
        if n in tops:
            starts = np.flatnonzero(firsts)
            counts = np.diff(np.append(starts, len(order)))
            most = counts.max(initial=1)
            # The first of those that are commonest: of all, if each is there once.
            place = places[order[starts[counts == most]].min()] if most > 1 else 0
            length = ends[place + n] - ends[place] + tops[n] - 1 if len(keys) >= n else 0
            result[f"top_{tops[n]}_gram"] = float(length * most) / characters
        again, several = np.empty((2, len(order)), bool)
        again[order] = ~firsts
        if n in repeats:
            total = _repeated_characters(places[again], n, ends)
            result[f"repeated_{repeats[n]}_grams"] = total / characters
        several[order] = ~firsts | np.append(~firsts[1:], False)[: len(order)]
        places, hashes = places[several], hashes[several]
    return result


def _repeated_characters(places: np.ndarray, n: int, ends: np.ndarray) -> int:
    """Counts the characters of n-grams that occurred before, reading on behind each one.

    Args:
      places: where they begin, in order.
    """
    if not len(places):
        return 0
    gaps = np.flatnonzero(np.diff(places) > 1)
    starts = places[np.append(0, gaps + 1)]
    lasts = places[np.append(gaps, len(places) - 1)]
    total, behind = 0, 0
    for start, last in zip(starts.tolist(), lasts.tolist(), strict=True):
        start = max(start, behind)
        if start <= last:
            behind = start + -(-(last - start + 1) // n) * n
            total += int(ends[behind] - ends[start])
    return total
