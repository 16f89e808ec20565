"""Filters of sampled answers."""

import pytest

from dsjax.posttrain import filters
from dsjax.posttrain.filters import Judged, sift

HAN = "\u8fd9\u662f\u4e00\u4e2a"
KANA = "\u3053\u308c\u306f"


def answer(sample, text="fine words", worth=1.0, ended=True):
    return Judged((0, sample), text, 3, ended, worth)


def test_each_answer_is_kept_or_dropped_for_one_reason():
    passage = "all of this is said again and again, word by word. "
    answers = [
        answer(0, "a"),
        answer(1, "b", ended=False),
        answer(2, "c", worth=None),
        answer(3, "d", worth=0.9),
        answer(4, "some words " + HAN),
        answer(5, passage * 3),
        answer(6, " a\n"),
        answer(7, "e", worth=2.0),
    ]
    kept, dropped = sift(answers, "right")
    assert [each.key[1] for each in kept] == [0, 7]
    assert dropped == dict.fromkeys(filters.REASONS[:-1], 1)
    kept, dropped = sift(answers, "best")
    assert [each.key[1] for each in kept] == [7] and dropped["not the best"] == 2
    kept, dropped = sift(answers, "all")
    assert [each.key[1] for each in kept] == [0, 2, 3, 7]
    assert "wrong" not in dropped and "not judged" not in dropped


def test_best_is_the_first_of_equals():
    answers = [answer(0, "a", 0.5), answer(1, "b", 0.7), answer(2, "c", 0.7)]
    assert [each.key[1] for each in sift(answers, "best")[0]] == [1]
    assert sift([answer(0, worth=0.0)], "right") == ([], {"wrong": 1})
    assert sift([], "best") == ([], {})


@pytest.mark.parametrize(
    ("text", "mixed"),
    [
        ("word " * 9 + HAN[0], False),
        ("word " * 8 + HAN[0], True),
        (HAN * 3 + KANA, False),  # Japanese
        ("1 + 2 = 3", False),
        (HAN + " $x$ \\alpha", False),
    ],
)
def test_languages_are_mixed_from_a_tenth_on(text, mixed):
    assert filters.mixes_languages(text) == mixed


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("0123456789" * 4 * 3, True),  # three times forty characters
        ("0123456789" * 4 * 2, False),
        ("a" * 119, False),
        ("a" * 120, True),
        (" " * 500, False),
        ("One two three. " * 2 + "Four.", False),
    ],
)
def test_repetition_is_a_long_passage_thrice(text, repeated):
    assert filters.repeats(text) == repeated


def test_long_texts_take_no_time():
    assert not filters.repeats("".join(f"{n}, " for n in range(50_000)))
