"""Prints summaries, tables and lists of values, to a terminal, a file or a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsjax.files import check_writable, finite, write_json

_PIPE_WIDTH = 180  # columns; a file or a pipe has no width of its own, and rich would take 80


def check(destination: str | None) -> None:
    """Raises ValueError if the file of `show` cannot be written; for before the work."""
    if destination not in (None, "-"):
        check_writable(Path(destination))


def show(
    summary: dict[str, Any],
    print_summary: Callable[[dict[str, Any], Console], None],
    destination: str | None,
) -> None:
    """Shows a summary as the argument of `--json` says.

    Args:
      destination: None prints it for people; "-" prints one JSON object instead; anything else is
        a file that gets the object, besides the print. A number that is not finite is null there.
    """
    if destination == "-":
        print(json.dumps(finite(summary), indent=2))
        return
    if destination:
        write_json(Path(destination), finite(summary))
    console = Console()
    print_summary(summary, console if console.is_terminal else Console(width=_PIPE_WIDTH))


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, wraps: str = ""
) -> Table:
    """Returns a table of values, formatted by `cell`.

    Args:
      columns: headings; a leading ">" aligns a column to the right. Without any heading there is no
        header.
      wraps: the one column that may wrap on a narrow terminal.
    """
    header = any(name.lstrip(">") for name in columns)
    result = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, show_header=header)
    for name in columns:
        label = name.removeprefix(">")
        result.add_column(
            label,
            justify="right" if name.startswith(">") else "left",
            no_wrap=not wraps or label != wraps,
            overflow="fold",
        )
    for row in rows:
        # As Text, because rich takes brackets in a plain string for markup.
        result.add_row(*(Text(cell(value)) for value in row))
    return result


def figures(title: str, rows: Iterable[Sequence[object]]) -> Table:
    """Returns a table of labels and values without a header; values wrap, labels stay whole."""
    result = table(title, ("", ">"), rows)
    result.columns[1].no_wrap = False
    return result


def cell(value: Any) -> str:
    """Formats a value: 1,234 for an integer, 2 x 3 for a shape, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if isinstance(value, str) else " x ".join(map(str, value))


def print_values(console: Console, title: str, values: Mapping[str, object]) -> None:
    """Prints a title and below it `key=value` pairs in as many columns as fit."""
    console.rule(Text(title), align="left")
    pairs = [Text(f"{key}={value}") for key, value in values.items()]
    console.print(Columns(pairs, column_first=True, padding=(0, 3)))
