"""Measures of prose against a plain reading of their definitions."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.curate import signals, words

PARTS = ["a", "bb", "dd ccc", "a bb ccc dd a bb", "ccc a a bb dd a bb ccc e f g"]
TEXT = st.lists(st.sampled_from(PARTS), min_size=1, max_size=20).map(" ".join)


def measure(text, language="en"):
    (found,) = signals.prose([text], words.cut([text]), language)
    return found


def top(found, n):
    """Characters of the commonest n-gram, the first of equals, times its occurrences."""
    grams = [" ".join(found[i : i + n]) for i in range(len(found) - n + 1)]
    if not grams:
        return 0
    gram, count = Counter(grams).most_common(1)[0]
    return len(gram) * count


def repeated(found, n):
    """Characters of n-grams that occurred before, reading on behind each."""
    grams = [tuple(found[place : place + n]) for place in range(len(found) - n + 1)]
    total, place = 0, 0
    while place < len(grams):
        if grams[place] in grams[:place]:
            total += len("".join(grams[place]))
            place += n
        else:
            place += 1
    return total


@settings(max_examples=60, deadline=None, derandomize=True)
@given(TEXT)
def test_grams_are_as_defined(text):
    found = measure(text)
    split = text.split()
    for n in signals.TOP_ORDERS:
        assert found[f"top_{n}_gram"] == pytest.approx(top(split, n) / len(text))
    for n in signals.REPEATED_ORDERS:
        assert found[f"repeated_{n}_grams"] == pytest.approx(repeated(split, n) / len(text))


def test_grams_of_chinese_are_longer():
    text = "\u4e00\u4e01\u4e02\u4e03" * 10
    found = measure(text, "zh")
    assert found["repeated_5_grams"] == pytest.approx(repeated(list(text), 8) / len(text))
    # Of five characters, as three words, with the spaces between words.
    assert found["top_3_gram"] * len(text) == pytest.approx((5 + 2) * 9)


PAGE = """# A title

The cat sat on the mat.
- one thing
- one thing
\u2022 two...
The cat sat on the mat.

The end, and that is "it"."""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("words", 25),
        ("hashes", 1 / 35),
        ("ellipses", 1 / 35),
        ("bullet_lines", 3 / 9),
        ("ellipsis_lines", 1 / 9),
        ("letter_words", 25 / 35),
        ("stop_words", 3),  # the, and, that: "The" is another word
        ("duplicate_lines", 2 / 7),
        ("duplicate_paragraphs", 0),
        ("ended_lines", 4 / 7),
        ("short_lines", 1),
        ("repeated_line_characters", (23 + 11) / (len(PAGE) - 8)),
        ("breaks_per_word", 8 / 35),
        ("sentences", 4),
        ("curly_brackets", 0),
    ],
)
def test_page(name, value):
    assert measure(PAGE)[name] == pytest.approx(value)


def test_every_signal_has_a_value():
    for text in (PAGE, "x", "\n", "...", "\u4f60"):
        found = measure(text)
        assert set(found) == set(signals.NAMES)
        assert all(value == value and value >= 0 for value in found.values())


def test_garbled_counts_what_decoding_leaves():
    assert signals.garbled("ab\ufffd\x00") == 0.5
    assert signals.garbled("tab\tline\r\n") == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(TEXT, min_size=2, max_size=6), st.sampled_from(["en", "zh"]))
def test_texts_together_are_measured_as_alone(texts, language):
    found = signals.prose(texts, words.cut(texts), language)
    assert found == [measure(text, language) for text in texts]
