"""The folder in which a conversion is written: complete under its name, or not there at all.

A conversion to `NAME` works in `NAME.partial`, which contains

    content/       becomes NAME when it is complete
    journal.jsonl  first what is converted to what, then one line per finished part, with what the
                   writer needs to know about it at the end

The last step renames `content` to `NAME`. So a crash, Ctrl-C or a full disk leaves nothing that
could be mistaken for the result, and the same command continues after the last line of the journal.
A line is written once its part is on the disk; a line cut short by a crash is ignored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from dsjax.display import size
from dsjax.files import publish


class Staging:
    """Context for writing a conversion to `target`.

    Attributes:
      content: the folder to write into.
      finished: the parts that this or an earlier call has finished, and the note of each.
    """

    def __init__(
        self, target: Path, identity: Mapping[str, str | None], say: Callable[[str], None]
    ):
        """Starts a conversion, or continues one that was interrupted.

        Args:
          identity: everything that determines the bytes of the result, by its name in messages.
          say: shows the user a line.

        Raises:
          ValueError: another process is writing there, or the folder belongs to another
            conversion.
          OSError: the folder cannot be made or written.
        """
        self.target, self._say = target, say
        self._folder = partial_folder(target)
        self.content = self._folder / "content"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal = (self._folder / "journal.jsonl").open("a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._journal.close()
            raise ValueError(
                f"{self._folder} is in use by another process; wait for it, or name another folder"
            ) from error
        try:
            self.finished = self._resume(identity)
        except BaseException:
            self._journal.close()
            raise

    def _resume(self, identity: Mapping[str, str | None]) -> dict[str, Any]:
        self._journal.seek(0)
        lines, whole = [], 0
        for line in self._journal:
            if not line.endswith(b"\n"):
                break  # cut short by a crash
            lines.append(json.loads(line))
            whole += len(line)
        self._journal.truncate(whole)
        if lines and self.content.is_dir():
            changed = [
                f"{key} was {lines[0].get(key)}, now {value}"
                for key, value in identity.items()
                if lines[0].get(key) != value
            ]
            if changed:
                raise ValueError(
                    f"{self._folder} contains an unfinished conversion of something else: "
                    f"{'; '.join(changed)}; delete it to start over, or name another folder"
                )
            self._say(f"continuing after {len(lines) - 1:,} finished parts in {self._folder}")
            return {line["part"]: line["note"] for line in lines[1:]}
        self._journal.truncate(0)
        if self.content.exists():
            shutil.rmtree(self.content)
        self.content.mkdir()
        # Only now: a journal with an identity means that `content` belongs to it.
        self._append(identity)
        return {}

    def finish(self, part: str, note: Any = None) -> None:
        """Records that a part is on the disk, with a note that JSON can hold."""
        self._append({"part": part, "note": note})
        self.finished[part] = note

    def _append(self, line: object) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()

    def publish(self) -> None:
        """Renames the complete content to the target."""
        publish(self.content, self.target)
        self.discard()

    def discard(self) -> None:
        """Removes everything that was written."""
        shutil.rmtree(self._folder)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._journal.close()
        if isinstance(error, ValueError):
            self.discard()  # continuing from here would fail in the same way
        elif error is not None:
            self._say(
                f"stopped with {len(self.finished):,} finished parts in {self._folder}; the same "
                "command continues from there"
            )


class Converted(NamedTuple):
    """The work of one call, without that of interrupted calls before it."""

    tensors: int
    n_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = size(self.n_bytes / max(self.seconds, 1e-9))
        return f"{self.tensors:,} tensors, {size(self.n_bytes)} in {self.seconds:.1f} s, {rate}/s"


def partial_folder(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def check_target(target: Path, source: Path) -> None:
    """Raises ValueError if `target` cannot be created as a conversion of `source`."""
    if target == source or source in target.parents:
        raise ValueError(
            f"{target} is inside {source}, the folder to convert; name a folder elsewhere"
        )
    if os.path.ismount(target):
        raise ValueError(
            f"{target} is a mount point, which cannot be replaced; name a folder inside it"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} exists and is {'not empty' if target.is_dir() else 'a file'}; name a new or "
            "an empty folder"
        )


def check_space(target: Path, needed: int, remedy: str = "a narrower --dtype") -> None:
    """Raises ValueError if the disk of `target` has no room for a conversion of `needed` bytes.

    Bytes that an interrupted conversion has already written count as free.
    """
    existing = target
    while not existing.exists():
        existing = existing.parent
    written = sum(
        os.stat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(partial_folder(target))
        for name in names
    )
    room = shutil.disk_usage(existing).free + written
    if needed > room:
        raise ValueError(
            f"{target} needs {needed:,} bytes and there is room for {room:,}; free "
            f"{needed - room:,} bytes, choose another disk, or {remedy}"
        )


def fingerprint(files: Iterable[Path]) -> str:
    """Hashes names, sizes and modification times of files: a rewritten file changes the digest."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
