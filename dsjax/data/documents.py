"""Reads documents: text, JSON lines or tables by glob or folder, or Python's standard library.

The name of a file decides its format, after removing a compression suffix (`.gz`, `.bz2`, `.xz`,
`.zst`):
  .jsonl .ndjson .json   JSON lines: one object per line, its text under `text_field`
  .csv .tsv              rows below a header that names the columns
  .parquet .arrow        columns; Arrow as the library datasets saves it (these two have their own
                         compression)
  anything else          UTF-8 text, one document per file; a byte order mark is dropped

`text_field` names a field, a nested one with dots (`meta.text`), or several with commas
(`title,body`), whose texts are joined by an empty line.

Files are read in the order of their paths, as streams: at most one document (or 1024 rows of a
table) is in memory. Empty documents are left out. Any other problem stops the run and names the
file, the line and the remedy: with a part of the corpus silently missing, training would go on and
the loss would not show it. Who wants to go on gives a function that notes the problems.

The embedded default is the `.py` files of the running interpreter's standard library, about 11 MB.
Installed packages and tests are left out, and so is `encodings`, whose files are generated tables.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dsjax.data import decompression, folders, records
from dsjax.data.records import Reject

Kind = Literal["text", "lines", "csv", "table", "python"]

_EMBEDDED_SKIP = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "encodings",
}
_KINDS: dict[str, Kind] = {
    ".jsonl": "lines", ".ndjson": "lines", ".json": "lines", ".csv": "csv", ".tsv": "csv",
    ".parquet": "table", ".arrow": "table", ".feather": "table",
}  # fmt: skip
_COMMAS = 4  # in one name, at most
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_NOT_TEXT = (
    ".pdf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".epub", ".bin", ".pt", ".pkl", ".npy",
    ".npz", ".safetensors", ".h5", ".sqlite", ".db", ".png", ".jpg", ".jpeg", ".gif", ".mp3",
    ".mp4",
)  # fmt: skip
_OF_DATASETS = {"dataset_info.json", "state.json", "dataset_dict.json"}  # beside .arrow files


@dataclasses.dataclass(frozen=True)
class Source:
    """One file to read."""

    path: str
    name: str  # its path below the deepest folder of the glob without a wildcard
    kind: Kind
    size: int  # bytes on disk
    mtime_ns: int


Rejected = Callable[[Source, str], None]  # told what is wrong


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


def find_sources(
    files: str | Sequence[str], *, key: str = "data.files", outside: Path | None = None
) -> list[Source]:
    """Finds the files that match globs, each once and sorted by path.

    Args:
      files: globs and folders in a sequence or separated by commas. `~` is the home folder, `**`
        any depth of folders; a folder stands for all files below it whose names begin with no dot.
        Links are followed, but not in circles.
        The name of an existing file matches it, even if it contains glob characters or commas.
      key: the setting that messages name.
      outside: a folder whose files are passed over: where the result is written.

    Raises:
      ValueError: a glob matches no file, or a file is inaccessible, a pipe or of no kind that is
        read.
    """
    found: dict[str, Source] = {}
    for _, sources in find_parts(files, key=key, outside=outside):
        found = {source.path: source for source in sources} | found
    return [found[path] for path in sorted(found)]


def find_parts(
    files: str | Sequence[str], *, key: str = "data.files", outside: Path | None = None
) -> list[tuple[str, list[Source]]]:
    """Finds the files of each glob or folder, as `find_sources` does of all, in the order given."""
    given = patterns(files) if isinstance(files, str) else [part.strip() for part in files]
    parts = [(pattern, _matching(pattern, key, outside)) for pattern in given if pattern]
    if not parts:
        raise ValueError(f"{key}={files!r} names no file; give a glob")
    return parts


def patterns(files: str) -> list[str]:
    """Divides globs at commas, but not at those of a name that exists."""
    pieces, found = files.split(","), []
    while pieces:
        most = min(len(pieces), _COMMAS + 1)
        joined = (n for n in range(most, 1, -1) if files_of(",".join(pieces[:n]).strip()))
        count = next(joined, 1)
        found.append(",".join(pieces[:count]).strip())
        pieces = pieces[count:]
    return found


def _matching(pattern: str, key: str, outside: Path | None) -> list[Source]:
    expanded = os.path.expanduser(pattern)
    matched = sorted({os.path.abspath(path) for path in files_of(pattern)})
    if not matched:
        if os.path.exists(expanded) and not os.path.isdir(expanded):
            raise ValueError(
                f"{key}={pattern!r} is a pipe or a device, which cannot be read twice; save what "
                "it gives to a file, and name that"
            )
        hint = "the folder is empty" if os.path.isdir(expanded) else "check the path"
        raise ValueError(f"{key}={pattern!r} matches no file (from {os.getcwd()}); {hint}")
    if outside is not None:
        own = outside.resolve()
        matched = [path for path in matched if not Path(path).resolve().is_relative_to(own)]
        if not matched:
            raise ValueError(
                f"{key}={pattern!r} matches only files in {outside}, where the result is written, "
                "and that is not its own input; choose another folder for one of them"
            )
    is_folder = os.path.isdir(expanded)
    root = os.path.abspath(expanded) if is_folder else _constant_folder(expanded)
    return [_source(path, os.path.relpath(path, root), _kind(path)) for path in matched]


def files_of(pattern: str) -> list[str]:
    """Returns the files of a glob or of a folder."""
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        return list(_below(expanded))
    found = [expanded] if os.path.isfile(expanded) else folders.matching(expanded)
    return [path for path in found if os.path.isfile(path)]


def _below(folder: str) -> Iterator[str]:
    """Yields the files below a folder, hidden ones and what `datasets` notes of itself apart."""
    for inner, names in folders.walk(folder):
        if os.path.basename(inner) == "__pycache__":
            continue
        of_datasets = _OF_DATASETS & set(names)
        for name in names:
            if not name.startswith(".") and name not in of_datasets:
                yield os.path.join(inner, name)


def embedded_sources() -> list[Source]:
    """Finds the standard library's `.py` files (see above), sorted by name.

    Raises:
      ValueError: there are none, as in a frozen or zipped distribution.
    """
    root = sysconfig.get_path("stdlib")
    sources = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _EMBEDDED_SKIP]
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path):
                sources.append(_source(path, os.path.relpath(path, root), "python"))
    if not sources:
        raise ValueError(
            f"this Python has no .py files in {root} to train on; set data.files to some text"
        )
    return sorted(sources, key=lambda source: source.name)


def read_documents(
    sources: Sequence[Source], *, text_field: str = "text", rejected: Rejected | None = None
) -> Iterator[Document]:
    """Yields the documents of `sources` in order.

    Args:
      rejected: called with a source and what is wrong with one of its records, or with all that
        was not read of it; None: the first problem raises.

    Raises:
      ValueError: a file cannot be read, is not UTF-8, is cut short, or lacks `text_field`; says
        which.
    """
    for source in sources:

        def reject(problem: str, source: Source = source) -> None:
            if rejected is None:
                raise ValueError(problem)
            rejected(source, problem)

        try:
            for number, text in _READERS[source.kind](source, text_field, reject):
                if text:
                    yield Document(source, number, text)
        except OSError as error:
            reject(f"cannot read {source.path}: {error.strerror or error}")
        except ValueError as error:
            if rejected is None:
                raise
            rejected(source, str(error))


def read_records(sources: Sequence[Source]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the objects of JSON lines and the rows of tables, whatever their fields, each with its
    place, "FILE:LINE" from 1.

    Raises:
      ValueError: a file cannot be read or is of another kind; says which.
    """
    readers = {"lines": records.json_lines, "csv": records.csv_rows, "table": records.table_rows}
    for source in sources:
        if source.kind not in readers:
            raise ValueError(
                f"{source.path} is neither JSON lines (.jsonl, .ndjson, .json, also .gz, .bz2, .xz "
                "and .zst) nor .csv nor .arrow nor .parquet; convert it, or correct its name"
            )
        try:
            for index, record in readers[source.kind](source.path):
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


