"""Reads documents: text, JSON lines or parquet files by glob, or Python's standard library.

The name of a file decides its format, after removing a compression suffix (`.gz`, `.zst`):
  .jsonl .ndjson .json   JSON lines: one object per line, its text under `text_field`
  .parquet               the text in the column `text_field`
  anything else          UTF-8 text, one document per file

Files are read in the order of their paths, as streams: at most one document (or 1024 rows of
parquet) is in memory. Empty documents are left out. Any other problem stops the run and names the
file, the line and the remedy: with a part of the corpus silently missing, training would go on and
the loss would not show it.

The embedded default is the `.py` files of the running interpreter's standard library, about 11 MB.
Installed packages and tests are left out, and so is `encodings`, whose files are generated tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal, NamedTuple, cast

_EMBEDDED_SKIP = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
}
_COMPRESSIONS = {".gz", ".zst"}
_LINES = {".jsonl", ".ndjson", ".json"}
_PARQUET_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Source:
    """One file to read."""

    path: str
    name: str  # its path below the deepest folder of the glob without a wildcard
    kind: Literal["text", "lines", "parquet", "python"]
    size: int  # bytes on disk
    mtime_ns: int


class Document(NamedTuple):
    """One text; `number` is its place in the source, empty documents counted."""

    source: Source
    number: int
    text: str

    @property
    def name(self) -> str:
        if self.source.kind in ("text", "python"):
            return self.source.name
        return f"{self.source.name}:{self.number + 1}"

    @property
    def position(self) -> int:
        """A 64-bit hash of name and number, which decides the split."""
        key = f"{self.source.name}\0{self.number}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def find_sources(files: str | Sequence[str], *, key: str = "data.files") -> list[Source]:
    """Finds the files that match globs, each once and sorted by path.

    Args:
      files: globs in a sequence or separated by commas. `~` is the home folder, `**` any depth of
        folders. The name of an existing file matches it, even if it contains glob characters.
      key: the setting that messages name.

    Raises:
      ValueError: a glob matches no file, or a file is inaccessible.
    """
    sources: dict[str, Source] = {}
    patterns = files.split(",") if isinstance(files, str) else files
    for pattern in (part.strip() for part in patterns):
        if not pattern:
            continue
        expanded = os.path.expanduser(pattern)
        found = [expanded] if os.path.isfile(expanded) else glob.glob(expanded, recursive=True)
        matched = [path for path in found if os.path.isfile(path)]
        if not matched:
            hint = "check the path"
            if os.path.isdir(expanded):
                hint = "it is a folder: append '/*.txt' or the like, '/**/*' for all below it"
            raise ValueError(f"{key}={pattern!r} matches no file (from {os.getcwd()}); {hint}")
        root = _constant_folder(expanded)
        for path in matched:
            path = os.path.abspath(path)
            if path not in sources:
                sources[path] = _source(path, os.path.relpath(path, root), _kind(path))
    if not sources:
        raise ValueError(f"{key}={files!r} names no file; give a glob, or leave it empty")
    return [sources[path] for path in sorted(sources)]


def embedded_sources() -> list[Source]:
    """Finds the standard library's `.py` files (see above), sorted by name.

    Raises:
      ValueError: there are none, as in a frozen or zipped distribution.
    """
    root = sysconfig.get_path("stdlib")
    sources = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _EMBEDDED_SKIP]
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path):
                sources.append(_source(path, os.path.relpath(path, root), "python"))
    if not sources:
        raise ValueError(
            f"this Python has no .py files in {root} to train on; set data.files to some text"
        )
    return sorted(sources, key=lambda source: source.name)


def read_documents(sources: Sequence[Source], *, text_field: str = "text") -> Iterator[Document]:
    """Yields the documents of `sources` in order.

    Raises:
      ValueError: a file cannot be read, is not UTF-8, is cut short, or lacks `text_field`; says
        which.
    """
    for source in sources:
        try:
            for number, text in _READERS[source.kind](source, text_field):
                if text:
                    yield Document(source, number, text)
        except OSError as error:
            raise ValueError(f"cannot read {source.path}: {error.strerror or error}") from error


def read_records(sources: Sequence[Source]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of JSON lines and the rows of parquet files, whatever their fields, each
    with its place, "FILE:LINE" from 1.

    Raises:
      ValueError: a file cannot be read or is of another kind; says which.
    """
    for source in sources:
        if source.kind not in ("lines", "parquet"):
            raise ValueError(
                f"{source.path} is neither JSON lines (.jsonl, .ndjson, .json, also .gz and .zst) "
                "nor .parquet; convert it, or correct its name"
            )
        try:
            for index, record in _objects(source) if source.kind == "lines" else _rows(source):
                yield f"{source.path}:{index + 1}", record
        except OSError as error:
            raise ValueError(f"cannot read {source.path}: {error.strerror or error}") from error


