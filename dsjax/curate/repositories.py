"""Orders the files of a repository and joins them into one document.

DeepSeek-Coder (arXiv 2401.14196, section 2.2) puts a file behind those that it imports; imports are
found by regular expressions, in Python, Java, C#, C and C++. DeepSeek-Coder-V2 gave that up for a
random order. In both, a comment with its path begins each file.
"""

from __future__ import annotations

import heapq
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from dsjax.curate.sampling import position

_PYTHON, _C, _JAVA, _SHARP = (
    (".py", ".pyi"),
    (".c", ".h", ".cc", ".hh", ".cpp", ".hpp", ".cxx", ".hxx"),
    (".java",),
    (".cs",),
)
ORDERED = frozenset((*_PYTHON, *_C, *_JAVA, *_SHARP))  # suffixes whose imports are understood

_IMPORT = re.compile(r"^[ \t]*import[ \t]+([\w., \t]+)", re.MULTILINE)
_FROM = re.compile(
    r"^[ \t]*from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]*(?:\(([^)]*)\)|([^\n#;]*))", re.MULTILINE
)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]+[\"<]([^\">\n]+)[\">]", re.MULTILINE)
_JAVA_IMPORT = re.compile(r"^[ \t]*import[ \t]+(?:static[ \t]+)?([\w.]+?)(?:\.\*)?;", re.MULTILINE)
_USING = re.compile(r"^[ \t]*using[ \t]+(?:static[ \t]+)?([\w.]+);", re.MULTILINE)
_NAMESPACE = re.compile(r"^[ \t]*namespace[ \t]+([\w.]+)", re.MULTILINE)

_SLASHES = frozenset(
    (
        *(*_C, *_JAVA, *_SHARP, ".cu", ".cuh", ".js", ".ts", ".jsx", ".tsx", ".go", ".rs"),
        *(".swift", ".kt", ".scala", ".php", ".proto", ".dart"),
    )
)
_DASHES = frozenset((".sql", ".lua", ".hs", ".elm"))
_TAGS = frozenset((".html", ".xml", ".svg", ".md", ".vue"))


def suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower()


def imports(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns for each file of a repository which others it imports.

    Args:
      files: texts by path below the repository.
    """
    places = _Places(files)
    found = {path: set(_imported(path, text, places)) - {path} for path, text in files.items()}
    return {path: others & files.keys() for path, others in found.items()}


def by_imports(files: Mapping[str, str], seed: int) -> list[str]:
    """Returns the paths with imported files first: always the one with the fewest imports that have
    no place yet, so that circles resolve; of equals a random one.
    """
    needs = imports(files)
    needed_by: dict[str, list[str]] = {path: [] for path in files}
    for path, others in needs.items():
        for other in others:
            needed_by[other].append(path)
    missing = {path: len(others) for path, others in needs.items()}
    queue = [(count, position(path, seed), path) for path, count in missing.items()]
    heapq.heapify(queue)
    order: list[str] = []
    placed: set[str] = set()
    while queue:
        count, _, path = heapq.heappop(queue)
        if path in placed or count != missing[path]:
            continue  # an entry that a later one replaces
        order.append(path)
        placed.add(path)
        for other in needed_by[path]:
            missing[other] -= 1
            heapq.heappush(queue, (missing[other], position(other, seed), other))
    return order


def at_random(files: Iterable[str], seed: int) -> list[str]:
    """Returns the paths in an order that depends on themselves and the seed alone."""
    return sorted(files, key=lambda path: (position(path, seed), path))


def join(files: Mapping[str, str], order: Sequence[str]) -> str:
    """Joins files in an order, each below a comment with its path."""
    parts = []
    for path in order:
        text = files[path]
        parts.append(f"{comment(path)}\n{text}" + ("" if text.endswith("\n") else "\n"))
    return "\n".join(parts)


def comment(path: str) -> str:
    """Returns a path as a comment in the language of its file."""
    kind = suffix(path)
    if kind in _SLASHES:
        return f"// {path}"
    if kind in _DASHES:
        return f"-- {path}"
    return f"<!-- {path} -->" if kind in _TAGS else f"# {path}"


class _Places:
    """Finds files by the end of their path, as imports name them."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self._ending: dict[str, list[str]] = {}
        self.namespaces: dict[str, list[str]] = {}
        for path, text in sorted(files.items()):
            parts = path.split("/")
            for start in range(len(parts)):
                self._ending.setdefault("/".join(parts[start:]), []).append(path)
            if suffix(path) in _SHARP:
                for name in _NAMESPACE.findall(text):
                    self.namespaces.setdefault(name, []).append(path)

    def nearest(self, ending: str, path: str) -> list[str]:
        """Returns the file with this ending that shares most of its path with `path`, or none."""
        found = self._ending.get(posixpath.normpath(ending), [])
        return sorted(found, key=lambda other: -len(posixpath.commonprefix([other, path])))[:1]


def _imported(path: str, text: str, places: _Places) -> Iterator[str]:
    kind = suffix(path)
    if kind in _PYTHON:
        for name in _python_modules(path, text):
            for ending in (f"{name}.py", f"{name}/__init__.py", f"{name}.pyi"):
                yield from places.nearest(ending, path)
    elif kind in _C:
        for name in _INCLUDE.findall(text):
            yield from places.nearest(name, path)
    elif kind in _JAVA:
        for name in _JAVA_IMPORT.findall(text):
            yield from places.nearest(name.replace(".", "/") + ".java", path)
    elif kind in _SHARP:
        for name in _USING.findall(text):
            yield from places.namespaces.get(name, [])


def _python_modules(path: str, text: str) -> Iterator[str]:
    """Yields what a file imports, as paths without suffix."""
    for names in _IMPORT.findall(text):
        for name in names.split(","):
            yield name.split(" as ")[0].strip().replace(".", "/")
    folder = posixpath.dirname(path).split("/") if posixpath.dirname(path) else []
    for dots, module, inside, plain in _FROM.findall(text):
        start = folder[: len(folder) - len(dots) + 1] if dots else []
        parts = [*start, *(part for part in module.split(".") if part)]
        if parts:
            yield "/".join(parts)
        for name in (inside or plain).split(","):
            if word := name.split(" as ")[0].strip():
                yield "/".join([*parts, word])
