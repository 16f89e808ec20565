"""The reports of tools/checkpoint.py, made from manifests alone: no model is built, jax not
used."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.checkpoint import manifest
from dsjax.checkpoint.manifest import Damage, Manifest


def locate(path: Path) -> Path:
    """Finds the folder with the manifest: `path` itself, or the newest step if `path` is a run.

    Raises:
      ValueError: there is no such folder, or it is a published one.
    """
    if (path / "checkpoints").is_dir():
        steps = _steps(path)
        if not steps:
            raise ValueError(f"{path / 'checkpoints'} has no checkpoint yet")
        return steps[-1]
    if path.is_dir():
        if not (path / manifest.NAME).exists() and any(path.glob("*.safetensors")):
            raise ValueError(
                f"{path} is a Hugging Face folder, which has no manifest; tools/convert.py inspect "
                "counts its tensors, and import makes a folder of it that can be verified"
            )
        return path
    raise ValueError(f"{path} is not a folder; name a run, a step of one, or a converted folder")


def verify(path: Path) -> dict[str, Any]:
    """Checks every byte of a checkpoint.

    Returns:
      a summary for `describe`; its `fine` is true if the checkpoint is as it was written.

    Raises:
      ValueError: there is no checkpoint.
    """
    folder = locate(path)
    try:
        found = manifest.read(folder)
        problems = manifest.problems(folder, found)
    except Damage as error:
        return {"path": str(folder), "fine": False, "problems": [str(error)]}
    summary: dict[str, Any] = {
        "path": str(folder),
        "fine": not problems,
        "problems": problems,
        "step": found.record.get("step"),
        "arrays": len(found.leaves),
        "files": len(found.files),
        "bytes": sum(file.size for file in found.files.values()),
        "written": (folder / manifest.NAME).stat().st_mtime,
    }
    return summary


def survey(path: Path) -> dict[str, Any]:
    """Verifies every checkpoint of a run, and lists the damaged ones that were set aside.

    Raises:
      ValueError: it is not the folder of a run.
    """
    if not (path / "checkpoints").is_dir():
        raise ValueError(f"{path} has no folder checkpoints, so it is not the folder of a run")
    found = [verify(step) for step in _steps(path)]
    aside = sorted((path / "checkpoints").glob("*.damaged*"))
    found += [
        {"path": str(folder), "fine": False, "problems": ["was set aside, being damaged"]}
        for folder in aside
    ]
    return {"fine": all(entry["fine"] for entry in found), "checkpoints": found}


def compare(one: Path, other: Path) -> dict[str, Any]:
    """Compares the arrays and records of two checkpoints, as their manifests describe them.

    The arrays of runs are compared by fingerprint, which does not depend on how they were sharded
    or stored. Converted folders have no fingerprints: there the SHA-256 of the files is compared.

    Raises:
      ValueError: there is no checkpoint, or its manifest is damaged.
    """
    left, right = (manifest.read(locate(path)) for path in (one, other))
    arrays = _differences(_arrays(left), _arrays(right))
    record = _differences(_flat(left.record), _flat(right.record))
    lines = [f"array {name}: {what}" for name, what in arrays.items()]
    lines += [f"record {name}: {what}" for name, what in record.items()]
    return {"fine": not lines, "differences": lines}


def describe(found: Mapping[str, Any]) -> str:
    """Formats a summary of `verify`: one line, and one more per problem."""
    if "files" not in found:
        return f"{found['path']}  {'; '.join(found['problems'])}"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["written"]))
    state = "as it was written" if found["fine"] else f"DAMAGED in {len(found['problems'])} files"
    line = (
        f"{found['path']}  {found['arrays']} arrays, {found['files']:,} files, "
        f"{found['bytes']:,} bytes, {when}  {state}"
    )
    return "\n".join([line, *(f"  {problem}" for problem in found["problems"])])


def _steps(run: Path) -> list[Path]:
    folders = (run / "checkpoints").iterdir()
    numbered = [folder for folder in folders if folder.name.isdecimal() and folder.is_dir()]
    return sorted(numbered, key=lambda folder: int(folder.name))


def _arrays(found: Manifest) -> dict[str, Any]:
    files: dict[str, list[str]] = {}
    for name, file in found.files.items():
        files.setdefault(Path(name).parent.name, []).append(file.sha256)
    return {name: {"fingerprint": files.get(name), **leaf} for name, leaf in found.leaves.items()}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            found[name] = "only in the first" if name in one else "only in the second"
        elif one[name] != other[name]:
            found[name] = _change(one[name], other[name])
    return found


def _change(one: Any, other: Any) -> str:
    if isinstance(one, dict):
        keys = [key for key in ("dtype", "shape") if one[key] != other[key]]
        return "; ".join(f"{key} {one[key]} -> {other[key]}" for key in keys) or "other values"
    return f"{one} -> {other}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
