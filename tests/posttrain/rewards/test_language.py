"""The language rule: scripts, and what is left out."""

import pytest

from dsjax.posttrain.rewards import language as rule

HAN = "\u8fd9\u662f\u4e00\u4e2a"  # four characters


def share(thought, language="en"):
    return rule.score(f"<think>{thought}</think>answer", {"language": language})


@pytest.mark.parametrize(
    ("thought", "language", "expected"),
    [
        ("We add the two numbers.", "en", 1),
        (HAN, "zh", 1),
        (HAN, "en", 0),
        ("one two three four " + HAN, "en", 0.5),
        ("one two three four " + HAN, "zh", 0.5),
        ("one" + HAN + "two", "en", 2 / 6),
        ("na\u00efve cafe\u0301 stra\u00dfe", "fr", 1),
        ("\u0441\u043b\u043e\u0432\u043e word", "ru", 0.5),
        ("\u3053\u308c\u306f\u6f22\u5b57", "ja", 1),
        ("\u4eba\u3005", "ja", 1),  # with the sign that repeats a character
        ("\ud55c\uad6d\uc5b4 word", "ko", 0.5),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 word", "hi", 0.5),
        ("\uff21\uff22\uff23 word", "en", 1),  # full-width Latin
        ("We add.", "EN-us", 1),
        # LaTeX, code, addresses and variables are in no language.
        (HAN + r" $\frac{alpha}{beta}$ \(sin x\) \[cos x\] \begin{cases}word\end{cases}", "zh", 1),
        (
            HAN + " \\sqrt x ```py\nfor word in words: pass\n``` `print` https://a.b/word",
            "zh",
            1,
        ),
        (HAN + " x = y + \u03b1", "zh", 1),
        (HAN + " ``` not closed word", "zh", 1),
    ],
)
def test_share_is_that_of_words(thought, language, expected):
    assert share(thought, language) == pytest.approx(expected)


@pytest.mark.parametrize("thought", ["", "  ", "1 + 2 = 3", "$x$", "x"])
def test_thought_without_words_cannot_be_judged(thought):
    assert share(thought) is None


def test_answer_is_not_part_of_the_thought():
    assert rule.score(f"some words</think>{HAN}", {"language": "en", "opened": True}) == 1
    assert rule.score(HAN, {"language": "en", "opened": False}) is None
    assert rule.score(HAN, {"language": "en", "opened": True}) == 0  # a thought that never ends


def test_long_thoughts_take_no_time():
    assert share("word " * 100_000) == 1
    assert share("$" * 50_001) is None
    assert share("\\[" * 20_000) is None


@pytest.mark.parametrize("problem", [{}, {"language": "klingon"}, {"language": 5}])
def test_unknown_language_is_refused(problem):
    assert rule.complaint({"language": "zh-CN"}) is None
    assert "none of ar, be" in rule.complaint(problem)
