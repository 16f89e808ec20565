"""What a frozen model says of each row of the data, computed once and kept on disk.

Reference log-probabilities (`dsjax.posttrain.preference`) and a teacher's likeliest tokens
(`dsjax.posttrain.distill`) do not change while the student trains. So the frozen model runs over
the rows first, alone on the devices, and the run reads what it said from disk.

A folder holds `meta.json`, which says what the rows are of, and one `NAME.npy` per array, [rows,
...], which NumPy reads. Rows are appended in order; a job that was killed goes on after the last
row that is whole in all files.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax.checkpoint import fingerprint
from dsjax.checkpoint.store import named_arrays
from dsjax.files import read_json, write_json, writing

_META = "meta.json"


def weights_digest(weights: Any) -> str:
    """Returns a hash of a model's values, the same however they are spread over devices."""
    prints = fingerprint.inspect(named_arrays(weights)).fingerprints
    return hashlib.blake2b(repr(sorted(prints.items())).encode(), digest_size=16).hexdigest()


class Field(NamedTuple):
    """What an array holds per row."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class RowStore:
    """Arrays of one value per row, written once and in order.

    One process writes; the others may read what is complete.
    """

    def __init__(
        self, folder: Path, rows: int, fields: Mapping[str, Field], identity: Mapping[str, Any]
    ) -> None:
        """Describes a folder; nothing is read or written yet.

        Args:
          rows: how many there will be.
          identity: what decides every value, as JSON: data, weights, element types. None stands for
            what is not known now and was checked before.
        """
        self.folder, self.rows, self.fields = folder, rows, dict(fields)
        self._meta = {
            "rows": rows,
            "fields": {name: [*field.shape, field.dtype] for name, field in fields.items()},
            **identity,
        }

    def claim(self, *, begun: bool) -> None:
        """Checks that what the folder holds is of these rows and this identity; the writing process
        calls this.

        Args:
          begun: whether a run has trained on what is there. If not, what is of something else is
            removed.

        Raises:
          ValueError: the run has begun with something else; says what differs.
        """
        if not (self.folder / _META).is_file():
            return
        stored = read_json(self.folder / _META)
        differing = [
            f"{name} was {stored.get(name)!r} and is now {value!r}"
            for name, value in self._meta.items()
            if value is not None and stored.get(name) != value
        ]
        if differing and begun:
            raise ValueError(
                f"{self.folder} was made of something else: {'; '.join(differing)}. Restore that, "
                "or use another --workdir"
            )
        if differing:
            shutil.rmtree(self.folder)

    @property
    def done(self) -> int:
        """How many rows are whole in all files."""
        if not (self.folder / _META).is_file():
            return 0
        return min(self._whole(name) for name in self.fields)

    @property
    def complete(self) -> bool:
        return self.done == self.rows

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _header(self, name: str) -> bytes:
        """Returns what NumPy writes before the values of the whole array."""
        field = self.fields[name]
        described = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(field.dtype)),
            "fortran_order": False,
            "shape": (self.rows, *field.shape),
        }
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(stream, described)
        return stream.getvalue()

    def _whole(self, name: str) -> int:
        path = self._path(name)
        if not path.is_file():
            return 0
        values = path.stat().st_size - len(self._header(name))
        return max(values, 0) // self.fields[name].row_bytes

    def append(self, values: Mapping[str, np.ndarray]) -> None:
        """Writes the next rows of all arrays, and waits until they are on the disk.

        Raises:
          OSError: they cannot be written, for example because the disk is full.
        """
        first = self.done
        if not (self.folder / _META).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / _META, self._meta)
        for name, field in self.fields.items():
            path, header = self._path(name), self._header(name)
            with writing(path), path.open("r+b" if path.is_file() else "w+b") as file:
                if not first:
                    file.write(header)
                # What a killed job left of a row is overwritten.
                file.seek(len(header) + first * field.row_bytes)
                file.write(np.ascontiguousarray(values[name], field.dtype).tobytes())
                file.truncate()
                file.flush()
                os.fsync(file.fileno())

    def read(self) -> dict[str, np.ndarray]:
        """Maps the arrays of a complete store, [rows, ...]."""
        assert self.complete, f"{self.folder} has {self.done} of {self.rows} rows"
        return {name: np.load(self._path(name), mmap_mode="r") for name in self.fields}
