"""Tags: measures beside the text."""

import math

import pytest

from dsjax.curate import reading, shards, signals, tagging, words

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


def test_of_long_texts_the_beginning_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(words, "MOST", len(ENGLISH))
    rows = [("pages", "a", ENGLISH), ("pages", "b", ENGLISH + " And so on." * 9)]
    short, long = tag(tmp_path, monkeypatch, rows)
    assert [long[name] for name in signals.NAMES] == [short[name] for name in signals.NAMES]
    assert long["bytes"] == len(rows[1][2]) and long["digest"] != short["digest"]


ODD = [
    "\0", " \n\t ", "\n" * 9, "\u200b", "...", "_", "#" * 99, "\U0001f600" * 9, "\u0e01\u0e33",
    "\u0645\u0631\u062d\u0628\u0627", "\u0130I\u0131i", "\ufffd" * 9, "a\r\nb\r\n", "x" * 100_000,
    "a " * 50_000, "\u4e2d" * 999, "\u3042\u4e2d", "\u2028\u2029\x85\x0c", "{" * 999, "<?xml?>",
]  # fmt: skip


@pytest.mark.parametrize("source", ["pages", "src"])
def test_odd_texts_are_measured(tmp_path, monkeypatch, source):
    rows = tag(tmp_path, monkeypatch, [(source, f"{n}.py", text) for n, text in enumerate(ODD)])
    names = signals.NAMES if source == "pages" else ("mean_line", "alphanumeric", "parses")
    assert all(0 <= row[name] < math.inf for row in rows for name in names)
    assert [row["bytes"] for row in rows] == [len(text.encode()) for text in ODD]
