"""JSON files of a checkpoint, read strictly: what loaders disagree about is refused.

Python's own reader takes the last of two equal keys, reads NaN and Infinity, makes an infinity of
1e999, and runs out of stack on a file of brackets. A config or an index that does any of these is
damaged, or made to be read differently by two programs.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20  # the index of V3's 91,991 tensors has 9 MB
MAX_DEPTH = 64


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      ValueError: the file is missing, not a regular file or too large, is not strict JSON, or holds
        something else than an object; names the file.
    """
    values = parse(read_regular(path, MAX_BYTES), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an object so that a crash leaves the old file or the new one, and no half."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def parse(data: bytes, place: str) -> Any:
    """Reads JSON text; `place` begins each message.

    Raises:
      ValueError: it is not UTF-8, not JSON, nested deeper than MAX_DEPTH, has a key twice in one
        object, or a number that is not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in values if keys.count(key) > 1)
            raise ValueError(f"{place} has the key {shown(twice)} twice in one object")
        return values

    def finite(text: str) -> float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(f"{place} has the number {text[:40]}, which is not finite")
        return number

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    try:
        values = json.loads(
            text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place} is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError(f"{place} nests deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        # Python refuses to convert integers of thousands of digits.
        message = str(error)
        if not message.startswith(place):
            message = f"{place} has a number that cannot be read: {message[:80]}"
        raise ValueError(message) from None
    _check_depth(values, place)
    return values


def _check_depth(values: Any, place: str) -> None:
    """Keeps what is passed on shallow, so that printing it cannot run out of stack either."""
    level = [values]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"{place} nests deeper than {MAX_DEPTH} levels")


def open_regular(path: Path) -> int:
    """Opens a regular file for reading and returns its descriptor.

    A FIFO would wait for a writer and a device may never end, so neither is opened. A link is
    followed: the Hugging Face cache keeps the files of a checkpoint as links into its `blobs`, and
    what is at the end must be a regular file that parses strictly before a byte of it is used.

    Raises:
      ValueError: there is no such file, it is not a regular one, or it may not be read.
    """
    try:
        descriptor = -1
        if stat.S_ISREG(os.stat(path).st_mode):
            # Not blocking, in case a FIFO has taken its place since.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return descriptor
            os.close(descriptor)
    except FileNotFoundError:
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise ValueError(f"{path} {what}; download it again") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(f"{path} cannot be read: {reason}") from error
    raise ValueError(f"{path} is not a regular file")


def read_regular(path: Path, max_bytes: int) -> bytes:
    """Returns the contents of a regular file of at most `max_bytes`.

    Raises:
      ValueError: it cannot be opened (see open_regular) or is larger.
    """
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise ValueError(f"{path} has {size:,} bytes, more than the {max_bytes:,} allowed")
        return file.read(max_bytes)


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` survive a power cut, as fsync does a file's bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def shown(text: str) -> str:
    """A name that came from a file, made safe and short for a message."""
    return ascii(text if len(text) <= 100 else f"{text[:100]}...")
