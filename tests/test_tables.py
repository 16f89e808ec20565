"""Tables say what they are given, to people and to programs."""

import io
import json
import math

import pytest
from rich.console import Console

from dsjax import tables


def printed(renderable, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (1234567, "1,234,567"), ("1.5 G", "1.5 G"), ([58, 256], "58 x 256"), ([], "")],
)
def test_cell_writes_each_kind_of_value(value, text):
    assert tables.cell(value) == text


def test_table_aligns_marked_columns_right_and_reads_no_markup():
    text = printed(tables.table("of [in, out]", ("name", ">count"), [("[bold]", 5), ("b", 12345)]))
    assert "of [in, out]" in text
    lines = [line.rstrip() for line in text.splitlines()]
    header, first, second = (
        next(line for line in lines if word in line) for word in ("name", "[bold]", "12,345")
    )
    assert len(header) == len(first) == len(second)  # count, 5 and 12,345 end in one column


def test_only_the_named_column_wraps():
    path = " ".join(["ab"] * 10)
    rows = [(path, " ".join(["word"] * 30), 7)]
    lines = printed(tables.table("", ("path", "text", ">n"), rows, wraps="text"), 60).splitlines()
    assert sum(path in line for line in lines) == 1
    assert sum("word" in line for line in lines) > 3


def test_figures_have_no_header():
    lines = [line for line in printed(tables.figures("", [("tokens", 5)])).splitlines() if line]
    assert [line.split() for line in lines if line.strip()] == [["tokens", "5"]]


def test_values_are_printed_as_they_are_set():
    console = Console(width=60, record=True, file=io.StringIO())
    tables.print_values(console, "tiny: [data]", {"files": "[red]*.txt", "seed": 0})
    text = console.export_text()
    assert "tiny: [data]" in text and "files=[red]*.txt" in text and "seed=0" in text


def test_summary_goes_where_its_flag_says(tmp_path, capsys):
    def print_summary(summary, console):
        console.print("n" * 150, summary["a"])

    lines = "n" * 150 + " 1\n"  # a pipe is wide enough for most tables
    tables.show({"a": 1}, print_summary, None)
    assert capsys.readouterr().out == lines
    tables.show({"a": 1}, print_summary, "-")
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    tables.show({"a": 1}, print_summary, str(tmp_path / "F"))
    assert capsys.readouterr().out == lines
    assert json.loads((tmp_path / "F").read_text()) == {"a": 1}
    for destination in ("-", str(tmp_path / "F")):  # JSON has no NaN
        tables.show({"a": [math.nan]}, lambda summary, console: None, destination)
        text = capsys.readouterr().out if destination == "-" else (tmp_path / "F").read_text()
        assert json.loads(text, parse_constant=pytest.fail) == {"a": [None]}
    with pytest.raises(FileNotFoundError):
        tables.show({}, print_summary, str(tmp_path / "none/F"))


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    for destination in (None, "-", str(tmp_path / "a.json")):
        tables.check(destination)
    with pytest.raises(ValueError, match="there is no folder"):
        tables.check(str(tmp_path / "absent" / "a.json"))


def test_long_value_leaves_the_labels_of_figures_whole():
    found = printed(tables.figures("", [("tokens per second", "278"), ("MFU", "word " * 30)]), 60)
    assert "tokens per second" in found and found.count("word") == 30
