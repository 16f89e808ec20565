"""Words of English and Chinese."""

import numpy as np
import pytest

from dsjax.curate import words


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


def test_content_hashes_see_words_alone():
    assert np.array_equal(
        words.content_hashes("The cat, the HAT!"), words.content_hashes("the Cat the hat")
    )
    first, second, again = words.content_hashes("one two one")
    assert first == again != second


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
