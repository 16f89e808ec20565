"""Recipes are checked before anything is read."""

import math

import pytest

from dsjax import settings
from dsjax.curate.recipe import Recipe, Source, parse_change

PAGES = Source(name="pages", files="*.txt", kind="web")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web.en.words=20..100", ("web", "en", "words", (20, 100))),
        ("web.en.words=20..", ("web", "en", "words", (20, math.inf))),
        ("code.any.longest_line=..2e3", ("code", "any", "longest_line", (-math.inf, 2000))),
        ("code.any.parses=off", ("code", "any", "parses", None)),
    ],
)
def test_change_of_a_rule(text, expected):
    assert parse_change(text) == expected


@pytest.mark.parametrize("text", ["words=1..2", "web.en.words", "web.en.words=5", "a.b.c=9..1"])
def test_change_that_is_none_names_the_form(text):
    with pytest.raises(ValueError, match=r"KIND\.LANGUAGE\.SIGNAL=LOW\.\.HIGH"):
        parse_change(text)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sources": ()}, "no sources"),
        ({"sources": (PAGES, PAGES)}, "two sources are called"),
        ({"languages": ("fr",)}, "languages='fr'"),
        ({"heldout_fraction": 2.0}, "heldout_fraction=2"),
        ({"language_score": 65.0}, "language_score=65"),
        ({"shard_bytes": 1}, "shard_bytes=1"),
        ({"tokenizer": "t.json", "heldout_fraction": 0.0}, "tokenizer needs held-out text"),
        ({"passages": 10}, "passages=10 must be 0, or at least 50"),
        ({"passages": 99, "shard_bytes": 2 << 30}, "shards of at most 1 GiB"),
        ({"jaccard": 0.1}, "jaccard=0.1"),
        ({"rules": ("words",)}, "'words' is no rule"),
    ],
)
def test_recipe_names_what_is_wrong(wrong, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**({"sources": (PAGES,)} | wrong))


@pytest.mark.parametrize(
    "wrong",
    [{"name": "a/b"}, {"files": " "}, {"kind": "prose"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_source_names_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=repr(next(iter(wrong.values()))).strip("'")):
        Source(**({"name": "s", "files": "*.txt"} | wrong))


def test_recipe_survives_json():
    recipe = Recipe(sources=(PAGES,), languages=("zh",), rules=("web.zh.words=off",))
    assert settings.from_dict(settings.to_dict(recipe), "here", Recipe) == recipe
