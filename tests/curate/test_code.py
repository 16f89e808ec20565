"""Measures of source code."""

import math

import pytest

from dsjax.curate import code

PYTHON = '''"""What it does."""

# why
x = 1  # not at the start of a line
'''


def test_every_signal_has_a_value():
    assert set(code.measure("x", "a.txt")) == set(code.NAMES)


@pytest.mark.parametrize(
    ("text", "path", "share"),
    [
        (PYTHON, "a.py", (len('"""What it does."""') + len("# why")) / len(PYTHON)),
        ("// a\nint x; /* b\nc */", "a.C".lower(), 13 / 21),
        ("# a\nls\n", "b/run.sh", 3 / 7),
        ("-- a\nSELECT 1", "q.sql", 4 / 13),
    ],
)
def test_comments(text, path, share):
    assert code.measure(text, path)["comments"] == pytest.approx(share)


def test_what_does_not_apply_is_nan():
    found = code.measure("x", "a.txt")
    assert math.isnan(found["comments"]) and math.isnan(found["parses"])
    assert math.isnan(found["data_bytes"])
    assert code.measure("{}", "a.json")["data_bytes"] == 2


def test_lines_and_characters():
    found = code.measure("ab\nabcd\n", "a.txt")
    assert (found["mean_line"], found["longest_line"]) == (3, 4)
    assert found["alphanumeric"] == 6 / 8
    assert code.measure("<?xml version='1.0'?>", "a.svg")["markup"] == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [("x = 1\n", True), ("print 1", False), ("x\0", False), ("'\\d'", True), ("(" * 500, False)],
)
def test_parses(text, answer):
    assert code.parses(text) is answer
