"""The arrays of a converted checkpoint on disk: written tensor by tensor, read slice by slice.

Orbax can restore the folder, onto any mesh. It contains zarr arrays, laid out so that conversion
moves bytes and does nothing else to them:

    weights/
      params.moe_layers.ffn.experts.w_up/
        .zarray      shape [layers, experts, in, out], chunks [1, 1, in, out], order F, uncompressed
        0.0.0.0      the tensor of layer 0 and expert 0, byte for byte as published
        ...
      router.moe_layers.ffn.gate.bias/
      _CHECKPOINT_METADATA
      _METADATA      the names, written last: a folder without it is not a checkpoint

A leaf stacks published tensors, one per slot, and each slot is a chunk. Published matrices are
[out, in] in C order, ours are [in, out]: stored as a chunk in Fortran order, the same bytes are the
transpose. Only a tensor of more than `CHUNK_BYTES` (an embedding, a head) is split along its
published rows into several chunks; the last one is padded with zeros, as in zarr.

A leaf kept in FP8 has dtype float8_e4m3fn and a twin `scales.<name>` in float32. Each slot of the
twin contains that slot's scales: published as [out blocks, in blocks], here [in blocks, out
blocks]. Blocks need not align with a slice, so scales are looked up by a value's position in the
whole tensor (`slices.Dequantized`).

TensorStore creates the arrays (it writes `.zarray`). Their chunks, being plain bytes, are written
and read here directly; `_Chunks.write` and `_Chunks.rows` say why.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from dsjax.checkpoint.manifest import File, Guard
from dsjax.checkpoint.names import Tensor
from dsjax.checkpoint.slices import Dequantized, Leaf, Tensors, transpose_into
from dsjax.files import open_regular, read_json, sync_folder, write_json

Name = tuple[str, ...]

CHUNK_BYTES = 256 << 20
# Decoded chunks of a compressed checkpoint stay in memory while their slots are read in turn.
CACHE_BYTES = 1 << 30

_DTYPES = {
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "<i8": np.dtype(np.int64),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
_FINISHED = "_METADATA"
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


def leaf_name(tensor: Tensor) -> Name:
    """Returns the name of the leaf that contains a published tensor, as in a run's checkpoint."""
    return ("params" if tensor.trains else "router", *tensor.path)


def scales_name(name: Name) -> Name:
    """Returns the name of the scales of an FP8 leaf."""
    return ("scales", *name)


def is_chunk(file: str) -> bool:
    """Tells whether the file at this path is a chunk of an array."""
    return re.fullmatch(r"[0-9.]+", os.path.basename(file)) is not None


def is_complete(folder: Path) -> bool:
    """Tells whether the weights in a folder are complete."""
    return (folder / _FINISHED).is_file()


