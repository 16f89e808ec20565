"""Known beginnings of prompts on disk: a context cache that outlives memory and restarts.

A page of cache entries (dsjax/generate/prefixes.py) becomes a file when it is new in memory. Its
name is a hash of all tokens up to its end, of whose text it is, and of what its entries depend on
besides: the weights and the layout of the cache. A prompt is looked up by the names that its pages
would have, so no file of other weights is ever read, and files hold no tokens.

One thread writes and one reads; whoever runs the model waits for neither. The files that were used
longest ago make room for new ones, those of other weights too. A file that is not what its name
says, by a checksum over both, is removed. Once the disk fails, nothing more is written.

The idea: DeepSeek's context cache on disk (api-docs.deepseek.com, "Context Caching").
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

_logger = logging.getLogger(__name__)
_MAGIC = b"dsjax page 1\n"
_DIGEST = 16  # bytes of a checksum
_NAME = re.compile(r"[0-9a-f]{64}\.page")
_MOST_UNWRITTEN = 256  # pages; what comes while the disk is as far behind is not kept


class Fetched(NamedTuple):
    """Pages of a prompt that come from disk.

    Attributes:
      first: the place of the first one in the prompt, counted in pages.
      pages: their bytes.
    """

    first: int
    pages: Future[list[bytes]]


class PageFiles:
    """The page files of a folder. Its methods return at once, except `close`.

    A file's bytes are what `write` was given; the caller knows their form.
    """

    def __init__(self, folder: Path, *, n_bytes: int, fingerprint: str) -> None:
        """Opens the folder's part of ours, `pages`, which it makes if need be, for this user alone.

        A folder that cannot be used is reported in the log, and nothing is kept.

        Args:
          n_bytes: how many bytes the files may have together.
          fingerprint: of all that entries depend on besides tokens.
        """
        self._folder, self._n_bytes = folder / "pages", n_bytes
        self._root = hashlib.sha256(fingerprint.encode()).digest()
        self._lock = threading.Lock()
        self._sizes: OrderedDict[str, int] = OrderedDict()  # the least recently used file first
        self._used = 0
        self._unwritten: set[str] = set()  # names that the writing thread has yet to come to
        self._failed = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="pages-write")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="pages-read")
        try:
            self._open()
        except OSError as error:
            self._fail(error)

    def names(self, tokens: Sequence[int], owner: str, page: int) -> list[str]:
        """Returns the names of a text's whole pages.

        Args:
          owner: whose text it is and the form of its pages; no other owner's have these names.
          page: tokens of a page.
        """
        digest = hashlib.sha256(self._root + owner.encode()).digest()
        names = []
        for end in range(page, len(tokens) + 1, page):
            own = np.asarray(tokens[end - page : end], "<i4").tobytes()
            digest = hashlib.sha256(digest + own).digest()
            names.append(f"{digest.hex()}.page")
        return names

    def known(self, names: Sequence[str]) -> int:
        """Counts the files that there are, from the first name on, and marks them as used."""
        with self._lock:
            count = next((n for n, name in enumerate(names) if name not in self._sizes), len(names))
            for name in reversed(names[:count]):  # a text's end goes before its beginning
                self._sizes.move_to_end(name)
        return count

    def missing(self, names: Sequence[str]) -> list[int]:
        """Returns the places of the names that have no file, none if nothing more is written."""
        with self._lock:
            if self._failed or len(self._unwritten) > _MOST_UNWRITTEN:
                return []
            return [
                place
                for place, name in enumerate(names)
                if name not in self._sizes and name not in self._unwritten
            ]

    def read(self, names: Sequence[str]) -> Future[list[bytes]]:
        """Reads files, up to the first that is damaged or gone."""
        return self._reader.submit(self._read, names)

    def write(self, names: Sequence[str], make: Callable[[], Sequence[bytes]]) -> None:
        """Writes files.

        Args:
          make: returns their bytes, in the thread that writes.
        """
        with self._lock:
            self._unwritten.update(names)
        self._writer.submit(self._write, names, make)

    def close(self) -> None:
        """Ends the threads, once what is to be written is."""
        self._writer.shutdown()
        self._reader.shutdown(cancel_futures=True)

    def _open(self) -> None:
        self._folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._folder.chmod(0o700)
        found = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".page.new"):  # half written when a server was killed
                os.unlink(entry.path)
            elif _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                stat = entry.stat()
                found.append((stat.st_mtime_ns, entry.name, stat.st_size))
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self._used += size
        self._make_room(0)

    def _read(self, names: Sequence[str]) -> list[bytes]:
        found: list[bytes] = []
        for name in names:
            path = self._folder / name
            try:
                data = path.read_bytes()
                os.utime(path)  # for the order of use after a restart
            except OSError:
                self._forget(name)
                break
            payload = data[len(_MAGIC) + _DIGEST :]
            if data[: len(_MAGIC) + _DIGEST] != _head(name, payload):
                _logger.warning("%s is damaged or of something else; it is removed", path)
                self._forget(name)
                break
            found.append(payload)
        return found

    def _write(self, names: Sequence[str], make: Callable[[], Sequence[bytes]]) -> None:
        try:
            if not self._failed:
                for name, payload in zip(names, make(), strict=True):
                    self._write_one(name, payload)
        except OSError as error:
            self._fail(error)
        finally:
            with self._lock:
                self._unwritten.difference_update(names)

    def _write_one(self, name: str, payload: bytes) -> None:
        data = _head(name, payload) + payload
        if len(data) > self._n_bytes:
            return
        self._make_room(len(data))
        path, new = self._folder / name, self._folder / f"{name}.new"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
            os.replace(new, path)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        with self._lock:
            self._sizes[name] = len(data)
            self._used += len(data)

    def _make_room(self, size: int) -> None:
        while True:
            with self._lock:
                if not self._sizes or self._used + size <= self._n_bytes:
                    return
                oldest = next(iter(self._sizes))
            self._forget(oldest)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._used -= self._sizes.pop(name, 0)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink(missing_ok=True)

    def _fail(self, error: OSError) -> None:
        self._failed = True
        _logger.warning(
            "the context cache in %s takes no more: %s; prompts are answered without it",
            self._folder.parent,
            error,
        )


def _head(name: str, payload: bytes) -> bytes:
    checksum = hashlib.blake2b(payload, digest_size=_DIGEST, key=bytes.fromhex(name[:64]))
    return _MAGIC + checksum.digest()
