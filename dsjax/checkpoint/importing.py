"""Converts a Hugging Face folder, or a GGUF file, to a converted folder, which can be loaded on any
mesh.

    config.json     what dsjax needs to know: its version, the family, the model
    weights/        the arrays, in the format of `weights.py`
    hf/             the small files as published: config.json, tokenizer, chat template, licence
    manifest.json   SHA-256 of each file, written last

Tensors are read, converted, checked to be finite and written to their slots one at a time, a few of
them in threads, in the order of their bytes in the files. So memory is bounded by the largest
tensor, whatever the size of the checkpoint. Everything that can be known in advance is checked
before anything is written: names, shapes and dtypes, the copies in MTP layers, the free disk space.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsjax import __version__
from dsjax.checkpoint import families, hub, manifest
from dsjax.checkpoint.gguf import is_gguf, refuse_overrides, require_package
from dsjax.checkpoint.hf_folder import FLOAT32, FP8, HfFolder, Row, check_kind, open_hf, scale_shape
from dsjax.checkpoint.manifest import File, Manifest
from dsjax.checkpoint.recode import (
    BLOCK,
    Stored,
    cast_rows,
    check_choice,
    is_finite,
    recode,
    stored_dtype,
)
from dsjax.checkpoint.slices import Leaf
from dsjax.checkpoint.staging import Converted, Staging, check_space, check_target, fingerprint
from dsjax.checkpoint.streaming import stream
from dsjax.checkpoint.tensor_files import TensorInfo
from dsjax.checkpoint.weights import Name, WeightsWriter, leaf_name, scales_name
from dsjax.display import Transfer
from dsjax.files import MAX_LISTED, listed, write, write_json, writing

# The files beside the weights that are data, not code.
_SIDE_FILES = (".json", ".jinja", ".txt", ".model", ".md")
_LICENCES = ("LICENSE", "LICENCE", "NOTICE")
_LARGEST_SIDE_FILE = 64 << 20


class Part(NamedTuple):
    """A tensor to import, with its scales if it has any."""

    row: Row
    info: TensorInfo
    dtype: np.dtype  # to store it as

    @property
    def n_bytes(self) -> int:
        """Size as published, without scales."""
        return self.info.n_bytes


def import_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: str,
    progress: Transfer,
    overrides: Mapping[str, Any] | None = None,
) -> Converted:
    """Creates the converted folder `target` from the Hugging Face folder or GGUF file `source`.

    An interrupted import continues where it stopped.

    Args:
      dtype: one of `recode.CHOICES`.
      overrides: values of fields of config.json, used instead of those in the file; the copy in
        `target` contains them.

    Raises:
      ValueError: the source is not a complete checkpoint, does not fit `dtype`, or contains NaN or
        infinity; the target exists or its disk is too full.
      OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    check_choice(dtype)
    source = hub.located(source)
    if not is_gguf(source):
        check_kind(source)
    source, target = source.resolve(), target.resolve()
    check_target(target, source)
    folder = _open(source, overrides)
    parts = _plan(folder, dtype)
    leaves = _leaves(parts, folder.block or BLOCK)
    small = list(side_files(source)) if source.is_dir() else []
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    check_space(target, needed + sum(file.stat().st_size for file in small))
    _check_copies(folder)
    identity = {
        "dsjax": __version__,
        "the source": str(source),
        "the state of its files": fingerprint(
            [*folder.files.files, *(file for file in small if file.name == "config.json")]
        ),
        "--dtype": dtype,
        "--override": json.dumps(dict(overrides), sort_keys=True) if overrides else None,
    }
    with Staging(target, identity, progress.say) as work, writing(work.content):
        left = [part for part in parts if part.row.tensor.name not in work.finished]
        total, to_do = (sum(part.n_bytes for part in some) for some in (parts, left))
        progress.begin("importing", total, total - to_do)
        _write_weights(folder, left, leaves, work, progress)
        (work.content / "hf").mkdir(exist_ok=True)
        copy_side_files(small, work.content / "hf")
        for name, text in folder.texts.items():
            write(work.content / "hf" / name, text)
        if overrides:
            write_json(work.content / "hf" / "config.json", folder.config)
        write_json(
            work.content / "config.json",
            {
                "dsjax": __version__,
                "family": folder.family,
                "model": dataclasses.asdict(folder.model),
            },
        )
        _write_manifest(work, leaves, dtype)
        work.publish()
    return Converted(len(left), to_do, time.monotonic() - started)


