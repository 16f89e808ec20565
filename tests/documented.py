"""Finds the commands that a text tells its reader to run.

In Markdown they stand in fenced blocks, in the docstrings of tools and configs on lines of their
own. In a block, `# needs WHAT` as a line covers the commands below it, and behind a command that
command: no small machine without a network has WHAT, so no test runs them (all are still parsed).
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SHELL = ("", "sh", "bash")
_BEGINS = re.compile(r"(python|make|dsjax|pip|curl|source|export|sbatch|kubectl|llama-\w+|ollama) ")


@dataclass(frozen=True)
class Command:
    """A command as it is typed.

    Attributes:
      place: file and line.
      words: without comments and ellipses.
      needs: what it asks of a machine beyond a CPU, empty for nothing.
      elided: whether "..." stands for the arguments of the last command without it.
      behind: whether it runs while the next one does ("&").
    """

    place: str
    words: tuple[str, ...]
    needs: str = ""
    elided: bool = False
    behind: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def pages() -> list[Path]:
    """Returns the Markdown files that people read."""
    around = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    return [*around, *sorted((ROOT / "docs").rglob("*.md"))]


def in_pages() -> list[Command]:
    """Returns the commands of all fenced blocks."""
    return [
        command
        for page in pages()
        for language, line, text in blocks(page)
        if language in _SHELL and any(map(_BEGINS.match, text.splitlines()))
        for command in _commands(text, page, line)
    ]


def in_docstrings() -> list[Command]:
    """Returns the commands in the docstrings of tools and configs, each begun on its own line."""
    found = []
    for folder in ("tools", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            text = re.sub(r"^ *(?:Command: +)?(?=python tools/)", "", text, flags=re.MULTILINE)
            found += _commands(text, path, 1, re.compile("python tools/"))
    return found


def in_prose() -> list[Command]:
    """Returns the commands between single backquotes, which may stop short or hold placeholders."""
    found = []
    for page in pages():
        text = re.sub(r"^ *```.*?^ *```", _blank, page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for match in re.finditer(r"`((?:python|dsjax|make) [^`]+)`", text):
            place = f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
            found.append(Command(place, _without_marks(_words(match[1]) or ())))
    return found


def _blank(match: re.Match[str]) -> str:
    return "\n" * match[0].count("\n")


def blocks(page: Path) -> Iterator[tuple[str, int, str]]:
    """Yields language, line and text of each fenced block."""
    language, begin, rows = None, 0, list[str]()
    for number, row in enumerate(page.read_text().splitlines(), 1):
        fence = re.fullmatch(r" *```(\w*)", row)
        if not fence:
            rows.append(row)
        elif language is None:
            language, begin, rows = fence[1], number + 1, []
        else:
            yield language, begin, "\n".join(rows)
            language = None


def files(page: Path) -> Iterator[tuple[str, str]]:
    """Yields name and text of the files that a page tells its reader to write: blocks of Python
    that begin with the name.
    """
    for language, _, text in blocks(page):
        name = re.match(r"# (\w+\.py)\b", text)
        if language == "python" and name:
            yield name[1], text + "\n"


def _commands(
    text: str, path: Path, line: int, begins: re.Pattern[str] = re.compile(r"\S")
) -> Iterator[Command]:
    needs, rows, first = "", list[str](), line
    for number, row in enumerate(text.splitlines(), line):
        if not rows and row.startswith("#"):
            needs = (re.findall(r"^# needs (.+)", row) or [needs])[0]
            continue
        if not rows and not begins.match(row):
            continue
        first = first if rows else number
        rows.append(row)
        words = _words("\n".join(rows))
        if row.endswith("\\") or words is None:
            continue
        own = re.search(r" #.*\bneeds (.+)", row)
        if words:
            place = f"{path.relative_to(ROOT)}:{first}"
            elided, behind = "..." in words, words[-1] == "&"
            kept = _without_marks(words)
            yield Command(place, kept, own[1] if own else needs, elided, behind)
        rows = []
    assert not rows, f"{path}:{first}: a quote has no end"


def _words(text: str) -> tuple[str, ...] | None:
    """Splits as a shell does; None while a quote is open."""
    try:
        found = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError:
        return None
    return tuple(found)


def _without_marks(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for word in words if word not in ("...", "&"))
