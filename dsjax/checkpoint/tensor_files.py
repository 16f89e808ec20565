"""Safetensors files: the only module that opens Hugging Face's weight files.

A file is `n` (8 bytes, little-endian), a JSON header of `n` bytes with the dtype, shape and byte
range of each tensor, then the bytes of the tensors. Headers are parsed here, strictly and in linear
time. Everything that a header claims (overlaps, holes, ranges outside the file, shapes that do not
fit their range, 2^62 bytes of header) is checked against the file before any data is read, and
nothing that a header or an index says is used as a path. The Hugging Face library accepts duplicate
keys and joins the index's file names to the folder unchecked; both are refused here.

Data is read with `pread` into arrays, not mapped: mapped pages count as memory, and a file that
shrinks while mapped kills the process.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dsjax.files import (
    disguise,
    listed,
    open_regular,
    parse,
    read_json,
    replacing,
    shown,
    write_json,
)

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 16 * 2**20  # a shard of V3 has about 100 KB, V3 in a single file 12 MB
MAX_NAME = 512  # characters of a tensor's name
MAX_SHARD_BYTES = 5_000_000_000  # what transformers writes by default

_COMPARED_TOGETHER = 64 << 20  # bytes

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ENTRY = {"dtype", "shape", "data_offsets"}
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".distcp")


class TensorInfo(NamedTuple):
    """A tensor and the location of its bytes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the start of the file
    n_bytes: int


class Shard(NamedTuple):
    """A file to write."""

    file_name: str
    tensors: tuple[TensorInfo, ...]  # in the order of their bytes