class WeightsWriter:
    """A folder of weights being written; thread-safe."""

    def __init__(
        self, folder: Path, leaves: Mapping[Name, Leaf], block: tuple[int, int] | None = None
    ):
        """Creates empty arrays, or continues with those that an interrupted call has created.

        Args:
          block: rows and columns, as published, that share a scale of an FP8 leaf.

        Raises:
          ValueError: the folder was started with other arrays.
          OSError: it cannot be written.
        """
        assert block or not any(name[0] == "scales" for name in leaves)
        self.folder, self._leaves, self._block = folder, dict(leaves), block
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FINISHED).unlink(missing_ok=True)  # until it is finished again
        self._arrays = {name: _Chunks(folder, name, leaf) for name, leaf in leaves.items()}
        for array in self._arrays.values():
            array.create()

    def write(self, name: Name, slot: tuple[int, ...], tensor: np.ndarray) -> dict[str, File]:
        """Writes a slot's tensor, given in published orientation, and waits until it is on disk.

        Returns:
          the files that hold it, by path relative to the folder.

        Raises:
          OSError: it cannot be written.
        """
        leaf = self._leaves[name]
        assert (tensor.shape, tensor.dtype) == (leaf.tensor_shape, leaf.dtype), (name, tensor.shape)
        files = self._arrays[name].write(slot, np.ascontiguousarray(tensor))
        return {str(path.relative_to(self.folder)): file for path, file in files.items()}

    def finish(self) -> None:
        """Checks that every slot has been written, and completes the folder.

        Raises:
          ValueError: slots are missing.
        """
        missing = [path for array in self._arrays.values() for path in array.missing()]
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of its chunks, the first being {missing[0]}; "
                "write them before finishing"
            )
        for name in self._leaves:
            sync_folder(self.folder / ".".join(name))
        write_json(
            self.folder / "_CHECKPOINT_METADATA",
            {
                "item_handlers": _HANDLER,
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": 0,  # so that the same weights give the same files
                "commit_timestamp_nsecs": 0,
                "custom_metadata": {},
            },
        )
        write_json(self.folder / _FINISHED, self._metadata())

    def _metadata(self) -> dict[str, Any]:
        """Returns Orbax's description of the tree.

        It names no shardings, so a restore that asks for none gives NumPy arrays and does not look
        for devices of the machine that wrote them.
        """
        return {
            "tree_metadata": {
                str(name): {
                    "key_metadata": [{"key": key, "key_type": 2} for key in name],
                    "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
                }
                for name in self._leaves
            },
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": {
                "slot_ranks": {
                    ".".join(name): leaf.slot_rank for name, leaf in self._leaves.items()
                },
                "scale_block": self._block,
            },
        }


class Weights:
    """The arrays of a checkpoint, open for reading; thread-safe.

    Reads what `WeightsWriter` has written and, through TensorStore, what Orbax has written: the
    `state` of a run's checkpoint, compressed and in chunks of Orbax's choice.

    Attributes:
      leaves: shape and dtype of each array, by name.
      block: rows and columns, as published, that share a scale of an FP8 leaf.
    """

    def __init__(self, folder: Path, guard: Guard | None = None):
        """Opens a folder without reading arrays.

        Args:
          guard: checks a chunk before any of it is used; None: only sizes are checked.

        Raises:
          ValueError: the checkpoint is incomplete or damaged.
        """
        self.folder = folder
        if not is_complete(folder):
            raise ValueError(
                f"{folder} is not a complete checkpoint: it has no {_FINISHED}, which is written "
                "last; repeat the command that was writing it, or copy it again"
            )
        metadata = read_json(folder / _FINISHED)
        self.block: tuple[int, int] | None = None
        self._arrays: Mapping[Name, _Chunks | _Stored]
        try:
            names = _names(metadata)
            custom = metadata["custom_metadata"] or {}
            if slot_ranks := custom.get("slot_ranks"):
                self._arrays = {
                    name: _Chunks.open(folder, name, slot_ranks[".".join(name)], guard)
                    for name in names
                }
                if custom["scale_block"]:
                    self.block = (custom["scale_block"][0], custom["scale_block"][1])
            else:
                self._arrays = _open_with_tensorstore(folder, names, metadata)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} is damaged: its description cannot be read ({error!r}); copy or convert "
                "the checkpoint again"
            ) from error
        self.leaves: dict[Name, Leaf] = {name: array.leaf for name, array in self._arrays.items()}

    def tensors(self, name: Name) -> Tensors:
        """Returns the tensors of a leaf for reading slices; FP8 with scales is dequantized."""
        tensors = self._arrays[name]
        if scales_name(name) not in self._arrays:
            return tensors
        assert self.block, self.folder
        return Dequantized(tensors, self._arrays[scales_name(name)], self.block)

    def read_published(self, name: Name, slot: tuple[int, ...], transpose: bool) -> np.ndarray:
        """Reads one slot as stored, in published orientation, C-contiguous.

        Args:
          transpose: the published tensor is the transpose of ours.

        Raises:
          ValueError: chunks are missing or damaged.
        """
        return self._arrays[name].published(slot, transpose)


