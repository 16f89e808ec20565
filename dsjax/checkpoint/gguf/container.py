"""Reads the header of a GGUF file strictly, and the bytes of its tensors.

A file is the letters GGUF, a version, two counts, key-value pairs, a table of tensors, padding, and
the bytes of the tensors. All that the header claims (counts, lengths, types, shapes, offsets) is
checked against the size of the file before anything of that size is made. The package's own reader
believes the counts, and reads past the end of a truncated file.

Layout: docs/gguf.md of ggml. Shapes are given here as NumPy has them, the reverse of the file's.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dsjax.files import disguise, listed, open_regular, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes; where the key `general.alignment` does not say otherwise
MAX_TENSORS = 1_000_000
MAX_KEYS = 100_000
MAX_NAME = 512  # bytes
MAX_DIMS = 4
MAX_HEADER_BYTES = 1 << 30  # V3's with its tokenizer has 20 MB
_SMALLEST_ENTRY = 8 + 1 + 4  # bytes of a key-value pair or a tensor's entry, at least

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor, and the location of its bytes."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    n_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: of all values along the last dimension."""
        return self.n_bytes // max(math.prod(self.shape[:-1]), 1)


class Container(NamedTuple):
    """A GGUF file whose header has been checked.

    Attributes:
      keys: the key-value pairs; arrays are lists.
    """

    path: Path
    version: int
    keys: dict[str, Any]
    tensors: dict[str, Stored]
    size: int  # of the file

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Reads the bytes of rows of a tensor: uint8 [rows, bytes of a row]; thread-safe.

        Rows are counted over all dimensions but the last.

        Raises:
          ValueError: the length of the file has changed since it was opened.
        """
        tensor = self.tensors[name]
        data = np.empty((stop - start, tensor.row_bytes), np.uint8)
        with os.fdopen(open_regular(self.path), "rb") as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise ValueError(
                    f"{self.path} has changed its length while in use; let its download or copy "
                    "finish, then start again"
                )
            file.seek(tensor.offset + start * tensor.row_bytes)
            if file.readinto(data.reshape(-1).data) != data.nbytes:
                raise ValueError(f"{self.path} was truncated while in use; copy it again")
        return data


def read_header(path: Path) -> Container:
    """Reads and checks the header of a file.

    Raises:
      ValueError: the file is not a whole GGUF file; says which rule it breaks.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(512)
        if start[:4] != MAGIC:
            what = disguise(start) or "not a GGUF file: it does not begin with the letters GGUF"
            raise ValueError(f"{path} is {what}")
        file.seek(0)
        # Read in steps, so that a large file of weights is not read for its header.
        cursor = _Cursor(path, size, file.read)
        return _parse(cursor, path, size)