def _source(path: str, name: str, kind: Kind) -> Source:
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


def _kind(path: str) -> Kind:
    stem, suffix = os.path.splitext(path.lower())
    packed = suffix in decompression.SUFFIXES
    inside = os.path.splitext(stem)[1] if packed else suffix
    if inside in _ARCHIVES or inside in _NOT_TEXT:
        remedy = "unpack it" if inside in _ARCHIVES else "convert it to text"
        raise ValueError(
            f"{path} is {inside}, which is not read; {remedy}, or name the other files with a glob"
        )
    kind = _KINDS.get(inside, "text")
    if packed and kind == "table":
        raise ValueError(f"{path}: {inside} has its own compression; unpack {suffix}")
    return kind


def _read_text(source: Source, text_field: str, reject: Reject) -> Iterator[tuple[int, str]]:
    del text_field, reject
    with decompression.opened(source.path) as stream:
        yield 0, records.decode(stream.read(), source.path)


def _read_python(source: Source, text_field: str, reject: Reject) -> Iterator[tuple[int, str]]:
    """Reads Python source in its declared encoding; a file that is not in it is left out."""
    del text_field, reject
    data = read_bytes(source)
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        yield 0, data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return


def _read_lines(source: Source, text_field: str, reject: Reject) -> Iterator[tuple[int, str]]:
    found = records.json_lines(source.path, reject, f" with {text_field!r}")
    yield from _texts(found, f"{source.path} line", text_field, reject)