def _names(metadata: Mapping[str, Any]) -> list[Name]:
    names = [
        tuple(entry["key"] for entry in value["key_metadata"])
        for value in metadata["tree_metadata"].values()
        if not value["value_metadata"]["skip_deserialize"]
    ]
    for name in names:
        if not all(re.fullmatch(r"[\w-]+", key) for key in name):
            raise KeyError(f"array name {name}")  # names become paths
    return names


class _Chunks:
    """An array of published tensors, each stored as one or a few chunks."""

    def __init__(
        self,
        folder: Path,
        name: Name,
        leaf: Leaf,
        chunk_rows: int | None = None,
        guard: Guard | None = None,
    ):
        self._folder, self.leaf, self._guard = folder / ".".join(name), leaf, guard
        rows, *columns = leaf.tensor_shape
        self._rows = rows
        self._row_bytes = math.prod(columns) * leaf.dtype.itemsize
        # Equal pieces, so that only the last one is padded, by a few rows.
        pieces = -(-rows * self._row_bytes // CHUNK_BYTES)
        self._chunk_rows = chunk_rows or -(-rows // pieces)

    @classmethod
    def open(cls, folder: Path, name: Name, slot_rank: int, guard: Guard | None) -> _Chunks:
        path = folder / ".".join(name) / ".zarray"
        zarray = read_json(path)
        fixed = (zarray["compressor"], zarray["filters"], zarray.get("dimension_separator", "."))
        transpose = zarray["order"] == "F"
        shape = tuple(zarray["shape"])
        leaf = Leaf(shape, _DTYPES[zarray["dtype"]], slot_rank, transpose)
        chunk_rows = zarray["chunks"][-1 if transpose else slot_rank]
        array = cls(folder, name, leaf, chunk_rows, guard)
        if fixed != (None, None, ".") or zarray["chunks"] != array._chunk_shape():
            raise ValueError(
                f"{path} does not describe whole tensors, so it is not as it was written; copy or "
                "convert the checkpoint again"
            )
        return array

    def _chunk_shape(self) -> list[int]:
        _, *columns = self.leaf.tensor_shape
        inner = [self._chunk_rows, *columns]
        return [1] * self.leaf.slot_rank + (inner[::-1] if self.leaf.transpose else inner)

    def create(self) -> None:
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(self._folder.absolute())},
            "dtype": self.leaf.dtype.name,
            "metadata": {
                "shape": self.leaf.shape,
                "chunks": self._chunk_shape(),
                "order": "F" if self.leaf.transpose else "C",
                "compressor": None,
            },
        }
        try:
            ts.open(spec, create=True, open=True).result()
        except ValueError as error:
            if (self._folder / ".zarray").is_file():
                raise ValueError(
                    f"{self._folder} was started for an array of another shape or dtype; delete "
                    f"{self._folder.parent} to start over"
                ) from error
            raise OSError(f"{self._folder} cannot be written: {error}") from error

    def _pieces(
        self, slot: tuple[int, ...], start: int, stop: int
    ) -> Iterator[tuple[Path, int, int]]:
        """Yields the file of each chunk that overlaps rows [start, stop), and the overlap."""
        for piece in range(start // self._chunk_rows, -(-stop // self._chunk_rows)):
            inner = [piece] + [0] * (len(self.leaf.tensor_shape) - 1)
            position = (*slot, *(inner[::-1] if self.leaf.transpose else inner))
            first = piece * self._chunk_rows
            path = self._folder / ".".join(map(str, position))
            yield path, max(start, first), min(stop, first + self._chunk_rows)

    def write(self, slot: tuple[int, ...], tensor: np.ndarray) -> dict[Path, File]:
        # Hashed in memory before writing: the manifest records what was meant to be written,
        # not what a faulty disk returns. TensorStore would write the same bytes as fast.
        files = {}
        for path, start, stop in self._pieces(slot, 0, self._rows):
            rows = _bytes(tensor[start:stop])
            padding = bytes((self._chunk_rows - (stop - start)) * self._row_bytes)
            digest = hashlib.sha256(rows)
            digest.update(padding)
            with path.open("wb") as file:
                file.write(rows)
                file.write(padding)
                file.flush()
                os.fsync(file.fileno())
            files[path] = File(len(rows) + len(padding), digest.hexdigest())
        return files

    def missing(self) -> Iterator[Path]:
        """Yields the chunk files that are missing or have the wrong size."""
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self._folder)}
        for slot in itertools.product(*map(range, self.leaf.shape[: self.leaf.slot_rank])):
            for path, _, _ in self._pieces(slot, 0, self._rows):
                if sizes.get(path.name) != self._chunk_rows * self._row_bytes:
                    yield path

    def rows(self, slot: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        # TensorStore reads a whole chunk for any part of it. Where a device needs an eighth of each
        # matrix, that is eight times the bytes and took 2.2 times as long (0.12 against 0.05 s for
        # 32 matrices of 2048 x 1408 in bfloat16 on two cores); whole leaves took 0.9 against 1.2 s.
        rows = np.empty((stop - start, *self.leaf.tensor_shape[1:]), self.leaf.dtype)
        for path, first, last in self._pieces(slot, start, stop):
            if self._guard is not None:
                self._guard.check(path)  # before any of its bytes are used
            target = _bytes(rows[first - start : last - start])
            with os.fdopen(open_regular(path), "rb") as file:
                file.seek((first % self._chunk_rows) * self._row_bytes)
                if file.readinto(target) != len(target):
                    raise ValueError(
                        f"{path} ends before its tensor does; copy or convert the checkpoint again"
                    )
        return rows

    def published(self, slot: tuple[int, ...], transpose: bool) -> np.ndarray:
        assert transpose == self.leaf.transpose and len(slot) == self.leaf.slot_rank
        return self.rows(slot, 0, self._rows)


class _Stored:
    """An array read by TensorStore, each matrix a tensor that is not transposed."""

    def __init__(self, array: ts.TensorStore):
        dtype, rank = array.dtype.numpy_dtype, len(array.shape)
        self.leaf = Leaf(tuple(array.shape), np.dtype(dtype), max(rank - 2, 0), transpose=False)
        self._array = array

    def rows(self, slot: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        return self._array[(*slot, slice(start, stop))].read().result()

    def published(self, slot: tuple[int, ...], transpose: bool) -> np.ndarray:
        tensor = self._array[slot].read().result()
        if not transpose:
            return tensor
        turned = np.empty(tensor.shape[::-1], tensor.dtype)
        transpose_into(turned, tensor)
        return turned


def _open_with_tensorstore(
    folder: Path, names: list[Name], metadata: Mapping[str, Any]
) -> dict[Name, _Stored]:
    context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    files = {"driver": "file", "path": str(folder.absolute()) + "/"}

    def spec(name: Name) -> dict[str, Any]:
        path = ".".join(name) + "/"
        return {
            "driver": "zarr3" if metadata.get("use_zarr3") else "zarr",
            "kvstore": {"driver": "ocdbt", "base": files, "path": path}
            if metadata["use_ocdbt"]
            else files | {"path": files["path"] + path},
            # The files of a checkpoint do not change, and a missing chunk is damage, not zeros.
            "recheck_cached_data": False,
            "recheck_cached_metadata": False,
            "fill_missing_data_reads": False,
        }

    opening = {name: ts.open(spec(name), read=True, context=context) for name in names}
    try:
        return {name: _Stored(future.result()) for name, future in opening.items()}
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {error}; copy the checkpoint again") from error


def _bytes(array: np.ndarray) -> memoryview:
    """Returns the bytes of a C-contiguous array of any dtype."""
    return array.reshape(-1).view(np.uint8).data