class _Cursor:
    """The bytes of a header, read as they are needed."""

    _STEP = 1 << 20

    def __init__(self, path: Path, size: int, more: Callable[[int], bytes]):
        self.path, self.size, self.at = path, size, 0
        self._more, self._data = more, bytearray()

    def take(self, count: int, what: str) -> bytes:
        end = self.at + count
        if end > self.size:
            raise ValueError(
                f"{self.path} is truncated or damaged: {what} at byte {self.at:,} needs {count:,} "
                f"bytes, and the file has {self.size:,}; download it again"
            )
        if end > MAX_HEADER_BYTES:
            raise ValueError(
                f"{self.path} has a header of more than {MAX_HEADER_BYTES:,} bytes; it is damaged"
            )
        if len(self._data) < end:
            self._data += self._more(max(self._STEP, end - len(self._data)))
        part = bytes(self._data[self.at : end])
        if len(part) < count:
            raise ValueError(f"{self.path} was truncated while in use; copy it again")
        self.at = end
        return part

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def text(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        length = self.number("<Q", what)
        if length > most:
            raise ValueError(
                f"{self.path} is damaged: {what} claims {length:,} bytes, more than the {most:,} "
                "allowed"
            )
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is damaged: {what} is not UTF-8") from None


def _parse(cursor: _Cursor, path: Path, size: int) -> Container:
    cursor.take(4, "the letters GGUF")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        hint = ""
        if version & 0xFFFF == 0:
            hint = "; it is of a machine with the other order of bytes"
        raise ValueError(
            f"{path} has GGUF version {version}, and {' and '.join(map(str, VERSIONS))} can be "
            f"read{hint}"
        )
    n_tensors, n_keys = cursor.number("<Q", "a count"), cursor.number("<Q", "a count")
    for count, most, what in ((n_tensors, MAX_TENSORS, "tensors"), (n_keys, MAX_KEYS, "keys")):
        if count > min(most, size // _SMALLEST_ENTRY):
            raise ValueError(
                f"{path} claims {count:,} {what}, more than a file of {size:,} bytes can hold; it "
                "is damaged"
            )
    keys: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.text("the name of a key", MAX_NAME)
        if key in keys:
            raise ValueError(f"{path} has the key {shown(key)} twice; it is damaged")
        keys[key] = _value(cursor, cursor.number("<I", shown(key)), f"key {shown(key)}")
    entries = [_entry(cursor) for _ in range(n_tensors)]
    alignment = keys.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment % 8:
        raise ValueError(f"{path}: general.alignment={alignment!r} is no alignment; it is damaged")
    begin = -(-cursor.at // alignment) * alignment
    tensors = _placed(entries, begin, alignment, path, size)
    return Container(path, version, keys, tensors, size)


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    if kind == _STRING:
        return cursor.text(what)
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind != _ARRAY:
        raise ValueError(f"{cursor.path}: {what} has the unknown type {kind}; it is damaged")
    inner, count = cursor.number("<I", what), cursor.number("<Q", what)
    if inner == _STRING:
        if count > (cursor.size - cursor.at) // 8:
            raise ValueError(
                f"{cursor.path}: {what} claims {count:,} strings, more than the file has room for; "
                "it is damaged"
            )
        return [cursor.text(what) for _ in range(count)]
    if inner not in _SCALARS:
        raise ValueError(f"{cursor.path}: {what} is an array of the unknown type {inner}")
    dtype = np.dtype(_SCALARS[inner].replace("B", "u1").replace("b", "i1"))
    return np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype).tolist()


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.text("the name of a tensor", MAX_NAME)
    what = f"tensor {shown(name)}"
    n_dims = cursor.number("<I", what)
    if not 0 < n_dims <= MAX_DIMS:
        raise ValueError(f"{cursor.path}: {what} claims {n_dims} dimensions; it is damaged")
    shape = tuple(cursor.number("<Q", what) for _ in range(n_dims))[::-1]
    kind, offset = cursor.number("<I", what), cursor.number("<Q", what)
    try:
        found = GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(
            f"{cursor.path}: {what} has the type {kind}, unknown to the package gguf here; a newer "
            "one may know it (pip install -U gguf)"
        ) from None
    if not all(shape) or math.prod(shape) > 1 << 60:
        raise ValueError(f"{cursor.path}: {what} claims the shape {list(shape)}; it is damaged")
    block, _ = GGML_QUANT_SIZES[found]
    if shape[-1] % block:
        raise ValueError(
            f"{cursor.path}: {what} has rows of {shape[-1]} values, and {found.name} stores them "
            f"in blocks of {block}; it is damaged"
        )
    return name, shape, found, offset


def _placed(
    entries: Sequence[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
    begin: int,
    alignment: int,
    path: Path,
    size: int,
) -> dict[str, Stored]:
    """Places tensors in the file, and checks that they lie inside it and do not overlap."""
    tensors: dict[str, Stored] = {}
    problems = []
    for name, shape, kind, offset in entries:
        block, n_bytes = GGML_QUANT_SIZES[kind]
        tensor = Stored(name, kind, shape, begin + offset, math.prod(shape) // block * n_bytes)
        if name in tensors:
            problems.append(f"tensor {shown(name)} is there twice")
        elif offset % alignment:
            problems.append(f"tensor {shown(name)} is not aligned to {alignment} bytes")
        elif tensor.offset + tensor.n_bytes > size:
            problems.append(
                f"tensor {shown(name)} ends at byte {tensor.offset + tensor.n_bytes:,}, outside "
                f"the file of {size:,} bytes"
            )
        tensors[name] = tensor
    position, last = begin, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < position:
            problems.append(f"tensor {shown(tensor.name)} overlaps {shown(last)}")
        position, last = tensor.offset + tensor.n_bytes, tensor.name
    if problems:
        raise ValueError(f"{path} is truncated or damaged: {listed(problems)}; download it again")
    return tensors
