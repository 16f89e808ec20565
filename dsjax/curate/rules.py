"""Thresholds: for each kind of source and language, which measures a kept document has.

English: Gopher's and FineWeb's as datatrove ships them. Chinese: FineWeb-2's for Mandarin, with
characters for words. Code: StarCoder's. A document is removed by the first rule that it fails, in
the order below, so that counts per rule sum to what was removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dsjax.curate import code, signals
from dsjax.curate.recipe import KINDS, LANGUAGES, parse_change

ANY = "any"  # the language of code


class Rule(NamedTuple):
    """Bounds of a signal, both of which a kept document may have; NaN passes."""

    signal: str
    low: float = -math.inf
    high: float = math.inf


Table = dict[tuple[str, str], tuple[Rule, ...]]

_GARBLED = Rule("garbled", high=0.001)
_GRAMS = {
    "en": ((0.20, 0.18, 0.16), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)),
    "zh": ((0.256, 0.201, 0.171), (0.198, 0.182, 0.167, 0.154, 0.140, 0.127)),
}


def _repetition(language: str) -> list[Rule]:
    tops, repeats = _GRAMS[language]
    rules = [Rule("duplicate_lines", high=0.30 if language == "en" else 0.287)]
    if language == "en":
        rules += [
            Rule("duplicate_paragraphs", high=0.30),
            Rule("duplicate_line_characters", high=0.20),
            Rule("duplicate_paragraph_characters", high=0.20),
        ]
    orders = zip(signals.TOP_ORDERS, tops, strict=True)
    rules += [Rule(f"top_{n}_gram", high=most) for n, most in orders]
    orders = zip(signals.REPEATED_ORDERS, repeats, strict=True)
    return rules + [Rule(f"repeated_{n}_grams", high=most) for n, most in orders]


def _quality(language: str, letters: float) -> list[Rule]:
    size = [Rule("words", 50, 100_000), Rule("mean_word", 3, 10)]
    if language == "zh":  # words are characters, 1.6 of which make a word
        size = [Rule("words", 80, 160_000)]
    return [
        _GARBLED,
        *size,
        Rule("hashes", high=0.1),
        Rule("ellipses", high=0.1),
        Rule("bullet_lines", high=0.9),
        Rule("ellipsis_lines", high=0.3),
        Rule("letter_words", low=letters),
        Rule("stop_words", low=2),
    ]


def _page(language: str) -> list[Rule]:
    english = language == "en"
    rules = [Rule("ended_lines", low=0.12 if english else 0.106)]
    if english:
        rules += [Rule("short_lines", high=0.67)]
    return [
        *rules,
        Rule("repeated_line_characters", high=0.01 if english else 0.10),
        Rule("breaks_per_word", high=0.3 if english else 0.178 / 1.6),
        Rule("sentences", low=5 if english else 1),
        Rule("curly_brackets", high=0),
        Rule("lorem_ipsum", high=0),
    ]


def _standard() -> Table:
    table: Table = {}
    for language, letters in (("en", 0.8), ("zh", 0.735)):
        repetition = _repetition(language)
        table["web", language] = (*_quality(language, letters), *repetition, *_page(language))
        # Manuals quote commands, formulas are all symbols: fewer of their words have a letter.
        table["plain", language] = (*_quality(language, 0.5), *repetition)
        table["math", language] = (*_quality(language, 0.4), *repetition[-6:])
    table["code", ANY] = (
        _GARBLED,
        Rule("mean_line", high=100),
        Rule("longest_line", high=1000),
        Rule("alphanumeric", low=0.25),
        Rule("markup", high=0),
        Rule("data_bytes", 50, 5000),
        Rule("comments", 0.01, 0.8),
        Rule("parses", low=1),
    )
    return table


STANDARD: Table = _standard()


def table(changes: Iterable[str]) -> Table:
    """Returns the standard rules with changes as in `Recipe.rules`.

    Raises:
      ValueError: a change names a set of rules or a signal that there is not.
    """
    result = dict(STANDARD)
    for change in changes:
        kind, language, signal, bounds = parse_change(change)
        if (kind, language) not in result:
            sets = ", ".join(".".join(key) for key in result)
            raise ValueError(f"rules: {change!r} is of none of the sets {sets}")
        known = ("garbled", *(code.NAMES if kind == "code" else signals.NAMES))
        if signal not in known:
            raise ValueError(
                f"rules: {change!r} names no signal of {kind}; it has {', '.join(known)}"
            )
        rules = [rule for rule in result[kind, language] if rule.signal != signal]
        if bounds is not None:
            names = [rule.signal for rule in result[kind, language]]
            place = names.index(signal) if signal in names else len(rules)
            rules.insert(place, Rule(signal, *bounds))
        result[kind, language] = tuple(rules)
    return result


def first_failures(columns: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> np.ndarray:
    """Returns for each document the number of the first rule that it fails, or -1.

    Args:
      columns: float64 [documents] per signal.
    """
    count = len(next(iter(columns.values()))) if columns else 0
    result = np.full(count, -1)
    for number, rule in reversed(list(enumerate(rules))):
        values = columns[rule.signal]
        result[(values < rule.low) | (values > rule.high)] = number
    return result


def is_measured(kind: str, language: str) -> bool:
    """Tells whether there are rules for prose of this kind and language."""
    return kind in KINDS and (kind == "code" or language in LANGUAGES)
