"""Finds files by glob or below a folder, each folder once, however links go in circles.

Python's own `**` follows every link: one that leads to a folder above it gives each file forty
times, and two of them never end. Here a folder is entered once, under its own name if it is below
the place where the search begins, and a link to a folder that holds that place not at all.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator


def matching(pattern: str) -> list[str]:
    """Returns the paths that match a glob; `**` as a part of it is any depth of folders, of which
    names that begin with a dot are left out.
    """
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return glob.glob(pattern)
    place = parts.index("**")
    top = os.sep.join(parts[:place]) or (os.sep if pattern.startswith(os.sep) else os.curdir)
    rest = [part for part in parts[place + 1 :] if part] or ["*"]
    found: list[str] = []
    for folder in sorted(glob.glob(top)):
        for inner, _ in walk(folder):
            found += matching(os.path.join(glob.escape(inner), *rest))
    return found


def walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yields every folder from `top` down, with the names of what is not a folder in it. Folders
    whose names begin with a dot are left out.

    Raises:
      ValueError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read {error.filename}: {error.strerror or error}") from error

    root, seen, starts = os.path.realpath(top), set[str](), [top]
    for start in starts:  # which grows by the links that are found
        for folder, inner, names in os.walk(start, onerror=refuse):
            real = os.path.realpath(folder)
            if real in seen:
                inner.clear()
                continue
            seen.add(real)
            inner[:] = [name for name in sorted(inner) if not name.startswith(".")]
            links = (os.path.join(folder, name) for name in inner)
            starts += [link for link in links if os.path.islink(link) and not _around(link, root)]
            yield folder, names


def _around(link: str, root: str) -> bool:
    """Tells whether a link leads to a folder that holds `root`."""
    real = os.path.realpath(link)
    return os.path.commonpath([real, root]) == real