class TensorFolder:
    """The tensors of a folder of safetensors files whose headers have been checked.

    Attributes:
      tensors: by name.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], sizes: dict[Path, int]):
        self.path, self.tensors, self._sizes = path, tensors, sizes

    @property
    def files(self) -> list[Path]:
        return list(self._sizes)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or `rows` of its first dimension, into a new C-ordered array;
        thread-safe.

        Raises:
          ValueError: the length of the file has changed since it was opened.
        """
        tensor = self.tensors[name]
        shape, offset, n_bytes = tensor.shape, tensor.offset, tensor.n_bytes
        if rows is not None:
            start, stop, step = rows.indices(shape[0])
            assert step == 1, step
            row_bytes = n_bytes // max(shape[0], 1)
            shape = (max(stop - start, 0), *shape[1:])
            offset, n_bytes = offset + start * row_bytes, shape[0] * row_bytes
        descriptor = open_regular(tensor.file)
        try:
            if os.fstat(descriptor).st_size != self._sizes[tensor.file]:
                raise ValueError(
                    f"{tensor.file} has changed its length while in use; let its download or copy "
                    "finish, then start again"
                )
            data = _pread(descriptor, tensor.file, offset, n_bytes)
        finally:
            os.close(descriptor)
        return data.view(tensor.dtype).reshape(shape)

    def renamed(self, name_of: Callable[[str], str | None]) -> TensorFolder:
        """Returns the folder with other names for its tensors, without those that have none.

        Raises:
          ValueError: two tensors would have the same name.
        """
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            new = name_of(name)
            if new in tensors:
                raise ValueError(
                    f"{self.path} has two tensors for {new}, of which {name} is one; keep one of "
                    "the two"
                )
            if new is not None:
                tensors[new] = info._replace(name=new)
        return TensorFolder(self.path, tensors, self._sizes)

    def equal(self, one: str, other: str) -> bool:
        """Compares two tensors: bit for bit, or by value if their dtypes differ."""
        left, right = self.tensors[one], self.tensors[other]
        if left.shape != right.shape:
            return False
        same_dtype = left.dtype == right.dtype
        rows = left.shape[0] if left.shape else 1
        step = max(1, rows * _COMPARED_TOGETHER // max(left.n_bytes, 1))
        for start in range(0, rows, step):
            pieces = [self.read(name, slice(start, start + step)) for name in (one, other)]
            a, b = (p.view(np.uint8) if same_dtype else p.astype(np.float32) for p in pieces)
            if not np.array_equal(a, b):
                return False
        return True


def open_folder(path: Path) -> TensorFolder:
    """Reads and checks the headers of every safetensors file in a folder, and its index.

    Raises:
      ValueError: there are no such files (pickled ones are refused), or files, headers and index
        are incomplete or disagree; every problem is listed.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder of safetensors files; name the folder itself")
    names = sorted(os.listdir(path))
    found = [name for name in names if name.endswith(".safetensors")]
    if not found:
        raise ValueError(_without_safetensors(path, names))
    problems: list[str] = []
    weight_map = _read_index(path, found, problems) if INDEX in names else None
    if weight_map is None and not problems and len(found) > 1:
        problems.append(
            f"there are {len(found)} .safetensors files but no {INDEX} to say which belong "
            "together; download it too"
        )
    tensors: dict[str, TensorInfo] = {}
    sizes: dict[Path, int] = {}
    for file in (path / name for name in found):
        try:
            held, sizes[file] = read_header(file)
        except ValueError as error:
            problems.append(str(error).removeprefix(f"{path}{os.sep}"))
            continue
        twice = held.keys() & tensors.keys()
        problems += [
            f"tensor {shown(name)} is in both {tensors[name].file.name} and {file.name}"
            for name in sorted(twice)
        ]
        tensors |= held
    if weight_map is not None:
        problems += _disagreements(weight_map, tensors, {file.name for file in sizes})
    if problems:
        raise ValueError(f"{path} cannot be read as safetensors: {listed(problems)}")
    return TensorFolder(path, tensors, sizes)


def read_header(file: Path) -> tuple[dict[str, TensorInfo], int]:
    """Reads and checks a file's header; returns its tensors by name and the size of the file.

    Raises:
      ValueError: the file is not a whole safetensors file; says which rule it breaks, or what kind
        of file it is instead.
    """
    descriptor = open_regular(file)
    try:
        size = os.fstat(descriptor).st_size
        try:
            return _parse_header(_read_header(descriptor, file, size), file, size), size
        except ValueError:
            # Only now: the length of a valid header may look like another format's signature.
            if what := disguise(os.pread(descriptor, 512, 0)):
                raise ValueError(f"{file} is {what}") from None
            raise
    finally:
        os.close(descriptor)


def _read_header(descriptor: int, file: Path, size: int) -> bytes:
    if size < 8:
        raise ValueError(f"{file} has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(_pread(descriptor, file, 0, 8).tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"{file} claims a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} "
            "allowed; it is damaged or not a safetensors file"
        )
    if 8 + length > size:
        raise ValueError(
            f"{file} is truncated: its header should end at byte {8 + length:,}, the file ends at "
            f"{size:,}; download it again"
        )
    return _pread(descriptor, file, 8, length).tobytes()


def plan_shards(
    tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], max_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Distributes tensors (name, dtype, shape), in order, over files of at most `max_bytes`.

    A larger tensor gets a file of its own. Within a file wider dtypes come first, so that each
    tensor starts at a multiple of its item size, which readers that map the file rely on.
    """
    groups: list[list[TensorInfo]] = [[]]
    room = max_bytes
    for name, dtype, shape in tensors:
        tensor = TensorInfo(name, dtype, shape, Path(), 0, math.prod(shape) * dtype.itemsize)
        if tensor.n_bytes > room and groups[-1]:
            groups.append([])
            room = max_bytes
        groups[-1].append(tensor)
        room -= tensor.n_bytes
    total = len(groups)
    names = [f"model-{number:05}-of-{total:05}.safetensors" for number in range(1, total + 1)]
    return [
        _lay_out(name, group)
        for name, group in zip(names if total > 1 else ["model.safetensors"], groups, strict=True)
    ]


def write_shard(folder: Path, shard: Shard, produce: Callable[[str], np.ndarray]) -> None:
    """Writes a file atomically, holding one tensor in memory at a time.

    Args:
      produce: returns the tensor with a given name, in the planned dtype and shape.

    Raises:
      OSError: the file cannot be written; the partial file is removed.
    """
    with replacing(folder / shard.file_name) as file:
        file.write(_header(shard.tensors))
        for tensor in shard.tensors:
            array = produce(tensor.name)
            assert (array.dtype, array.shape) == (tensor.dtype, tensor.shape), (
                f"{tensor.name} is {array.dtype}{list(array.shape)}, "
                f"planned as {tensor.dtype}{list(tensor.shape)}"
            )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # before the next one is made


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes the index of which file holds which tensor; a single file needs none."""
    if len(shards) == 1:
        return
    weight_map = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total = sum(tensor.n_bytes for shard in shards for tensor in shard.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def _without_safetensors(path: Path, names: Sequence[str]) -> str:
    pickled = [name for name in names if name.removesuffix(".index.json").endswith(_PICKLED)]
    if not pickled:
        return f"{path} has no .safetensors files; download the weights into it"
    return (
        f"{path} has its weights as {', '.join(pickled[:3])}, in Python's pickle format. Reading a "
        "pickle runs code of its author, so dsjax never does; download the safetensors files (on "
        "the Hub often the revision refs/pr/1 of such a repository), or convert these elsewhere, "
        "on a machine with nothing to lose"
    )


def _read_index(path: Path, found: Sequence[str], problems: list[str]) -> dict[str, str] | None:
    """Reads the file of each tensor from the index, and compares the files with those `found`."""
    try:
        weight_map = read_json(path / INDEX).get("weight_map")
    except ValueError as error:
        problems.append(str(error))
        return None
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{INDEX} has no weight_map")
        return None
    weight_map = {
        name: file if isinstance(file, str) else repr(file) for name, file in weight_map.items()
    }
    # File names are looked up in the folder's own listing and never joined to its path: a listing
    # cannot contain a separator, "..", or a file elsewhere.
    present = set(found)
    for file in dict.fromkeys(weight_map.values()):
        if file not in present:
            problems.append(
                f"{file} is missing; download it"
                if re.fullmatch(r"[^/\\]+\.safetensors", file)
                and ".." not in file
                and file.isprintable()
                else f"{INDEX} names {shown(file)}, which is not the plain name of a .safetensors "
                "file in this folder"
            )
    extra = sorted(present - set(weight_map.values()))
    problems += [f"{name} is not in {INDEX}; remove it or the index" for name in extra]
    return weight_map


def _disagreements(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo], read: set[str]
) -> list[str]:
    """Lists where the index contradicts the files that could be read."""
    problems = []
    for name, file in weight_map.items():
        if file in read and (name not in tensors or tensors[name].file.name != file):
            problems.append(f"{INDEX} has tensor {shown(name)} in {file}, which does not hold it")
    unnamed = sorted(tensors.keys() - weight_map.keys())
    return problems + [
        f"tensor {shown(name)} of {tensors[name].file.name} is not in {INDEX}" for name in unnamed
    ]


def _check_surrogates(metadata: Any, file: Path) -> None:
    """Refuses half a surrogate pair (\\ud800 alone), which is no character: other readers refuse
    it, and no folder written from it could hold it as UTF-8.
    """
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{file}: __metadata__ has half a surrogate pair, which is no character; the file is "
            "damaged"
        ) from None


def _parse_header(data: bytes, file: Path, size: int) -> dict[str, TensorInfo]:
    if data[:1] != b"{":
        raise ValueError(f"{file}: the header does not start with '{{'; not a safetensors file")
    header = parse(data, f"{file}: the header")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise ValueError(f"{file}: __metadata__ must map strings to strings")
    _check_surrogates(metadata, file)
    start = 8 + len(data)
    ranges = [(*_check_entry(file, name, entry), name) for name, entry in header.items()]
    # In the order of their bytes, overlaps and holes show between neighbours.
    ranges.sort(key=lambda entry: entry[:2])
    position = 0
    for begin, end, _, name in ranges:
        if begin != position:
            what = (
                "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            )
            raise ValueError(f"{file}: tensor {shown(name)} at byte {begin:,} {what}")
        position = end
    if start + position != size:
        what = "is truncated" if start + position > size else "has bytes after its last tensor"
        raise ValueError(
            f"{file} {what}: it should have {start + position:,} bytes and has {size:,}; "
            "download it again"
        )
    return {
        name: TensorInfo(
            name, dtype, tuple(header[name]["shape"]), file, start + begin, end - begin
        )
        for begin, end, dtype, name in ranges
    }


def _check_entry(file: Path, name: str, entry: Any) -> tuple[int, int, np.dtype]:
    """Checks a tensor's entry by itself; returns the begin and end of its bytes, and its dtype."""
    place = f"{file}: tensor {shown(name)}"
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise ValueError(
            f"{file}: the tensor name {shown(name)} is empty, longer than {MAX_NAME} characters or "
            "not printable"
        )
    if type(entry) is not dict or entry.keys() != _ENTRY:
        raise ValueError(f"{place} must have exactly dtype, shape and data_offsets")
    shape, offsets, kind = entry["shape"], entry["data_offsets"], shown(str(entry["dtype"]))
    dtype = _DTYPES.get(entry["dtype"]) if type(entry["dtype"]) is str else None
    if dtype is None:
        raise ValueError(f"{place} has dtype {kind}, only {', '.join(_DTYPES)} can be read")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise ValueError(
            f"{place}: shape and data_offsets must be lists of integers that are not negative, not "
            f"{str(shape)[:80]} and {str(offsets)[:80]}"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{place} of shape {str(shape)[:80]} and dtype {entry['dtype']} does not fill its "
            f"bytes {begin} to {end}"
        )
    return begin, end, dtype


def _counts(values: Any) -> bool:
    # Not isinstance: true is an int too.
    return type(values) is list and all(type(value) is int and value >= 0 for value in values)


def _pread(descriptor: int, file: Path, offset: int, n_bytes: int) -> np.ndarray:
    """Reads exactly `n_bytes`, in several calls if needed (at most 2 GB per call)."""
    data = np.empty(n_bytes, np.uint8)
    view = data.data
    done = 0
    while done < n_bytes:
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(
                f"{file} ended at byte {offset + done:,}, {n_bytes - done:,} bytes early; it was "
                "truncated while in use"
            )
        done += count
    return data


def _lay_out(file_name: str, group: list[TensorInfo]) -> Shard:
    ordered = sorted(group, key=lambda tensor: -tensor.dtype.itemsize)
    offset = len(_header(ordered))
    placed = []
    for tensor in ordered:
        placed.append(tensor._replace(file=Path(file_name), offset=offset))
        offset += tensor.n_bytes
    return Shard(file_name, tuple(placed))


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    """Formats length and JSON, padded with spaces so that data starts at a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.n_bytes
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
