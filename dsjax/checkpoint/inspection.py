"""Summarizes what a checkpoint contains and what its config implies, from configs and headers
alone.

Tensors are counted as Hugging Face publishes them, for every kind of folder: one per layer and
expert, and one for the scales of each FP8 weight. Bytes are those of the tensors, without the
headers of the files. For a converted folder or a run, an MTP layer's copies of embedding and head
are not counted, because they are not stored twice there.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsjax import settings, tables
from dsjax.checkpoint import families, hub, names
from dsjax.checkpoint.beside import beside
from dsjax.checkpoint.families import family_for
from dsjax.checkpoint.families.sight import Part
from dsjax.checkpoint.gguf import is_gguf, refuse_overrides, require_package
from dsjax.checkpoint.hf_config import named_dtype, vision_of
from dsjax.checkpoint.hf_folder import (
    FLOAT32,
    FP8,
    Mismatches,
    check_kind,
    compare,
    is_hf,
    read_config,
    reconcile,
    scale_name,
    scale_shape,
)
from dsjax.checkpoint.tensor_files import open_folder
from dsjax.config import ModelConfig
from dsjax.files import MAX_LISTED, read_json

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INT64 = np.dtype(np.int64)
_STORED = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": np.dtype(np.float16)}


class Entry(NamedTuple):
    """A tensor as published."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Implied(NamedTuple):
    """What a config implies about a checkpoint."""

    family: str
    model: ModelConfig
    dtype: np.dtype  # of the weights, or with FP8 of the other weights
    block: tuple[int, int] | None  # rows and columns that share a scale, if weights are in FP8
    parts: Sequence[Part] = ()  # what a larger model has beside its language model


