"""Shingles, MinHash and bands."""

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.curate import shingles, words


def cut(text):
    return shingles.shingle_set(text)


def signatures(*texts):
    return shingles.signatures(*shingles.shingles(words.cut(texts)))


WORDS = [f"w{number}" for number in range(400)]


def test_shingles_are_five_words_without_case_and_punctuation():
    text = "One two, three four five six."
    assert len(cut(text)) == 2
    assert np.array_equal(cut(text), cut("one TWO three-four five six"))
    assert len(cut("\u4f60\u597d\u5417\u6211\u5f88\u597d")) == 2


def test_short_texts_have_one_shingle():
    assert len(cut("one two")) == len(cut("...")) == 1
    assert not np.array_equal(cut("one two"), cut("two one"))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=5, max_size=40), st.integers(1, 5))
def test_grams_are_equal_where_words_are(numbers, n):
    hashes = np.arange(10, 14, dtype=np.uint64)[numbers]
    found = shingles.grams(hashes, n)
    plain = [tuple(numbers[i : i + n]) for i in range(len(numbers) - n + 1)]
    assert len(found) == len(plain)
    assert len(set(found.tolist())) == len(set(plain))


def test_signatures_estimate_the_similarity():
    pytest.importorskip("rensa")
    base = " ".join(WORDS)
    errors = []
    for share in (0.5, 0.8, 0.95):
        other = " ".join(WORDS[: int(share * len(WORDS))])
        one, two = signatures(base, other)
        errors.append((one == two).mean() - shingles.jaccard(cut(base), cut(other)))
    assert np.abs(errors).max() < 0.12


def test_signatures_do_not_depend_on_neighbours():
    pytest.importorskip("rensa")
    texts = ["a b c d e f", "g h i j k l m", "", "n o", "p, q r s t"]
    found = signatures(*texts)
    assert found.shape == (5, shingles.VALUES)
    assert all(np.array_equal(row, signatures(text)[0]) for row, text in zip(found, texts))  # noqa: B905
    assert "rensa" in shingles.library()


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_find_pairs_at_the_threshold(threshold):
    rows = shingles.rows_per_band(threshold)
    found = [1 - (1 - threshold**r) ** (shingles.VALUES // r) for r in (rows, rows + 1)]
    assert found[0] >= 0.9 > found[1]


def test_bands_are_equal_where_all_their_values_are():
    one = np.arange(shingles.VALUES, dtype=np.uint32)
    other = one.copy()
    other[10] += 1
    found = shingles.bands(np.stack([one, other]), 8)
    assert found.shape == (2, 16)
    assert np.flatnonzero(found[0] != found[1]).tolist() == [1]


def test_jaccard():
    assert shingles.jaccard(np.array([1, 2, 3]), np.array([2, 3, 4, 5])) == 2 / 5


def test_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "rensa":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"dsjax\[prepare\].*duplicates=exact"):
        shingles.library()