def _open(source: Path, overrides: Mapping[str, Any] | None) -> HfFolder:
    if not is_gguf(source):
        if (source / "weights").is_dir() or (source / "checkpoints").is_dir():
            raise ValueError(
                f"{source} is a converted folder or a run already, which every command reads as it "
                "is; tools/convert.py export writes it for other programs"
            )
        folder = open_hf(source, overrides)
        if folder.beside:
            raise ValueError(
                f"{source} is a model that sees, which is used as it was published: name that "
                "folder. (export writes it in the other layout, DeepSeek's or transformers')"
            )
        return folder
    refuse_overrides(source, overrides)
    require_package()
    from dsjax.checkpoint.gguf.reading import open_gguf

    return open_gguf(source)


def _plan(folder: HfFolder, choice: str) -> list[Part]:
    """Lists the tensors that fill the leaves, in the order of their bytes in the files.

    Raises:
      ValueError: tensors of one leaf would differ in dtype.
    """
    parts = []
    dtypes: dict[Name, dict[np.dtype, str]] = {}
    for row in folder.rows:
        if row.tensor.is_copy:
            continue
        dtype = stored_dtype(choice, row.tensor, row.dtype)
        parts.append(Part(row, folder.files.tensors[row.tensor.name], dtype))
        dtypes.setdefault(leaf_name(row.tensor), {}).setdefault(dtype, row.tensor.name)
    mixed = [
        " and ".join(f"{tensor} in {dtype}" for dtype, tensor in found.items())
        for found in dtypes.values()
        if len(found) > 1
    ]
    if mixed:
        raise ValueError(
            f"{folder.path} has tensors of several dtypes in layers that share one array: "
            f"{listed(mixed)}. So dtypes cannot be kept: use --dtype bfloat16, float32 or fp8"
        )
    # In the order of their bytes, so that disks read forward.
    return sorted(parts, key=lambda part: (part.info.file, part.info.offset))


def _leaves(parts: Sequence[Part], block: tuple[int, int]) -> dict[Name, Leaf]:
    """Returns the layout of the arrays that the parts fill."""
    leaves: dict[Name, Leaf] = {}
    slots: dict[Name, list[tuple[int, ...]]] = {}
    for part in parts:
        slots.setdefault(leaf_name(part.row.tensor), []).append(part.row.tensor.slot)
    for part in parts:
        tensor, name = part.row.tensor, leaf_name(part.row.tensor)
        if name in leaves:
            continue
        counts = tuple(last + 1 for last in max(slots[name]))
        rank, turned = len(counts), tensor.transpose
        leaves[name] = Leaf(counts + tensor.target_shape, part.dtype, rank, turned)
        if part.dtype == FP8:
            inner = scale_shape(tensor.shape, block)
            scales = inner[::-1] if turned else inner
            leaves[scales_name(name)] = Leaf(counts + scales, FLOAT32, rank, turned)
    return leaves


def _check_copies(folder: HfFolder) -> None:
    """Checks that the copies in MTP layers equal the main model's tensors: only one is kept.

    Raises:
      ValueError: a copy differs; names both.
    """
    mains = {row.tensor.path: row for row in folder.rows if not row.tensor.is_copy}
    problems, equal = [], folder.files.equal
    for row in folder.rows:
        main = mains[row.tensor.path]
        alike = not row.tensor.is_copy or (
            equal(row.tensor.name, main.tensor.name)
            and (row.scale == main.scale or bool(row.scale and main.scale))
            and (not row.scale or not main.scale or equal(row.scale, main.scale))
        )
        if not alike:
            problems.append(f"{row.tensor.name} differs from {main.tensor.name}")
    if problems:
        raise ValueError(
            f"{folder.path}: {listed(problems)}, of which it should be a copy, and dsjax keeps one "
            "for both; download the files again, or leave the MTP layers out: --override "
            "num_nextn_predict_layers=0"
        )


