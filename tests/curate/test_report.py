"""The report joins what shards found and shows it whole."""

import json
from html.parser import HTMLParser

from dsjax.curate import deciding, report, rules

KINDS = {"pages": "web", "src": "code"}
READ = {"pages": [5, 45], "src": [0, 0]}
DECIDED = [
    {
        "distributions": {"web.en": {"words": [1] + [0] * 39}},
        "languages": {"pages": {"fr": 1, "en": 1}},
    },
    {"distributions": {"web.en": {"words": [2] + [0] * 39}}, "languages": {"pages": {"en": 3}}},
]
WRITTEN = [
    {
        "counts": {"pages": {"kept": [3, 30], "words": [1, 5]}},
        "sides": {"pages": {"train": [3, 30]}},
        "samples": [["pages", "kept", [[7, "pages/b", "<b>bold</b>"]]], ["pages", "words", []]],
    },
    {
        "counts": {"pages": {"kept": [1, 10]}},
        "sides": {"pages": {"heldout": [1, 10]}},
        "samples": [["pages", "kept", [[5, "pages/a", "a"], [9, "pages/c", "c"]]]],
    },
]


def gathered():
    return report.gather(KINDS, READ, DECIDED, WRITTEN, samples=2)


def test_gather_adds_and_chooses():
    found = gathered()
    assert found["sources"]["pages"] == {
        "kind": "web",
        "read": [5, 45],
        "languages": {"en": 4, "fr": 1},
        "removed": {"words": [1, 5]},
        "train": [3, 30],
        "heldout": [1, 10],
    }
    assert found["sources"]["src"]["read"] == [0, 0]
    assert found["distributions"]["web.en"]["words"][0] == 3
    assert [sample["id"] for sample in found["samples"]] == ["pages/a", "pages/b"]


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.links = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_page_is_one_file_that_shows_texts_as_they_are(tmp_path):
    tokens = {"train": {"tokens": 12345, "bytes_per_token": 3.2}}
    more = {
        "rejected": 1234,
        "problems": ["x is not UTF-8"],
        "tokens": tokens,
        "duplicate_groups": {"7": 3},
    }
    report.save(gathered() | more, rules.STANDARD, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}
    assert json.loads((tmp_path / "report.json").read_text())["rejected"] == 1234
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert "b" not in page.tags and "<b>bold</b>" in page.text
    assert "x is not UTF-8" in page.text and "1,234 records or files" in page.text
    assert "5 (45 bytes)" in page.text
    assert "train: 12,345 tokens, 3.2 bytes per token" in page.text
    assert "en480.0%" in page.text and "73" in page.text
    assert page.tags.count("img") == 1
    assert all(link.startswith("data:image/png;base64,") for link in page.links)


def test_same_findings_make_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report.save(gathered(), rules.STANDARD, tmp_path / name)
    pages = [(tmp_path / name / "report.html").read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1] and deciding.BINS == 40
