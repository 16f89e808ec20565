"""Parquet files: written in pieces of bounded size, complete or not there at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsjax.files import replacing

PIECE_BYTES = 8 << 20  # of text in a row group, what is in memory at once
PIECE_ROWS = 8192

Row = dict[str, Any]


class Writer:
    """Writes rows to one file, which takes its name when the context ends well."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._rows: list[Row] = []
        self._size = 0

    def __enter__(self) -> Writer:
        self._stack = contextlib.ExitStack()
        file: BinaryIO = self._stack.enter_context(replacing(self._path))
        self._file = self._stack.enter_context(
            pq.ParquetWriter(file, self._schema, compression="zstd", write_statistics=False)
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is None:
            self._flush()
        self._stack.__exit__(*exception)

    def add(self, row: Row, size: int = 0) -> None:
        """Adds a row of about `size` bytes."""
        self._rows.append(row)
        self._size += size
        if self._size >= PIECE_BYTES or len(self._rows) >= PIECE_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, self._schema))
        self._rows, self._size = [], 0


def rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a file in order, a row group in memory at a time."""
    for piece in pieces(path, columns):
        yield from piece


def pieces(path: Path, columns: Sequence[str] | None = None) -> Iterator[list[Row]]:
    """Yields the rows of each row group."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns, use_threads=False)
            yield table.to_pylist()


def arrays(path: Path, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns whole columns of numbers or text."""
    table = pq.read_table(path, columns=list(columns), use_threads=False)
    return {name: table.column(name).to_numpy() for name in columns}