def _read_csv(source: Source, text_field: str, reject: Reject) -> Iterator[tuple[int, str]]:
    found = records.csv_rows(source.path, reject)
    yield from _texts(found, f"{source.path} row", text_field, reject)


def _read_table(source: Source, text_field: str, reject: Reject) -> Iterator[tuple[int, str]]:
    def columns(there: Sequence[str]) -> list[str]:
        if text_field in there:
            return [text_field]
        names = [name.strip() for name in text_field.split(",")]
        wanted = [name if name in there else name.partition(".")[0] for name in names]
        for name in wanted:
            if name not in there:
                raise ValueError(
                    f"{source.path} has no column {name!r} but {', '.join(there[:20])}; set "
                    "data.text_field"
                )
        return list(dict.fromkeys(wanted))

    found = records.table_rows(source.path, columns)
    yield from _texts(found, f"{source.path} row", text_field, reject)


def _texts(
    found: records.Numbered, place: str, text_field: str, reject: Reject
) -> Iterator[tuple[int, str]]:
    for index, record in found:
        try:
            text = text_of(record, text_field, f"{place} {index + 1}")
        except ValueError as error:
            reject(str(error))
            continue
        yield index, text


def text_of(record: dict[str, Any], text_field: str, place: str) -> str:
    """Returns the text of a record: of one field, or of several joined by an empty line, of which
    those without text are left out.

    Raises:
      ValueError: a field is missing or holds no text; `place` begins the message.
    """
    names = [text_field]
    if text_field not in record:
        names = [name.strip() for name in text_field.split(",")]
    values = {name: _value(record, name, place) for name in names}
    if len(names) > 1:
        values = {name: value for name, value in values.items() if value not in (None, "")}
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(
                f"{place}: {name!r} is {type(value).__name__}, not text; remove it or set "
                "data.text_field"
            )
    text = "\n\n".join(values.values())
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: {text_field!r} holds half of a surrogate pair at character {error.start}; "
            "repair or remove it"
        ) from error
    return text


def _value(record: dict[str, Any], name: str, place: str) -> Any:
    """Returns the value of a field, or of one inside it, such as `meta.text`."""
    value: Any = record
    if name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(sorted(value)[:20]) if isinstance(value, dict) else "none"
            inside = "" if value is record else f" of {name!r}"
            raise ValueError(
                f"{place} has no field {part!r}{inside} but {known or 'none'}; set data.text_field"
            )
        value = value[part]
    return value


_READERS = {
    "text": _read_text,
    "python": _read_python,
    "lines": _read_lines,
    "csv": _read_csv,
    "table": _read_table,
}
