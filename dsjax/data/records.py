"""Records of files that hold many: JSON lines, CSV, parquet and Arrow, each with its number.

What is wrong with one record goes to a `Reject`, which raises, or notes it so that the next record
is read. What is wrong with a whole file raises ValueError, and what is wrong with reading it
OSError.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dsjax.data.decompression import opened

Record = dict[str, Any]
Reject = Callable[[str], None]
Columns = Callable[[Sequence[str]], list[str]]
Numbered = Iterator[tuple[int, Record]]

_TABLE_ROWS = 1024  # in memory at once
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def stop(problem: str) -> None:
    """Raises the problem: the `Reject` of those who skip nothing."""
    raise ValueError(problem)


def decode(data: bytes, path: str, offset: int = 0, line: int = 0) -> str:
    """Decodes UTF-8 that begins at byte `offset` of a file, without a byte order mark there.

    Raises:
      ValueError: it is not UTF-8; says which byte and, if given, which line.
    """
    if not offset and data.startswith(_BOM):
        data, offset = data[len(_BOM) :], len(_BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f" (line {line})" if line else ""
        known = " -f UTF-16" if not offset and data.startswith(_UTF16) else ""
        raise ValueError(
            f"{path} is not UTF-8: byte {offset + error.start}{place} is "
            f"0x{data[error.start]:02x}; convert it (iconv{known} -t UTF-8), or leave it out"
        ) from error


def json_lines(path: str, reject: Reject = stop, wanted: str = "") -> Numbered:
    """Yields the objects of JSON lines, each with the number of its line from 0.

    Args:
      wanted: what an object should have, for messages.
    """
    offset = 0
    with opened(path) as stream:
        for index, data in enumerate(stream):
            try:
                record = _object(data, path, offset, index + 1, wanted)
            except ValueError as error:
                reject(str(error))
                record = None
            offset += len(data)
            if record is not None:
                yield index, record


def _object(data: bytes, path: str, offset: int, line: int, wanted: str) -> Record | None:
    """Returns the object of a line; None for an empty one."""
    place, rule = f"{path} line {line}", "such a file holds one complete object per line"
    text = decode(data, path, offset, line)
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); {rule}") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        hint = " (jq -c '.[]' makes lines of a list)" if isinstance(record, list) else ""
        raise ValueError(f"{place} is a JSON {kind}, not an object{wanted}; {rule}{hint}")
    return record


def csv_rows(path: str, reject: Reject = stop) -> Numbered:
    """Yields the rows below the header of a CSV file, or of a TSV file, each with its number from
    0; all values are text.
    """
    delimiter = "\t" if ".tsv" in path.lower()[-8:] else ","
    csv.field_size_limit((1 << 31) - 1)  # of a field in characters; the default refuses 128 KB
    with opened(path) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        rows = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(rows, [])
            for index, row in enumerate(rows):
                if len(row) == len(header):
                    yield index, dict(zip(header, row, strict=True))
                elif row:
                    reject(
                        f"{path} line {rows.line_num} has {len(row)} fields and the header "
                        f"{len(header)}; quote fields that hold a {delimiter!r}"
                    )
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path} line {rows.line_num + 1} is not CSV in UTF-8 ({error}); repair it"
            ) from error


def table_rows(path: str, columns: Columns = list) -> Numbered:
    """Yields the rows of a parquet or Arrow file, each with its number from 0.

    Args:
      columns: chooses the columns to read among those that are there; may raise ValueError.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    kind = "parquet" if path.lower().endswith(".parquet") else "Arrow"
    index = 0
    try:
        for batch in _parquet(path, columns) if kind == "parquet" else _arrow(path, columns):
            for first in range(0, batch.num_rows, _TABLE_ROWS):
                for row in batch.slice(first, _TABLE_ROWS).to_pylist():
                    yield index, row
                    index += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a readable {kind} file ({error}); copy it again, or rename it"
        ) from error


def _parquet(path: str, columns: Columns) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        chosen = columns(table.schema_arrow.names)
        yield from table.iter_batches(batch_size=_TABLE_ROWS, columns=chosen)


def _arrow(path: str, columns: Columns) -> Iterator[Any]:
    """Yields the batches of an Arrow file: a stream, as the library datasets writes, or Feather."""
    import pyarrow as pa

    with pa.memory_map(path) as file:
        try:
            reader: Any = pa.ipc.open_stream(file)
            batches = iter(reader)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        chosen = columns(reader.schema.names)
        for batch in batches:
            yield batch.select(chosen)
