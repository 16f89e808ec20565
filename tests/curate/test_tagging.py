"""Tags: measures beside the text."""

import math

import pytest

from dsjax.curate import reading, shards, signals, tagging

KINDS = {"pages": "web", "src": "code"}
ENGLISH = "The committee will meet again in the spring of next year, and that is all we know."


def tag(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(
        tagging.language, "identify", lambda text: ("fr" if "le" in text.split() else "en", 0.9)
    )
    path = tmp_path / "00000-0000.parquet"
    with shards.Writer(path, reading.SCHEMA) as writer:
        for source, name, text in rows:
            row = {"id": f"{source}/{name}", "source": source, "path": name, "text": text}
            writer.add(row)
    (tmp_path / "tags").mkdir()
    assert tagging.tag(tagging.Job(path, KINDS, False), tmp_path / "tags", 0) == {
        "documents": len(rows)
    }
    return list(shards.rows(tmp_path / "tags" / path.name))


def test_kind_decides_what_is_measured(tmp_path, monkeypatch):
    page, source, french = tag(
        tmp_path,
        monkeypatch,
        [("pages", "a", ENGLISH), ("src", "b.py", "x = 1\n"), ("pages", "c", "le chat")],
    )
    assert (page["id"], page["language"], page["words"]) == ("pages/a", "en", 17)
    assert math.isnan(page["mean_line"]) and page["bytes"] == len(ENGLISH)
    assert (source["language"], source["parses"], source["score"]) == ("any", 1, 1)
    assert math.isnan(source["words"]) and source["garbled"] == 0
    assert french["language"] == "fr" and all(math.isnan(french[n]) for n in signals.NAMES)


@pytest.mark.parametrize(("other", "equal"), [("a  b\n\tc ", True), ("a b C", False)])
def test_digest_ignores_white_space(other, equal):
    assert (tagging.digest("a b c") == tagging.digest(other)) is equal
