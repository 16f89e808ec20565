"""The manifest of a checkpoint: what it should hold, written last and checked before use.

    <folder>/manifest.json
        {"sha256": "<of the rest of this file>",
        "format": 1,
        "record": {...},     what is known besides arrays: step, place in the data, versions, ...
        "leaves": {...},     shape, dtype and, of a run's state, fingerprint of each array
        "files": {...}}      size and SHA-256 of each file

Neither Orbax nor safetensors notices a flipped bit in an array. Here every byte counts: each file
has its SHA-256, the manifest has its own in its first line. A manifest proves that a checkpoint is
as it was written; it is no signature, so it proves nothing about who wrote it.

Hashing streams and runs in threads, each file in one. Several processes share the files out
between them, so that each byte is hashed once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dsjax.files import listed, open_regular, parse, read_regular, shown, sync_folder

NAME = "manifest.json"
FORMAT = 1
MAX_BYTES = 256 << 20  # V3 has 92,000 files, in 13 MB

_FIRST_LINE = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')
_REMEDY = "copy or convert the checkpoint again, or take another one"
_PIECE = 4 << 20  # bytes hashed at a time
_THREADS = max(4, os.cpu_count() or 1)


class Damage(ValueError):
    """A checkpoint is not as it was written; the message names the file."""


class File(NamedTuple):
    """What a file should be."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """What a checkpoint should hold; the fields are those of the file."""

    record: dict[str, Any]
    leaves: dict[str, dict[str, Any]]
    files: dict[str, File]  # by path below the folder


def write(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest, when all that it speaks of is on the disk, and syncs it and the folders.

    Raises:
      OSError: it cannot be written.
    """
    files = {name: file._asdict() for name, file in sorted(manifest.files.items())}
    rest = (
        f'"format": {FORMAT},\n"record": {_json(manifest.record)},\n'
        f'"leaves": {_lines(manifest.leaves)},\n"files": {_lines(files)}}}\n'
    ).encode()
    partial = folder / f"{NAME}.partial"
    with partial.open("wb") as file:
        file.write(b'{"sha256": "%s",\n' % hashlib.sha256(rest).hexdigest().encode() + rest)
        file.flush()
        os.fsync(file.fileno())
    for inner, _, _ in os.walk(folder):
        sync_folder(Path(inner))
    partial.replace(folder / NAME)
    sync_folder(folder)


def _lines(entries: Mapping[str, Any]) -> str:
    """An object with a line for each of its entries."""
    lines = (f"{_json(key)}: {_json(value)}" for key, value in entries.items())
    return "{\n" + ",\n".join(lines) + "}"


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def read(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint, and checks it.

    Raises:
      Damage: there is none, or it is not as it was written.
    """
    path = folder / NAME
    if not path.is_file():
        raise Damage(
            f"{path} is missing: it is written last, so {folder} is not whole, or of an early "
            f"version of dsjax; {_REMEDY}"
        )
    try:
        data = read_regular(path, MAX_BYTES)
        first = _FIRST_LINE.match(data)
        if not first or hashlib.sha256(data[first.end() :]).hexdigest().encode() != first.group(1):
            raise Damage(f"{path} is damaged: its SHA-256 is not what it names; {_REMEDY}")
        values = parse(data, str(path))
        if values["format"] != FORMAT:
            raise Damage(
                f"{path} is of format {values['format']}, and this version of dsjax reads {FORMAT}"
            )
        files = {name: File(**entry) for name, entry in values["files"].items()}
        outside = [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside or not isinstance(values["record"], dict):
            raise ValueError(f"it names {shown(outside[0])}" if outside else "its record is none")
        return Manifest(values["record"], values["leaves"], files)
    except Damage:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Damage(f"{path} is damaged: {error}") from error


def listing(folder: Path) -> list[str]:
    """The files below a folder, the manifest apart, sorted."""
    return sorted(
        str((Path(inner) / name).relative_to(folder))
        for inner, _, names in os.walk(folder)
        for name in names
        if name not in (NAME, f"{NAME}.partial")
    )


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, File]:
    """Hashes files as they are on the disk, and syncs them.

    Raises:
      ValueError: one of them cannot be read.
    """
    names = list(names)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as pool:
        found = pool.map(lambda name: _hash(folder / name, sync=True), names)
        return dict(zip(names, found, strict=True))


def _hash(path: Path, *, sync: bool = False) -> File:
    digest, size = hashlib.sha256(), 0
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        if sync:
            os.fsync(file.fileno())
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return File(size, digest.hexdigest())


def problems(folder: Path, manifest: Manifest, *, contents: bool = True) -> list[str]:
    """What is wrong with the files of a checkpoint, each message beginning with a file's path.

    Files that the manifest does not name are nobody's business: nothing reads them.

    Args:
      contents: hash them too; False looks at sizes alone.
    """
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="verify") as pool:
        found = pool.map(
            lambda name: _problem(folder / name, manifest.files[name], contents), manifest.files
        )
        return [problem for problem in found if problem]


def _problem(path: Path, wanted: File, contents: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted.size:
            return f"{path} has {size:,} bytes, and was written with {wanted.size:,}"
        if contents and _hash(path) != wanted:
            return f"{path} is damaged: its bytes are not those that were written"
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError) as error:
        return f"{path} cannot be read: {error}"
    return None


def verify(folder: Path) -> Manifest:
    """Reads the manifest and checks every byte of a checkpoint against it.

    Raises:
      Damage: something is not as it was written; names each file.
    """
    manifest = read(folder)
    _raise(problems(folder, manifest))
    return manifest


class Guard:
    """Checks the files of a checkpoint as they come to be read, each once; from any thread."""

    def __init__(self, folder: Path, *, later: Callable[[str], bool]):
        """Checks the manifest, the sizes of all files, and the bytes of those that are read first.

        Args:
          later: whether a file, by its path, is one to `check` before it is read.

        Raises:
          Damage: something is not as it was written.
        """
        self._folder, self._manifest = folder, read(folder)
        self._locks: dict[str, threading.Lock] = {}
        self._seen: set[str] = set()
        self._lock = threading.Lock()
        files = self._manifest.files
        first = {name: file for name, file in files.items() if not later(name)}
        _raise(
            problems(folder, self._manifest, contents=False)
            or problems(folder, self._manifest._replace(files=first))
        )

    def check(self, path: Path) -> None:
        """Hashes a file, unless that has been done.

        Raises:
          Damage: it is not as it was written.
        """
        name = str(path.relative_to(self._folder))
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._seen:
                if name not in self._manifest.files:
                    raise Damage(f"{path} is not one of the files that were written")
                problem = _problem(path, self._manifest.files[name], contents=True)
                _raise([problem] if problem else [])
                self._seen.add(name)


def _raise(found: list[str]) -> None:
    if found:
        raise Damage(f"{listed(found)}; {_REMEDY}")
