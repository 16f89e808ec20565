"""Checkpoints of a run: arrays and a JSON record, written while training continues.

This is the only module that knows Orbax. A checkpoint is a folder named after its step:

    <directory>/<step>/state           every array under its name: params.embed.weight, ...
    <directory>/<step>/manifest.json   the record (step, data position, versions, ...), and the
                                       hashes that prove arrays and files unchanged

While it is being written the folder is called `<step>.partial`, and the last step is to rename it,
so a crash leaves either a whole checkpoint or none. A numbered folder whose manifest does not match
has been damaged since. It is never used: it is renamed to `<step>.damaged`, and the newest intact
checkpoint takes its place.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from dsjax.checkpoint import fingerprint, manifest
from dsjax.checkpoint.manifest import Damage, File, Manifest
from dsjax.files import listed, read_json, sync_folder, write_json

# A larger array is stored matrix by matrix in chunks of at most this size, so that part of it can
# be read without reading all of it.
CHUNK_BYTES = 256 << 20

_STATE, _PARTIAL, _OLD = "state", ".partial", ".old"
_PATIENCE_MS = 3_600_000  # time for the slowest process to hash its share

# Orbax warns about folders that it did not create.
logging.getLogger("absl").addFilter(lambda line: "_CHECKPOINT_METADATA" not in line.getMessage())


class Store:
    """The checkpoints of one run, open for writing."""

    def __init__(self, directory: Path, *, keep: int):
        """Opens or creates `directory`, which keeps the newest `keep` checkpoints.

        The remains of an interrupted save or removal are deleted.

        Raises:
          OSError: the directory cannot be created or written.
        """
        self._directory, self._keep = directory.absolute(), keep
        self._there = set(steps(self._directory))
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        with _reporting_failure(f"cannot open the checkpoint folder {self._directory}"):
            self._directory.mkdir(parents=True, exist_ok=True)
            if not os.access(self._directory, os.W_OK | os.X_OK):
                raise PermissionError("it cannot be written")
            if jax.process_index() == 0:
                for left in self._directory.iterdir():
                    if left.name.endswith((_PARTIAL, _OLD)) and left.stem.isdecimal():
                        shutil.rmtree(left)
            self._checkpointer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts saving `state` (arrays) and `record` (JSON), and returns while they are written.

        The arrays are copied before this returns, so the next step may overwrite their buffers.

        Raises:
          ValueError: the state contains NaN or infinity; nothing is written.
          OSError: this checkpoint or the previous one cannot be written.
        """
        self.wait()  # one save at a time
        if step in self._there:
            return
        arrays = _plain(state)
        leaves = _describe_finite(step, state)
        folder = self._directory / f"{step}{_PARTIAL}"
        with _reporting_failure(f"cannot write the checkpoint of step {step} in {self._directory}"):
            self._checkpointer.save(
                folder / _STATE,
                args=ocp.args.StandardSave(  # pyright: ignore[reportCallIssue]
                    arrays,
                    save_args=jax.tree.map(_chunks, arrays),  # pyright: ignore[reportCallIssue]
                ),
                force=True,
            )
        self._thread = threading.Thread(
            target=self._finish, args=(step, folder, record, leaves), name="checkpoint"
        )
        self._thread.start()
        self._there.add(step)

    def _finish(
        self, step: int, folder: Path, record: dict[str, Any], leaves: dict[str, dict[str, Any]]
    ) -> None:
        """Runs in a thread: waits for Orbax, writes the manifest and renames the folder."""
        try:
            self._checkpointer.wait_until_finished()
            files = _hash_together(folder)
            if jax.process_index() == 0:
                manifest.write(folder, Manifest(record, leaves, files))
                # From here on it is a checkpoint.
                folder.rename(self._directory / str(step))
                sync_folder(self._directory)
                for old in steps(self._directory)[: -self._keep]:
                    self._remove(old)
        except BaseException as error:  # raised by `wait`
            self._failure = error

    def _remove(self, step: int) -> None:
        """Removes a checkpoint; after a crash, what remains of it no longer counts as one."""
        # Renamed before anything is deleted, so that no half-deleted folder carries a step's name.
        old = self._directory / f"{step}{_OLD}"
        (self._directory / str(step)).rename(old)
        shutil.rmtree(old)

    def wait(self) -> None:
        """Waits until the checkpoint that was started is complete.

        Raises:
          OSError: it cannot be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            with _reporting_failure(f"cannot finish a checkpoint in {self._directory}"):
                raise failure

    def close(self) -> None:
        """Waits, as `wait` does, and shuts down Orbax's threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


