"""The folder in which a conversion is written: whole under its name, or not there at all.

A conversion to `NAME` works in `NAME.partial`, which holds

    content/       what becomes NAME when it is complete
    journal.jsonl  first what is converted to what, then a line for each part that is finished, with
                   what its writer wants to know of it at the end

The last act is to rename `content` to `NAME`, so a crash, Ctrl-C or a full disk leaves nothing that
could be taken for the result, and the same command again goes on after the last line of the
journal. A line is written when its part is on the disk, and a line that a crash cut short counts as
not written.
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
    """Context in which a conversion to `target` is written.

    Attributes:
      content: the folder to write into.
      finished: the parts that this or an earlier call has finished, and what was noted of each.
    """

    def __init__(
        self, target: Path, identity: Mapping[str, str | None], say: Callable[[str], None]
    ):
        """Begins a conversion, or takes up the one that was interrupted.

        Args:
          identity: what decides the bytes of the result, by what to call it in a message.
          say: tells the user a line.

        Raises:
          ValueError: another process is writing there, or what is left there is of another
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
                break
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
                    f"{self._folder} holds what is left of another conversion: "
                    f"{'; '.join(changed)}; delete it to begin again, or name another folder"
                )
            self._say(f"going on after {len(lines) - 1:,} finished parts in {self._folder}")
            return {line["part"]: line["note"] for line in lines[1:]}
        self._journal.truncate(0)
        if self.content.exists():
            shutil.rmtree(self.content)
        self.content.mkdir()
        self._append(identity)
        return {}

    def finish(self, part: str, note: Any = None) -> None:
        """Notes that a part is on the disk, and a JSON value with it."""
        self._append({"part": part, "note": note})
        self.finished[part] = note

    def _append(self, line: object) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()

    def publish(self) -> None:
        """Gives the complete content its name."""
        publish(self.content, self.target)
        self.discard()

    def discard(self) -> None:
        """Removes what was written."""
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
            self.discard()  # to go on from here would fail in the same way
        elif error is not None:
            self._say(
                f"stopped with {len(self.finished):,} finished parts in {self._folder}; the same "
                "command goes on from there"
            )


class Converted(NamedTuple):
    """What one call has done; what an interrupted one had done before it is not counted."""

    tensors: int
    n_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = size(self.n_bytes / max(self.seconds, 1e-9))
        return f"{self.tensors:,} tensors, {size(self.n_bytes)} in {self.seconds:.1f} s, {rate}/s"


def partial_folder(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def check_target(target: Path, source: Path) -> None:
    """Raises ValueError if `target` cannot become the name of something new made from `source`."""
    if target == source or source in target.parents:
        raise ValueError(
            f"{target} lies inside {source}, which is converted; name a folder elsewhere"
        )
    if os.path.ismount(target):
        raise ValueError(
            f"{target} is a mount point, which cannot be replaced; name a folder in it"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} exists and is {'not empty' if target.is_dir() else 'a file'}; name a new or "
            "an empty folder"
        )


def check_space(target: Path, needed: int) -> None:
    """Raises ValueError if the disk of `target` has no room for the `needed` bytes of a conversion,
    of which an interrupted one may have written a part."""
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
            f"{needed - room:,} bytes, choose another disk, or a narrower --dtype"
        )


def fingerprint(files: Iterable[Path]) -> str:
    """A digest of names, sizes and times of files: it changes when one of them is written again."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files):
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()
