"""The manifest of a checkpoint: what it should contain, written last and checked before use.

    <folder>/manifest.json
        {"sha256": "<of the rest of this file>",
        "format": 1,
        "record": {...},     everything known besides arrays: step, data position, versions, ...
        "leaves": {...},     shape, dtype and, for a run's state, fingerprint of each array
        "files": {...}}      size and SHA-256 of each file

Neither Orbax nor safetensors notices a flipped bit in an array. Here every byte is covered: each
file by its SHA-256, the manifest by the one in its first line. A manifest proves that a checkpoint
is as it was written. It is not a signature, so it does not prove who wrote it.

Files are hashed in threads, one file per thread, in pieces. With several processes each process
hashes a share of the files, so that every byte is hashed once.
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
from dsjax.files import write as write_file

NAME = "manifest.json"
FORMAT = 1
MAX_BYTES = 256 << 20  # V3 has 92,000 files, in 13 MB

_FIRST_LINE = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')
_REMEDY = "copy or convert the checkpoint again, or take another one"
_PIECE = 4 << 20  # bytes read at a time while hashing
_THREADS = max(4, os.cpu_count() or 1)


class Damage(ValueError):
    """Raised if a checkpoint is not as it was written; the message names the file."""


class File(NamedTuple):
    """The expected size and hash of a file."""

    size: int
    sha256: str


class Manifest(NamedTuple):
    """The expected contents of a checkpoint; the fields are those of manifest.json."""

    record: dict[str, Any]
    leaves: dict[str, dict[str, Any]]
    files: dict[str, File]  # by path relative to the folder


def write(folder: Path, manifest: Manifest) -> None:
    """Writes and syncs the manifest; every file that it lists must be on the disk already.

    Raises:
      OSError: it cannot be written.
    """
    files = {name: file._asdict() for name, file in sorted(manifest.files.items())}
    rest = (
        f'"format": {FORMAT},\n"record": {_json(manifest.record)},\n'
        f'"leaves": {_lines(manifest.leaves)},\n"files": {_lines(files)}}}\n'
    ).encode()
    # Folders first: once the manifest exists, all that it lists must survive a power cut.
    for inner, _, _ in os.walk(folder):
        sync_folder(Path(inner))
    first = b'{"sha256": "%s",\n' % hashlib.sha256(rest).hexdigest().encode()
    write_file(folder / NAME, first + rest)


def _lines(entries: Mapping[str, Any]) -> str:
    """Formats a JSON object with one line per entry."""
    lines = (f"{_json(key)}: {_json(value)}" for key, value in entries.items())
    return "{\n" + ",\n".join(lines) + "}"


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def read(folder: Path) -> Manifest:
    """Reads the manifest of a checkpoint and checks it.

    Raises:
      Damage: it is missing, or not as it was written.
    """
    path = folder / NAME
    if not path.is_file():
        raise Damage(
            f"{path} is missing. It is written last, so {folder} is incomplete, or of an early "
            f"version of dsjax; {_REMEDY}"
        )
    try:
        data = read_regular(path, MAX_BYTES)
        first = _FIRST_LINE.match(data)
        if not first or hashlib.sha256(data[first.end() :]).hexdigest().encode() != first.group(1):
            raise Damage(
                f"{path} is damaged: its SHA-256 is not the one in its first line; {_REMEDY}"
            )
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
    """Lists the files below a folder, except the manifest, sorted by path."""
    return sorted(
        str((Path(inner) / name).relative_to(folder))
        for inner, _, names in os.walk(folder)
        for name in names
        if name not in (NAME, f"{NAME}.partial")
    )


def hash_files(folder: Path, names: Iterable[str]) -> dict[str, File]:
    """Hashes files and syncs them.

    Raises:
      ValueError: a file cannot be read.
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
    """Lists what is wrong with the files of a checkpoint; each message starts with a file's path.

    Files that the manifest does not list are ignored, because nothing reads them.

    Args:
      contents: also compare hashes; False compares sizes only.
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
            return f"{path} has {size:,} bytes, but was written with {wanted.size:,}"
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
      Damage: files are not as they were written.
    """
    manifest = read(folder)
    _raise(problems(folder, manifest))
    return manifest


class Guard:
    """Checks each file of a checkpoint once, when it is first read; thread-safe."""

    def __init__(self, folder: Path, *, later: Callable[[str], bool]):
        """Checks the manifest, the sizes of all files, and the bytes of those not left for later.

        Args:
          later: tells by its path whether a file will be passed to `check` before it is read.

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
        """Hashes a file, unless it has been checked before.

        Raises:
          Damage: it is not as it was written.
        """
        name = str(path.relative_to(self._folder))
        # One lock per file, so that threads hash different files at the same time.
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
