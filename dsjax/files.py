"""Files: read strictly, replaced atomically, and kept through a power cut.

Reading. Python's own JSON reader takes the last of two equal keys, reads NaN and Infinity, turns
1e999 into an infinity, and runs out of stack on a file of brackets. A config or an index that does
any of these is damaged, or made to be read differently by two programs, so `read_json` refuses it.

Writing. Every file that a reader may find half-written goes through `replacing`: the bytes are
written to `NAME.partial` and synced, then the file takes its name, then the folder is synced. After
a crash at any point there is either the old file or the new one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 64 * 2**20  # the index of V3's 91,991 tensors has 9 MB
MAX_DEPTH = 64
MAX_LISTED = 20  # kinds of problems in a message
EXAMPLES = 3  # of each kind
LONG = 100  # characters of a problem

# What sets a problem apart from others of its kind: quoted text, dotted names, lists, numbers.
_SPECIFIC = re.compile(r"'[^']*'|[^\s\[\]();,:]*\w\.[^\s\[\]();,:]*\w|\[[^]]*\]|\d[\d,]*")
_PLACE = re.compile(rf"(?:{_SPECIFIC.pattern})(?::\d+)?")  # the first of these, with its line

_PICKLE = (
    "a pickle, Python's own format, which runs code of the file's author when it is read, so dsjax "
    "never does; download the safetensors file"
)
_PAGE = (
    "a web page, such as a server's message in place of the file; download it again, logged in if "
    "the repository asks for it (hf auth login)"
)
_SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; run `git lfs pull` "
    "in its folder",
    b"PK\x03\x04": "a zip archive, as torch.save writes them around a pickle, which runs code of "
    "the file's author when it is read, so dsjax never does; download the safetensors file",
    b"GGUF": "a GGUF file, llama.cpp's format; download the safetensors files of the original",
    b"\x1f\x8b": "compressed by gzip; decompress it, or download it again",
    b'{"error"': "a server's message in place of the file; download it again",
    b"Entry not found": "a server's message in place of the file; download it again",
    b"Access to model": "a server's message in place of the file; ask for access, log in (hf auth "
    "login) and download it again",
    b"Invalid username or password": "a server's message in place of the file; log in (hf auth "
    "login) and download it again",
}


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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Context that yields an open binary file, which becomes `path` when the block succeeds.

    If the block raises, what it wrote is removed and the old `path`, if any, stays. A `path` that
    is a device or a pipe, such as /dev/stdout, is written directly.

    Raises:
      OSError: the file cannot be written; its `filename` is set.
    """
    if path.exists() and not path.is_file():
        with writing(path), path.open("wb") as file:
            yield file
        return
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Raises ValueError if a file cannot be written: better before hours of work than after."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file to write")
    if path.exists() and not path.is_file():
        return  # a device or a pipe
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"{path} cannot be written: {path.parent} is read-only; choose another folder"
        )


def write(path: Path, content: bytes | str) -> None:
    """Replaces `path` by a file with this content (text as UTF-8), see `replacing`."""
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replaces `path` by a file that holds one JSON object, see `replacing`.

    Raises:
      ValueError: a number is not finite, which JSON cannot hold; see `finite`.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is not UTF-8 holds lone surrogates; JSON spells them as Python does, \udc80.
    write(path, text.encode("utf-8", "backslashreplace"))


def finite(values: Any) -> Any:
    """Returns JSON values with null for each number that is not finite, however deep it lies:
    Python would write NaN and Infinity, which are no JSON.
    """
    if isinstance(values, Mapping):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def publish(folder: Path, target: Path) -> None:
    """Renames a finished folder to `target`, so that the whole tree survives a power cut.

    The files in it must have been synced; the folders are synced here.
    """
    for inner, _, _ in os.walk(folder):
        sync_folder(Path(inner))
    folder.rename(target)
    sync_folder(target.parent)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Adds `path` to an OSError of the block that names no file.

    The system names the file when opening fails, but not when a write does (a full disk).
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


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

    what = disguise(data)
    if what and not data.lstrip().startswith(b"{"):
        raise ValueError(f"{place} is {what}")
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
        if path.is_symlink():
            raise ValueError(f"{path} is a link to nothing; download it again") from None
        raise ValueError(f"{path} does not exist; check its name, or download it again") from None
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


def cache_folder(chosen: str) -> Path:
    """Returns the folder for what can be made again: `chosen` or, if empty, the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or f"{home}/dsjax").expanduser().absolute()


def sync_folder(folder: Path) -> None:
    """Syncs the names in `folder` to the disk, as fsync does the bytes of a file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def shown(text: str) -> str:
    """A name that came from a file, made safe and short for a message."""
    return ascii(text if len(text) <= 100 else f"{text[:100]}...")


def listed(problems: Iterable[str]) -> str:
    """Joins problems into one line, however many there are: three examples of each kind and how
    many more there are.

    Problems are of one kind if they differ only in names with a dot or in quotes, in numbers and in
    lists, such as `missing model.norm.weight [64]`.
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_SPECIFIC.sub("*", problem), []).append(problem)
    parts = [_examples(found) for found in itertools.islice(kinds.values(), MAX_LISTED)]
    left = len(kinds) - MAX_LISTED
    return "; ".join(parts) + (f"; and problems of {left:,} more kinds" if left > 0 else "")


def _examples(found: list[str]) -> str:
    """Joins problems of one kind; long ones are told once, then only where else they are."""
    first, *others = found[:EXAMPLES]
    if len(first) > LONG:
        others = [f"the same of {_PLACE.search(other)[0]}" for other in others]  # pyright: ignore
    more = len(found) - EXAMPLES
    end = f"; and {more:,} more such ({len(found):,} in all)" if more > 0 else ""
    return "; ".join([first, *others]) + end


def disguise(data: bytes) -> str | None:
    """Says what a file is that is not what its name says, and the remedy, judging by its first
    bytes; None if it could be anything.
    """
    start = data[:512].lstrip()
    for signature, what in _SIGNATURES.items():
        if start.startswith(signature):
            return what
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _PICKLE
    if start[:9].lower() == b"<!doctype" or start[:5].lower() in (b"<html", b"<?xml"):
        return None if b"<svg" in start.lower() else _PAGE
    return None
