"""Words of English and Chinese."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.curate import words

UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat, the hat...", ["The", "cat", ",", "the", "hat", "..."]),
        ("a_b 12x\n-- c", ["a_b", "12x", "--", "c"]),
        ("\u4f60\u597d\uff0cPython 3", ["\u4f60", "\u597d", "\uff0c", "Python", "3"]),
        ("\u3042\u30a2\u0e01x", ["\u3042", "\u30a2", "\u0e01", "x"]),
        ("", []),
    ],
)
def test_cut(text, expected):
    found = words.cut(text)
    assert [found.kinds[number] for number in found.numbers] == expected
    assert found.lengths.tolist() == [len(word) for word in expected]


PLAIN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]+")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("abZ9_.,! \n\t\x00\u4f60\u3042\u0e01\u00e9\u2026\u0661\u200b")))
def test_cut_is_what_a_regular_expression_finds(text):
    found, plain = words.cut(text), PLAIN.findall(text)
    assert [found.kinds[number] for number in found.numbers] == plain
    assert len(set(found.kinds)) == len(found.kinds)
    assert found.content.tolist() == [any(map(str.isalnum, kind)) for kind in found.kinds]
    assert found.letters.tolist() == [any(map(str.isalpha, kind)) for kind in found.kinds]


def test_only_so_much_of_a_text_is_looked_at(monkeypatch):
    monkeypatch.setattr(words, "MOST", 4)
    assert sorted(words.cut("ab cde").kinds) == ["ab", "c"]


def hashes(text):
    return words.content_hashes(words.cut(text))


def test_content_hashes_see_words_alone():
    assert np.array_equal(hashes("The cat, the HAT!"), hashes("the Cat the hat"))
    first, second, again = hashes("one two one")
    assert first == again != second
    assert len(hashes("... !")) == 0


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_rank_numbers_values(values):
    mixed = words.mix(np.array(values, np.uint64))
    numbers, first = words.rank(mixed)
    for one, number in zip(values, numbers, strict=True):
        assert [other == one for other in values] == (numbers == number).tolist()
        assert first[number] == values.index(one)


def test_content_share():
    assert words.content_share("ab_ \u4f60.") == 3 / 6


def test_mix_is_one_to_one_and_spreads():
    mixed = words.mix(np.arange(1000, dtype=np.uint64))
    assert len(set(mixed.tolist())) == 1000
    assert 0.4 < np.mean(mixed >> np.uint64(63)) < 0.6


@pytest.mark.parametrize(
    ("text", "share"),
    [("\u4f60\u597d ab", 0.5), ("abc", 0.0), ("\u4f60\u597d\u3067\u3059", 0.0), ("", 0.0)],
)
def test_han_share(text, share):
    assert words.han_share(text) == share
