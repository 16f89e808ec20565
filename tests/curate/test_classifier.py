"""The classifier tells what it has learned, the same each time."""

import builtins

import pytest

from dsjax.curate import classifier

SMALL = classifier.Settings(dim=8, epochs=40, rate=1.0, buckets=1000, least=1)
MATHS = ["let x be an integer and y its root", "the sum of x and y is an integer", "prove that x"]
OTHER = ["the cat sat on a mat", "a dog and the cat ran", "we had soup and bread", "unused"]


def test_texts_are_told_apart(tmp_path):
    pytest.importorskip("floret")
    for name in ("a", "b"):
        assert classifier.train(MATHS, iter(OTHER), tmp_path / name, SMALL) == 3
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    texts = ["Prove: the sum of x is\nan integer", "The dog had soup", "", *OTHER[:2] * 200]
    found = list(classifier.scores(tmp_path / "a", texts))
    assert len(found) == len(texts) and found[0] > 0.6 and max(found[1], *found[3:]) < 0.4
    with pytest.raises(ValueError, match="no texts to learn from"):
        classifier.train([], OTHER, tmp_path / "c", SMALL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A\nb\t C  d\n", "a b c d"),
        ("\u4f60\u597dx", "\u4f60 \u597d x"),
        ("Write __label__Like before", "write like before"),
        ("", ""),
    ],
)
def test_line(text, expected):
    assert classifier.line(text) == expected


def test_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "floret":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"dsjax\[prepare\]"):
        classifier.library()
