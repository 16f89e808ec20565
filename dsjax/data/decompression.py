"""Opens files for reading, decompressed as the suffix says: .gz, .bz2, .xz or .zst."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Context that yields a stream of the file's bytes, decompressed.

    Raises:
      ValueError: the file is damaged or cut short, or a package is missing.
      OSError: it cannot be read.
    """
    suffix = os.path.splitext(path.lower())[1]
    stream: Any
    if suffix == ".gz":
        stream = gzip.open(path, "rb")
    elif suffix == ".bz2":
        stream = bz2.open(path, "rb")
    elif suffix == ".xz":
        stream = lzma.open(path, "rb")
    elif suffix == ".zst":
        stream = io.BufferedReader(_ZstdReader(path), 1 << 20)
    else:
        stream = open(path, "rb")
    with stream:
        try:
            yield cast(BinaryIO, stream)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            # gzip and bz2 report damage as an OSError that no system call has made.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(
                f"{path} is damaged or cut short ({error}); copy it again, or rename it if it is "
                f"not {suffix}"
            ) from error


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames and, unlike zstandard's own reader, notices a file cut short."""

    def __init__(self, path: str) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(f"reading {path} needs zstandard: pip install zstandard") from error
        self._path = path
        self._file = open(path, "rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._failure = zstandard.ZstdError
        self._frame: Any = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(1 << 17)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last frame is not complete")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self) -> None:
        self._frame = self._frame or self._new_frame()
        try:
            self._ready = memoryview(self._frame.decompress(self._compressed))
        except self._failure as error:
            raise EOFError(str(error)) from error
        self._compressed = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None

    def close(self) -> None:
        self._file.close()
        super().close()
