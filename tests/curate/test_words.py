"""Words of English and Chinese."""

import itertools
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
    check([text], [expected])


def check(texts, expected):
    """Compares the words of texts with strings."""
    found = words.cut(texts)
    every = [word for part in expected for word in part]
    assert found.ends.tolist() == list(itertools.accumulate(map(len, expected)))
    assert found.lengths.tolist() == list(map(len, every))
    assert found.content.tolist() == [any(map(str.isalnum, word)) for word in every]
    assert found.letters.tolist() == [any(map(str.isalpha, word)) for word in every]
    for hashes, same in ((found.hashes, every), (found.lower, list(map(str.lower, every)))):
        assert len(set(zip(hashes.tolist(), same, strict=True))) == len(set(same))
        assert len(set(hashes.tolist())) == len(set(same))


PLAIN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]+")


CHARACTERS = st.sampled_from("abAZ9_.,! \n\t\x00\u4f60\u3042\u0e01\u00e9\u00c9\u2026\u0661\u200b")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.text(CHARACTERS), min_size=1, max_size=3))
def test_cut_is_what_a_regular_expression_finds(texts):
    check(texts, list(map(PLAIN.findall, texts)))


def test_words_are_added_up_by_text():
    found = words.cut(["a bb", "", "ccc"])
    assert found.per_text(found.lengths).tolist() == [3, 0, 3]


def test_only_so_much_of_a_text_is_looked_at(monkeypatch):
    monkeypatch.setattr(words, "MOST", 4)
    found = words.cut(["ab cde", "f"])
    assert (found.lengths.tolist(), found.ends.tolist()) == ([2, 1, 1], [2, 3])


def test_batches_hold_every_text_once(monkeypatch):
    monkeypatch.setattr(words, "_TOGETHER", 10)
    texts = ["x" * size for size in (4, 6, 1, 30, 9, 9)]
    assert list(words.batches([0, 1, 2, 3, 4], texts)) == [[0, 1], [2], [3], [4]]
    assert list(words.batches([], texts)) == []


def hashes(text):
    return words.content_hashes(text)


def test_content_hashes_see_words_alone():
    assert np.array_equal(hashes("The cat, the HAT!"), hashes("the Cat the hat"))
    first, second, again = hashes("one two one")
    assert first == again != second
    assert len(hashes("... !")) == 0
    assert words.hash_of("two") == second


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