def read_bytes(source: Source) -> bytes:
    """Returns the bytes of a file, compressed if it is.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with open(source.path, "rb") as stream:
            return stream.read()
    except OSError as error:
        raise ValueError(f"cannot read {source.path}: {error.strerror or error}") from error


def check_unchanged(sources: Sequence[Source]) -> None:
    """Raises ValueError if a file has changed since it was found."""
    for source in sources:
        if _source(source.path, source.name, source.kind) != source:
            raise ValueError(
                f"{source.path} changed while it was read; run again when nothing writes to it"
            )


def _source(path: str, name: str, kind: Literal["text", "lines", "parquet", "python"]) -> Source:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    return Source(path, name.replace(os.sep, "/"), kind, status.st_size, status.st_mtime_ns)


def _constant_folder(pattern: str) -> str:
    """Returns the deepest folder of a glob without a wildcard."""
    if os.path.isfile(pattern):
        return os.path.dirname(os.path.abspath(pattern))
    parts = []
    for part in os.path.abspath(pattern).split(os.sep)[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return os.sep.join(parts) or os.sep


def _kind(path: str) -> Literal["text", "lines", "parquet"]:
    stem, suffix = os.path.splitext(path.lower())
    if suffix in _COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    if suffix in _LINES:
        return "lines"
    return "parquet" if suffix == ".parquet" else "text"


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames and, unlike zstandard's own reader, notices a file cut short."""

    def __init__(self, path: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"reading {path} needs zstandard: pip install zstandard") from error
        self._path = path
        self._file = open(path, "rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._failure = zstandard.ZstdError
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(1 << 17)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last frame is not complete")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> None:
        self._frame = self._frame or self._new_frame()
        try:
            self._ready = memoryview(self._frame.decompress(self._compressed))
        except self._failure as error:
            raise EOFError(str(error)) from error
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _decompressed(source: Source) -> Iterator[BinaryIO]:
    suffix = os.path.splitext(source.path.lower())[1]
    stream: Any
    if suffix == ".gz":
        stream = gzip.open(source.path, "rb")
    elif suffix == ".zst":
        stream = io.BufferedReader(_ZstdReader(source.path), 1 << 20)
    else:
        stream = open(source.path, "rb")
    with stream:
        try:
            yield cast(BinaryIO, stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{source.path} is damaged or cut short ({error}); copy it again, or rename it if "
                f"it is not {suffix}"
            ) from error


def _decode(data: bytes, source: Source, offset: int, line: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f" (line {line})" if line else ""
        value = data[error.start]
        raise ValueError(
            f"{source.path} is not UTF-8: byte {offset + error.start}{place} is 0x{value:02x}; "
            "convert it (iconv -t UTF-8), or leave it out of data.files"
        ) from error


def _read_text(source: Source, text_field: str) -> Iterator[tuple[int, str]]:
    del text_field
    with _decompressed(source) as stream:
        yield 0, _decode(stream.read(), source, 0)


def _read_python(source: Source, text_field: str) -> Iterator[tuple[int, str]]:
    """Reads Python source in its declared encoding; a file that is not in it is left out."""
    del text_field
    data = read_bytes(source)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        yield 0, data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return


def _read_lines(source: Source, text_field: str) -> Iterator[tuple[int, str]]:
    for index, record in _objects(source, f" with {text_field!r}"):
        yield index, _field(record, text_field, f"{source.path} line {index + 1}")


def _objects(source: Source, wanted: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of JSON lines, each with the number of its line from 0."""
    offset = 0
    with _decompressed(source) as stream:
        for index, data in enumerate(stream):
            place = f"{source.path} line {index + 1}"
            line = _decode(data, source, offset, index + 1)
            offset += len(data)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{place} is not JSON ({error}); such a file holds one complete object per line"
                ) from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{place} is a JSON {type(record).__name__}, not an object{wanted}; such a "
                    "file holds one complete object per line"
                )
            yield index, record


def _field(record: dict[str, object], text_field: str, place: str) -> str:
    if text_field not in record:
        names = ", ".join(sorted(record)[:20]) or "none"
        raise ValueError(f"{place} has no field {text_field!r} but {names}; set data.text_field")
    return _checked_text(record[text_field], text_field, place)


def _checked_text(text: object, text_field: str, place: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: {text_field!r} is {type(text).__name__}, not text; remove it or set "
            "data.text_field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {text_field!r} holds half of a surrogate pair at character {error.start}; "
            "repair or remove it"
        ) from error
    return text


def _read_parquet(source: Source, text_field: str) -> Iterator[tuple[int, str]]:
    for index, row in _rows(source, text_field):
        yield index, _checked_text(row[text_field], text_field, f"{source.path} row {index + 1}")


def _rows(source: Source, text_field: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a parquet file, with one column or all, each with its number from 0."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(f"reading {source.path} needs pyarrow: pip install pyarrow") from error
    try:
        with pq.ParquetFile(source.path) as table:
            if text_field is not None and text_field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names[:20])
                raise ValueError(
                    f"{source.path} has no column {text_field!r} but {names}; set data.text_field"
                )
            columns = None if text_field is None else [text_field]
            index = 0
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield index, row
                    index += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"{source.path} is not a readable parquet file ({error}); copy it again, or rename it"
        ) from error


_READERS = {
    "text": _read_text,
    "python": _read_python,
    "lines": _read_lines,
    "parquet": _read_parquet,
}
