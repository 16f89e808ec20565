"""Describes a GGUF file from its header: keys, tensors, types, bytes, parameters."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from dsjax import tables
from dsjax.checkpoint.gguf.container import Container, Stored, read_header
from dsjax.checkpoint.gguf.types import bits

_LONG = 200  # characters of a value


def summarize(path: Path) -> dict[str, Any]:
    """Describes a file of any architecture, as a JSON object.

    Raises:
      ValueError: the file is not a whole GGUF file.
    """
    container = read_header(path)
    tensors = list(container.tensors.values())
    params = sum(math.prod(tensor.shape) for tensor in tensors)
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    return {
        "path": str(path),
        "format": "gguf",
        "version": container.version,
        "architecture": container.keys.get("general.architecture"),
        "keys": {key: _brief(value) for key, value in container.keys.items()},
        "total_params": params,
        "tensor_count": len(tensors),
        "total_bytes": n_bytes,
        "file_bytes": container.size,
        "bits_per_weight": 8 * n_bytes / max(params, 1),
        "types": _types(container),
        "tensors": _patterns(tensors),
    }


def _brief(value: Any) -> Any:
    """Returns a value, or for long ones what it is."""
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value):,} values: {', '.join(str(item)[:20] for item in value[:4])}, ..."
    if isinstance(value, str) and len(value) > _LONG:
        return f"{value[:_LONG]}... ({len(value):,} characters)"
    return value


def _types(container: Container) -> dict[str, dict[str, Any]]:
    found: dict[str, list[Stored]] = {}
    for tensor in container.tensors.values():
        found.setdefault(tensor.type.name, []).append(tensor)
    return {
        name: {
            "tensors": len(some),
            "values": sum(math.prod(tensor.shape) for tensor in some),
            "bytes": sum(tensor.n_bytes for tensor in some),
            "bits_per_weight": bits(some[0].type),
        }
        for name, some in sorted(found.items())
    }


def _patterns(tensors: list[Stored]) -> list[dict[str, Any]]:
    """Counts tensors that differ only in the number of their layer together."""
    counts: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    for tensor in tensors:
        name = re.sub(r"\.\d+(?=\.)", ".*", tensor.name)
        counts.setdefault((name, tensor.type.name, tensor.shape), []).append(tensor.n_bytes)
    return [
        {"name": name, "type": kind, "shape": list(shape), "count": len(of), "bytes": sum(of)}
        for (name, kind, shape), of in counts.items()
    ]


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints keys, tensors, and totals per type."""
    title = f"{summary['path']}: GGUF {summary['version']}, {summary['architecture']}"
    tables.print_values(
        console, title, {k: json.dumps(v, ensure_ascii=False) for k, v in summary["keys"].items()}
    )
    columns = ("tensor", "type", "shape", ">count", ">bytes")
    rows = [
        [row[name] for name in ("name", "type", "shape", "count", "bytes")]
        for row in summary["tensors"]
    ]
    console.print(tables.table("tensors (the last dimension varies fastest)", columns, rows))
    columns = ("type", ">tensors", ">values", ">bytes", ">bits per weight")
    rows = [
        [name, of["tensors"], of["values"], of["bytes"], f"{of['bits_per_weight']:.3g}"]
        for name, of in summary["types"].items()
    ]
    whole = [summary[key] for key in ("tensor_count", "total_params", "total_bytes")]
    rows.append(["all", *whole, f"{summary['bits_per_weight']:.3g}"])
    console.print(tables.table("types", columns, rows))
