"""Tables and lists of figures on a terminal, in a file or in a pipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 180  # columns; a file or a pipe has no width of its own, and rich would take 80


def show(
    summary: dict[str, Any],
    print_summary: Callable[[dict[str, Any], Console], None],
    *,
    as_json: bool = False,
) -> None:
    """Prints a summary on standard output: for people, or as one JSON object."""
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        console = Console()
        print_summary(summary, console if console.is_terminal else Console(width=_PIPE_WIDTH))


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, wraps: str = ""
) -> Table:
    """Returns a table of values as `cell` writes them.

    Args:
      columns: a leading ">" aligns a column to the right; a table whose columns are all named
        ">" or "" has no header.
      wraps: the column that breaks its lines where the terminal is narrow; the others never do.
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
        # As Text, so that rich reads no markup in a name that holds brackets.
        result.add_row(*(Text(cell(value)) for value in row))
    return result


def figures(title: str, rows: Iterable[Sequence[object]]) -> Table:
    """Returns a table of pairs, a label and its value, without a header."""
    return table(title, ("", ">"), rows)


def cell(value: Any) -> str:
    """Writes a whole number with separators, a shape as 2 x 3, and None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if isinstance(value, str) else " x ".join(map(str, value))


def print_values(console: Console, title: str, values: Mapping[str, object]) -> None:
    """Prints `key=value` for each value, in as many columns as fit below the title."""
    console.rule(Text(title), align="left")
    pairs = [Text(f"{key}={value}") for key, value in values.items()]
    console.print(Columns(pairs, column_first=True, padding=(0, 3)))