def _write_weights(
    folder: HfFolder,
    parts: Sequence[Part],
    leaves: dict[Name, Leaf],
    work: Staging,
    progress: Transfer,
) -> None:
    block = folder.block or BLOCK
    in_fp8 = any(leaf.dtype == FP8 for leaf in leaves.values())
    writer = WeightsWriter(work.content / "weights", leaves, block if in_fp8 else None)
    damaged: list[str] = []

    def convert(part: Part) -> tuple[Part, bool, dict[str, File]]:
        """Reads a part and, unless the import has failed already, writes it.

        Returns:
          the part, whether it is finite, and the files that hold it.
        """
        tensor = part.row.tensor
        stored = _read(folder, part, block)
        if stored is None or not all(is_finite(array) for array in stored if array is not None):
            return part, False, {}
        files = {}
        if not damaged:
            files = writer.write(leaf_name(tensor), tensor.slot, stored.values)
            if stored.scales is not None:
                files |= writer.write(scales_name(leaf_name(tensor)), tensor.slot, stored.scales)
        return part, True, files

    def held(part: Part) -> int:
        return part.n_bytes + math.prod(part.info.shape) * part.dtype.itemsize

    with contextlib.closing(stream(convert, parts, held)) as converted:
        # After the first damaged tensor nothing is written; reading on finds others to name.
        for part, sound, files in converted:
            progress.advance(part.n_bytes)
            if not sound:
                damaged.append(f"{part.row.tensor.name} in {part.info.file.name}")
                if len(damaged) == MAX_LISTED:
                    break
            elif not damaged:
                work.finish(part.row.tensor.name, files)
    progress.stop()
    if damaged:
        raise ValueError(
            f"{folder.path} has tensors with NaN or infinity, or with FP8 scales that are not "
            f"positive: {listed(damaged)}; download these files again"
        )
    writer.finish()


def _write_manifest(work: Staging, leaves: dict[Name, Leaf], dtype: str) -> None:
    """Writes the manifest. Chunks were hashed in memory before they were written; the other files
    are hashed here."""
    files = {
        f"weights/{name}": File(*file)
        for note in work.finished.values()
        for name, file in note.items()
    }
    rest = [name for name in manifest.listing(work.content) if name not in files]
    files |= manifest.hash_files(work.content, rest)
    described = {
        ".".join(name): {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        for name, leaf in leaves.items()
    }
    record = {"dsjax": __version__, "dtype": dtype}
    manifest.write(work.content, Manifest(record, described, files))


def _read(folder: HfFolder, part: Part, block: tuple[int, int]) -> Stored | None:
    """Reads a part as it will be stored; None if its scales are zero, negative or NaN."""
    name, scale = part.row.tensor.name, part.row.scale
    if part.info.dtype != part.dtype != FP8 and scale is None:
        return Stored(
            cast_rows(lambda rows: folder.files.read(name, rows), part.info.shape, part.dtype)
        )
    scales = folder.files.read(scale) if scale else None
    if scales is not None and not np.all(scales > 0):
        return None
    stored = Stored(folder.files.read(name), scales)
    return recode(stored, part.dtype, block, families.find(folder.family).scale)


def side_files(source: Path) -> Iterator[Path]:
    """Yields the small files to keep: never weights, never code."""
    for file in sorted(source.iterdir()):
        licence = file.name.startswith(_LICENCES)
        index = file.name.endswith(".index.json")
        wanted = licence or (file.suffix in _SIDE_FILES and not index)
        if wanted and file.is_file() and file.stat().st_size <= _LARGEST_SIDE_FILE:
            yield file


def copy_side_files(files: Sequence[Path], folder: Path) -> None:
    """Copies files into a folder, synced to the disk."""
    for file in files:
        write(folder / file.name, file.read_bytes())
