"""Measures source code: the quantities of StarCoder's filters (arXiv 2305.06161, section 3)."""

from __future__ import annotations

import re
import symtable
import warnings
from pathlib import PurePosixPath

from dsjax.curate import words

NAMES = (
    "mean_line",
    "longest_line",
    "alphanumeric",
    "comments",
    "markup",
    "data_bytes",
    "parses",
)
# Line comments and block comments by suffix; the rest has none that is known.
_HASH = re.compile(r"^[ \t]*#.*$", re.MULTILINE)
_SLASH = re.compile(r"^[ \t]*//[^\n]*|/\*.*?\*/", re.MULTILINE | re.DOTALL)
_DASH = re.compile(r"^[ \t]*--.*$", re.MULTILINE)
_PYTHON = re.compile(
    r"^[ \t]*#[^\n]*|^[ \t]*[rRuU]?(?:\"\"\"[^\"\\]*(?:(?:\\.|\"(?!\"\"))[^\"\\]*)*\"\"\""
    r"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*''')",
    re.MULTILINE | re.DOTALL,
)
_COMMENTS = {
    **dict.fromkeys((".py", ".pyi"), _PYTHON),
    **dict.fromkeys((".sh", ".rb", ".pl", ".r", ".jl", ".cmake"), _HASH),
    **dict.fromkeys((".lua", ".sql", ".hs"), _DASH),
    **dict.fromkeys(
        (
            *(".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".cu", ".cuh", ".cs", ".java"),
            *(".js", ".ts", ".jsx", ".tsx", ".go", ".rs", ".swift", ".kt", ".scala", ".php"),
        ),
        _SLASH,
    ),
}
_DATA = {".json", ".yaml", ".yml"}
_MARKUP = re.compile(r"\s*<\?xml")


def measure(text: str, path: str) -> dict[str, float]:
    """Measures a source file that is not empty: the signals of `NAMES`.

    Shares are of characters. A signal that does not apply to files of this suffix is NaN.
    """
    suffix = PurePosixPath(path).suffix.lower()
    lines = text.splitlines() or [""]
    lengths = list(map(len, lines))
    comment = _COMMENTS.get(suffix)
    unknown = float("nan")
    return {
        "mean_line": sum(lengths) / len(lengths),
        "longest_line": float(max(lengths)),
        "alphanumeric": words.content_share(text),
        "comments": sum(map(len, comment.findall(text))) / len(text) if comment else unknown,
        "markup": float(bool(_MARKUP.match(text))),
        "data_bytes": float(len(text.encode())) if suffix in _DATA else unknown,
        "parses": float(parses(text)) if suffix == ".py" else unknown,
    }


def parses(text: str) -> bool:
    """Tells whether this is Python, as the running interpreter reads it.

    The symbol table takes half as long as code, and a third of the tree of `ast`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            symtable.symtable(text, "<document>", "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return False
    return True
