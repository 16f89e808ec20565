"""Passages that occurred before."""

import builtins

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.curate import passages

pytest.importorskip("pydivsufsort")


def plain(texts, least):
    """Marks every window that is found earlier in all texts before it."""
    kept, before = [], ""
    for text in texts:
        covered = [False] * len(text)
        for place in range(len(text) - least + 1):
            window = text[place : place + least]
            if (before + text[: place + least - 1]).find(window) >= 0:
                covered[place : place + least] = [True] * least
        kept.append("".join(c for c, out in zip(text, covered, strict=True) if not out))
        before += text + "|"
    return kept


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.text("ab", max_size=14), max_size=4), st.integers(2, 5))
def test_every_later_copy_goes(texts, least):
    assert passages.without_repeats(texts, least) == plain(texts, least)


def test_characters_stay_whole():
    texts = ["\u00e9abc", "\u0169abc"]  # the last byte of their first characters is the same
    assert passages.without_repeats(texts, 4) == [texts[0], "\u0169"]


def test_what_a_cut_leaves_is_stripped():
    notice = "This is free software, and comes as it is."
    found = passages.without_repeats([f"{notice}\n\none", f"{notice}\n\ntwo", notice], 20)
    assert found == [f"{notice}\n\none", "two", ""]


def test_short_and_no_texts():
    assert passages.without_repeats([], 10) == []
    assert passages.without_repeats(["", "a", "a"], 10) == ["", "a", "a"]


def test_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "pydivsufsort":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"dsjax\[prepare\].*passages=0"):
        passages.library()