def steps(directory: Path) -> list[int]:
    """Lists the steps with a checkpoint in `directory`, ascending; contents are not checked."""
    return sorted(
        int(folder.name) for folder in _numbered(directory) if (folder / manifest.NAME).is_file()
    )


def latest(directory: Path) -> int | None:
    """Returns the newest step with a checkpoint, or None; contents are not checked."""
    return max(steps(directory), default=None)


def newest_whole(
    directory: Path,
    *,
    set_aside: bool = False,
    together: bool = True,
    say: Callable[[str], None],
) -> int | None:
    """Returns the newest step whose checkpoint is as it was written, every byte of it.

    Args:
      set_aside: rename the damaged checkpoints that are newer.
      together: whether all processes call this, and share out the files; else this one checks all.
      say: is told which checkpoints are skipped, and why.

    Returns:
      the step, or None if there is no checkpoint.

    Raises:
      ValueError: there are checkpoints, and all of them are damaged.
    """
    numbered = sorted(_numbered(directory), key=lambda folder: int(folder.name), reverse=True)
    passed: list[tuple[Path, str]] = []
    for folder in numbered:
        trouble = _trouble(folder, together)
        if trouble is None:
            break
        passed.append((folder, trouble))
    else:
        if numbered:
            raise ValueError(
                f"every checkpoint in {directory} is damaged, and training does not start over on "
                f"top of them: {listed([trouble for _, trouble in passed])}. Restore one from a "
                "copy, or use another --workdir to start over"
            )
        return None
    for bad, trouble in passed:
        aside = ""
        if set_aside and jax.process_index() == 0:
            aside = f" (it is now {_set_aside(bad).name})"
        say(
            f"{trouble}. The checkpoint of step {bad.name} is not used{aside}; using step "
            f"{folder.name}"
        )
    return int(folder.name)


def read_record(directory: Path, step: int) -> dict[str, Any]:
    """Reads the JSON record that was saved with `step`.

    Raises:
      Damage: the manifest is missing or damaged.
    """
    return manifest.read(directory.absolute() / str(step)).record


def restore(directory: Path, step: int, abstract_state: Any) -> Any:
    """Reads the arrays of `step`, bit for bit, into the structure of `abstract_state`, and checks
    them against the fingerprints taken before they were saved.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct, each with a sharding, which may differ from
        the one that the arrays were saved with.

    Raises:
      ValueError: names, shapes or dtypes differ from the checkpoint's; all of them are listed.
      Damage: the values are not those that were saved.
    """
    folder = directory.absolute() / str(step)
    leaves = manifest.read(folder).leaves
    wanted, structure = jax.tree_util.tree_flatten_with_path(abstract_state)
    _check_matches(folder, leaves, {".".join(_name(path)): leaf for path, leaf in wanted})
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / _STATE, _plain(abstract_state))
    found = {".".join(_name(path)): _lookup(restored, _name(path)) for path, _ in wanted}
    inspected = fingerprint.inspect(found).fingerprints
    if wrong := [name for name in found if inspected[name] != leaves[name]["fingerprint"]]:
        raise Damage(
            f"{folder}: {listed(wrong)} came back with other values than were saved, although the "
            "files are intact. Do not trust this machine's memory and disk: try another"
        )
    return jax.tree.unflatten(structure, list(found.values()))