def summarize(
    path: Path, expect: bool, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Describes a checkpoint of any kind, as a JSON object.

    Args:
      path: a Hugging Face folder, a converted folder, the folder of a run or a GGUF file; with
        `expect` also a config.json.
      expect: count what the config implies, without looking at weights; otherwise count what is
        there, and compare.
      overrides: values of fields of a Hugging Face config.json, used instead of those in the file.

    Raises:
      ValueError: config or headers cannot be read.
    """
    path = hub.located(path, weights=not expect)
    if is_gguf(path):
        refuse_overrides(path, overrides)
        require_package()
        from dsjax.checkpoint.gguf import summary

        return summary.summarize(path)
    if expect:
        implied = implied_by(path, overrides)
        return _described(path, implied, list(published(implied)), None)
    if path.name == "config.json" and path.is_file():
        raise ValueError(f"{path} has no weights to count; add --expect, or name its folder")
    check_kind(path)
    return _inspect_hf(path, overrides) if is_hf(path) else _inspect_ours(path, overrides)


def implied_by(path: Path, overrides: Mapping[str, Any] | None = None) -> Implied:
    """Reads the config of a Hugging Face folder, a converted folder or a run.

    A run does not record a dtype to publish in, so bfloat16 is assumed.

    Raises:
      ValueError: the config cannot be read, or describes a model that is not supported.
    """
    path = path / "config.json" if path.is_dir() else path
    config = read_json(path)
    if "dsjax" in config:
        path = path.parent / "hf" / "config.json"
        config = read_json(path)
    if "model" in config and "model_type" not in config:
        model = settings.from_dict(config["model"], f"{path}: model", ModelConfig)
        return Implied(family_for(model), model, BFLOAT16, None)
    config, family, model, block = read_config(path, overrides)
    vision, sight = vision_of(config), families.find(family).sight
    parts = list(sight.parts(vision)) if sight and vision else []
    return Implied(family, model, _STORED[named_dtype(config)], block, parts)


def published(implied: Implied, *, copies: bool = True) -> Iterator[Entry]:
    """Yields every tensor of a model as DeepSeek publishes it, the copies in MTP layers on request.

    With `block`, linear weights are in FP8 with scales; the router's bias is always float32.
    """
    family, model, dtype, block, parts = implied
    for tensor in names.tensors(model, family):
        if tensor.is_copy and not copies:
            continue
        if tensor.quantized and block:
            yield Entry(tensor.name, FP8, tensor.shape)
            yield Entry(scale_name(tensor.name), FLOAT32, scale_shape(tensor.shape, block))
        else:
            plain = FLOAT32 if tensor.keep_float32 else dtype
            yield Entry(tensor.name, INT64 if tensor.integer else plain, tensor.shape)
    yield from (Entry(part.name, dtype, part.shape) for part in parts)


def _inspect_hf(path: Path, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        files = open_folder(path)
    except ValueError as error:
        no_weights = not any(path.glob("*.safetensors"))
        hint = "; with --expect the config alone is counted" if no_weights else ""
        raise ValueError(f"{error}{hint}") from None
    implied = implied_by(path, overrides)
    files = files.renamed(families.find(implied.family).canonical)
    model, left_out = reconcile(implied.model, implied.family, files)
    tensors = {name: info for name, info in files.tensors.items() if name not in left_out}
    also = beside(read_config(path / "config.json", overrides)[0], implied.family, tensors)
    if also:
        implied = implied._replace(parts=also.parts)
    of_language = {
        name: info for name, info in tensors.items() if not also or name not in also.names
    }
    _, mismatches = compare(model, implied.family, implied.block, of_language)
    if also:
        mismatches.missing.extend(also.missing)
        mismatches.wrong.extend(also.wrong)
    expected = list(published(implied._replace(model=model)))
    order = {entry.name: number for number, entry in enumerate(expected)}
    found = [Entry(info.name, info.dtype, info.shape) for info in tensors.values()]
    found.sort(key=lambda entry: order.get(entry.name, len(order)))
    summary = _described(path, implied, expected, found, mismatches)
    summary["found"] |= {
        "mtp_layers": model.n_mtp,
        "files": len(files.files),
        "file_bytes": sum(file.stat().st_size for file in files.files),
    }
    return summary


def _inspect_ours(path: Path, overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    # These import jax, which the rest of this module does not need.
    from dsjax.checkpoint.load import open_checkpoint
    from dsjax.checkpoint.weights import leaf_name, scales_name

    checkpoint = open_checkpoint(path, overrides)  # compares the arrays with the config
    weights = checkpoint.weights
    assert weights is not None, path
    found = []
    for tensor in names.tensors(checkpoint.model, checkpoint.family):
        if not tensor.is_copy:
            name = leaf_name(tensor)
            found.append(Entry(tensor.name, weights.leaves[name].dtype, tensor.shape))
            if weights.block and scales_name(name) in weights.leaves:
                scales = scale_shape(tensor.shape, weights.block)
                found.append(Entry(scale_name(tensor.name), FLOAT32, scales))
    implied = Implied(checkpoint.family, checkpoint.model, checkpoint.dtype, weights.block)
    summary = _described(path, implied, list(published(implied, copies=False)), found)
    summary["found"] |= {"mtp_layers": checkpoint.model.n_mtp}
    return summary


def _described(
    path: Path,
    implied: Implied,
    expected: Sequence[Entry],
    found: Sequence[Entry] | None,
    mismatches: Mismatches | None = None,
) -> dict[str, Any]:
    counted = expected if found is None else found
    sizes = {
        row.name: (math.prod(row.shape), row.path[0] == "mtp")
        for row in names.tensors(implied.model, implied.family)
        if not row.is_copy
    }
    seeing = sum(part.n_parameters for part in implied.parts if part.counts)
    return {
        "path": str(path),
        "family": implied.family,
        "model": dataclasses.asdict(implied.model),
        "dtype": implied.dtype.name,
        "block": list(implied.block) if implied.block else None,
        "total_params": sum(size for size, is_mtp in sizes.values() if not is_mtp) + seeing,
        "vision_params": seeing,  # of them
        "mtp_params": sum(size for size, is_mtp in sizes.values() if is_mtp),
        "tensor_count": len(counted),
        "total_bytes": sum(entry.n_bytes for entry in counted),
        "expected": _totals(expected) | {"mtp_layers": implied.model.n_mtp},
        "found": None if found is None else _totals(found),
        "tensors": _patterns(counted),
        **(mismatches or Mismatches([], [], []))._asdict(),
    }


def _totals(entries: Sequence[Entry]) -> dict[str, Any]:
    by_dtype: dict[str, list[Entry]] = {}
    for entry in entries:
        by_dtype.setdefault(entry.dtype.name, []).append(entry)

    def total(some: Iterable[Entry]) -> int:
        return sum(entry.n_bytes for entry in some)

    return {
        "tensor_count": len(entries),
        "total_bytes": total(entries),
        "scale_tensors": sum(entry.name.endswith("_scale_inv") for entry in entries),
        "dtypes": {
            name: {
                "tensors": len(some),
                "values": sum(math.prod(entry.shape) for entry in some),
                "bytes": total(some),
            }
            for name, some in sorted(by_dtype.items())
        },
    }


def _patterns(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Counts tensors that differ only in the number of their layer or expert together."""
    counts: dict[tuple[str, np.dtype, tuple[int, ...]], int] = {}
    for entry in entries:
        key = (re.sub(r"\.\d+(?=\.)", ".*", entry.name), entry.dtype, entry.shape)
        counts[key] = counts.get(key, 0) + 1
    return [
        {
            "name": name,
            "dtype": dtype.name,
            "shape": list(shape),
            "count": count,
            "bytes": count * Entry(name, dtype, shape).n_bytes,
        }
        for (name, dtype, shape), count in counts.items()
    ]


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the model, its tensors, expected and found totals, and mismatches."""
    if summary.get("format") == "gguf":
        from dsjax.checkpoint.gguf.summary import print_summary as print_gguf

        return print_gguf(summary, console)
    title = f"{summary['path']}: {summary['family']}"
    tables.print_values(console, title, summary["model"])
    columns = ("tensor", "dtype", "shape", ">count", ">bytes")
    rows = (
        [row[name.removeprefix(">")] for name in ("name", *columns[1:])]
        for row in summary["tensors"]
    )
    console.print(tables.table("tensors (weights are [out, in])", columns, rows, wraps="tensor"))
    console.print(_totals_table(summary))
    for kind in Mismatches._fields:
        lines = summary[kind]
        if not lines:
            continue
        console.rule(Text(f"{kind}: {len(lines):,}"), align="left")
        console.print(Text("\n".join(lines[:MAX_LISTED])))
        if len(lines) > MAX_LISTED:
            console.print(Text(f"... and {len(lines) - MAX_LISTED:,} more; --json has them all"))


def _totals_table(summary: Mapping[str, Any]) -> Table:
    expected, found = summary["expected"], summary["found"]
    sides = [expected] if found is None else [expected, found]
    columns = ["what", ">expected from the config", ">found"][: 1 + len(sides)]
    rows: list[list[object]] = [
        [what, *(side[key] for side in sides)]
        for what, key in (
            ("tensors", "tensor_count"),
            ("of these, scales", "scale_tensors"),
            ("bytes", "total_bytes"),
            ("MTP layers", "mtp_layers"),
        )
    ]
    for dtype in sorted({dtype for side in sides for dtype in side["dtypes"]}):
        sizes = (side["dtypes"].get(dtype, {"bytes": None})["bytes"] for side in sides)
        rows.append([f"bytes in {dtype}", *sizes])
    if found and "files" in found:
        rows.append(["files", "", found["files"]])
        rows.append(["bytes of the files, headers included", "", found["file_bytes"]])
    rows.append(["parameters of the main model", summary["total_params"]])
    if summary["vision_params"]:
        rows.append(["parameters of them that see and draw", summary["vision_params"]])
    if summary["mtp_params"]:
        rows.append(["parameters of the MTP layers, without copies", summary["mtp_params"]])
    return tables.table("totals", columns, rows)
