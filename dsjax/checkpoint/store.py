"""Checkpoints of a run: the arrays of its state and a JSON record, written while it goes on.

The only module that knows Orbax. A checkpoint is a folder named after its step,

    <directory>/<step>/state    every array under its name: params.embed.weight, ...
    <directory>/<step>/record   JSON: step, data position, versions, ...

which Orbax writes under another name and renames when it is complete, so that a crash leaves either
a whole checkpoint or none. A folder that is not whole all the same (an interrupted copy, an empty
folder) is never taken for a checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

_WHOLE = (  # what Orbax leaves in each complete checkpoint, its commit marks last
    "_CHECKPOINT_METADATA",
    "state/_METADATA",
    "state/manifest.ocdbt",
    "state/commit_success.txt",
    "record/metadata",
    "record/commit_success.txt",
    "commit_success.txt",
)

# A larger array is stored matrix by matrix, in chunks of at most this size, so that a part of it
# can be read without the whole.
CHUNK_BYTES = 256 << 20

# Orbax warns that `state` alone, read as a checkpoint, lacks a file of the step's folder.
logging.getLogger("absl").addFilter(lambda line: "_CHECKPOINT_METADATA" not in line.getMessage())


class Store:
    """The checkpoints of one run, open for writing.

    Attributes:
      set_aside: folders named like a checkpoint but not whole, now called `<step>.incomplete`.
    """

    def __init__(self, directory: Path, *, keep: int):
        """Opens or makes `directory`, in which the newest `keep` checkpoints stay.

        Raises:
          OSError: the directory cannot be made or written.
        """
        self._directory = directory.absolute()
        with _reporting_failure(f"cannot open the checkpoint folder {self._directory}"):
            self._directory.mkdir(parents=True, exist_ok=True)
            # Orbax takes any folder with a number for a name for a checkpoint.
            self.set_aside = [
                _set_aside(folder) if jax.process_index() == 0 else folder
                for folder in _numbered(self._directory)
                if not _is_whole(folder)
            ]
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, cleanup_tmp_directories=True
                ),
            )

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts to save `state` (arrays) and `record` (JSON), and returns while it is written.

        The arrays are copied before this returns: the next step may overwrite their buffers.

        Raises:
          OSError: this checkpoint, or the one before it, cannot be written.
        """
        if step in self._manager.all_steps():
            return
        arrays = _plain(state)
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(  # pyright: ignore[reportCallIssue]
                arrays,
                save_args=jax.tree.map(_chunks, arrays),  # pyright: ignore[reportCallIssue]
            ),
            record=ocp.args.JsonSave(record),  # pyright: ignore[reportCallIssue]
        )
        with _reporting_failure(f"cannot write the checkpoint of step {step} in {self._directory}"):
            self._manager.save(step, args=arguments, force=True)

    def wait(self) -> None:
        """Returns when each checkpoint that was started is complete.

        Raises:
          OSError: one of them cannot be written.
        """
        with _reporting_failure(f"cannot finish a checkpoint in {self._directory}"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, as `wait` does, and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def steps(directory: Path) -> list[int]:
    """The steps whose checkpoints in `directory` are whole, ascending."""
    return sorted(int(folder.name) for folder in _numbered(directory) if _is_whole(folder))


def latest(directory: Path) -> int | None:
    """The newest step that has a whole checkpoint in `directory`; None if there is none."""
    return max(steps(directory), default=None)


def read_record(directory: Path, step: int) -> dict[str, Any]:
    """Reads the JSON record that was saved with `step`."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        return checkpointer.restore(directory.absolute() / str(step) / "record")


def restore(directory: Path, step: int, abstract_state: Any) -> Any:
    """Reads the arrays of `step`, bit for bit, into the shape of `abstract_state`.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct, each with its sharding, which may differ from
        the one the arrays were saved from.

    Raises:
      ValueError: names, shapes or dtypes differ from the checkpoint's; all of them are listed.
    """
    folder = directory.absolute() / str(step) / "state"
    wanted, structure = jax.tree_util.tree_flatten_with_path(abstract_state)
    with ocp.StandardCheckpointer() as checkpointer:
        _check_matches(folder, checkpointer.metadata(folder).item_metadata.tree, wanted)
        restored = checkpointer.restore(folder, _plain(abstract_state))
    return jax.tree.unflatten(structure, [_lookup(restored, _name(path)) for path, _ in wanted])


def _check_matches(folder: Path, stored_tree: Any, wanted: list[tuple[Any, Any]]) -> None:
    stored = {
        _name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(stored_tree)[0]
    }
    asked = {_name(path): leaf for path, leaf in wanted}
    problems = [
        f"missing {'.'.join(name)} {_describe(asked[name])}"
        for name in asked.keys() - stored.keys()
    ]
    problems += [
        f"extra {'.'.join(name)} {_describe(stored[name])}" for name in stored.keys() - asked.keys()
    ]
    problems += [
        f"{'.'.join(name)} is {_describe(stored[name])}, wanted {_describe(asked[name])}"
        for name in asked.keys() & stored.keys()
        if _describe(asked[name]) != _describe(stored[name])
    ]
    if problems:
        raise ValueError(
            f"the checkpoint {folder} does not fit this config in {len(problems)} arrays: "
            f"{'; '.join(sorted(problems))}; use the config it was written with"
        )


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _name(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The name of a leaf: its keys, without the `.value` between an nnx variable and its array."""
    keys = [
        str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path
    ]
    return tuple(keys[:-1] if keys[-1:] == ["value"] else keys)


def _plain(tree: Any) -> dict[str, Any]:
    """Nested dicts of the leaves, so that a checkpoint needs none of our classes."""
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
    matrices = tuple(range(array.ndim - 2))  # the dimensions in front of them
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=matrices)


def _lookup(tree: Any, name: tuple[str, ...]) -> Any:
    for key in name:
        tree = tree[key]
    return tree


def _numbered(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [folder for folder in directory.iterdir() if folder.name.isdecimal()]


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _WHOLE)


def _set_aside(folder: Path) -> Path:
    target = folder.with_name(f"{folder.name}.incomplete")
    for attempt in range(2, 1000):
        if not target.exists():
            break
        target = folder.with_name(f"{folder.name}.incomplete-{attempt}")
    return folder.rename(target)


@contextlib.contextmanager
def _reporting_failure(what: str) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise on a full disk or a closed folder into one OSError."""
    try:
        yield
    except Exception as error:
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise OSError(
            f"{what}: {cause}; free space there or make it writable, then run the same command "
            "again: it resumes from the newest whole checkpoint"
        ) from error