def named_arrays(state: Any) -> dict[str, Any]:
    """Returns the arrays of a state by their names in a checkpoint: params.embed.weight, ..."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {".".join(_name(path)): leaf for path, leaf in leaves}


def _describe_finite(step: int, state: Any) -> dict[str, dict[str, Any]]:
    """Returns shape, dtype and fingerprint of each array of a state, by its name.

    Raises:
      ValueError: arrays contain NaN or infinity.
    """
    arrays = named_arrays(state)
    inspected = fingerprint.inspect(arrays)
    if inspected.not_finite:
        raise ValueError(
            f"after step {step} the state contains NaN or infinity in "
            f"{listed(inspected.not_finite)}; no checkpoint of it is written"
        )
    return {
        name: {
            "dtype": str(leaf.dtype),
            "shape": list(leaf.shape),
            "fingerprint": inspected.fingerprints[name],
        }
        for name, leaf in arrays.items()
    }


def _hash_together(folder: Path) -> dict[str, File]:
    """Hashes all files below a folder, each process a share; process 0 gets all hashes."""
    names, index, count = manifest.listing(folder), jax.process_index(), jax.process_count()
    own = manifest.hash_files(folder, names[index::count])
    if count == 1:
        return own
    # Processes exchange hashes through files: the folder is the one place that all of them see.
    parts = [folder / f"hashes.{process}.json" for process in range(count)]
    barrier = multihost.get_barrier_sync_fn()
    barrier(key=f"dsjax hashes of {folder.name}, listed", timeout_ms=_PATIENCE_MS)
    write_json(parts[index], {name: file._asdict() for name, file in own.items()})
    barrier(key=f"dsjax hashes of {folder.name}, written", timeout_ms=_PATIENCE_MS)
    if index:
        return own
    files = {}
    for part in parts:
        files |= {name: File(**entry) for name, entry in read_json(part).items()}
        part.unlink()
    if missing := sorted(set(names) - files.keys()):
        raise OSError(f"{folder}: not every process sees all files; one does not see {missing[0]}")
    return files


def _check_matches(folder: Path, stored: dict[str, dict[str, Any]], asked: dict[str, Any]) -> None:
    has = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in stored.items()}
    wants = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in asked.items()}
    problems = [f"missing {name} {wants[name]}" for name in wants.keys() - has.keys()]
    problems += [f"extra {name} {has[name]}" for name in has.keys() - wants.keys()]
    problems += [
        f"{name} is {has[name]}, wanted {wants[name]}"
        for name in wants.keys() & has.keys()
        if has[name] != wants[name]
    ]
    if problems:
        raise ValueError(
            f"the checkpoint {folder} does not fit this config in {len(problems)} arrays: "
            f"{'; '.join(sorted(problems))}; use the config it was written with"
        )


def _name(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Returns the name of a leaf: its keys, without the `.value` of an nnx variable."""
    keys = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    ]
    return tuple(keys[:-1] if keys[-1:] == ["value"] else keys)


def _plain(tree: Any) -> dict[str, Any]:
    """Converts a tree to nested dicts, so that restoring needs none of our classes."""
    plain: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *groups, last = _name(path)
        node = plain
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = leaf
    return plain


def _chunks(array: jax.Array) -> ocp.SaveArgs:
    if math.prod(array.shape) * array.dtype.itemsize <= CHUNK_BYTES:
        return ocp.SaveArgs()
    matrices = tuple(range(array.ndim - 2))  # the dimensions that index matrices
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=matrices)


def _lookup(tree: Any, name: tuple[str, ...]) -> Any:
    for key in name:
        tree = tree[key]
    return tree


def _numbered(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [folder for folder in directory.iterdir() if folder.name.isdecimal()]


def _trouble(folder: Path, together: bool) -> str | None:
    """Says what is wrong with a checkpoint, or None; each process checks a share of the files."""
    index, count = (jax.process_index(), jax.process_count()) if together else (0, 1)
    found: str | None = None
    try:
        whole = manifest.read(folder)
        if (step := whole.record.get("step", int(folder.name))) != int(folder.name):
            found = f"{folder} contains the checkpoint of step {step}"
        share = dict(list(whole.files.items())[index::count])
        found = "; ".join(manifest.problems(folder, whole._replace(files=share))) or found
    except Damage as error:
        found = str(error)
    if count > 1:
        bad = np.asarray(multihost_utils.process_allgather(np.int32(found is not None)))
        if found is None and bad.any():
            found = f"{folder} is damaged, according to process {int(bad.argmax())}"
    return found


def _set_aside(folder: Path) -> Path:
    target = folder.with_name(f"{folder.name}.damaged")
    for attempt in range(2, 1000):
        if not target.exists():
            break
        target = folder.with_name(f"{folder.name}.damaged-{attempt}")
    return folder.rename(target)


@contextlib.contextmanager
def _reporting_failure(what: str) -> Iterator[None]:
    """Turns the errors of Orbax and TensorStore, on a full or read-only disk, into one OSError."""
    try:
        yield
    except Exception as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(
            f"{what}: {cause}; free space there or make it writable, then run the same command "
            "again: it resumes from the newest whole checkpoint"
        ) from error
