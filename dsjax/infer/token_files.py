"""Token ids in and arrays out as .npy files, for exact comparisons with other programs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np

from dsjax import files


def read_tokens(path: Path, vocab_size: int, *, max_length: int) -> np.ndarray:
    """Reads a .npy of token ids.

    Args:
      max_length: the longest row that the model takes (model.max_seq_len).

    Returns:
      int32 [batch, length].

    Raises:
      ValueError: the file is not a .npy of integers [batch, length], is empty, has rows that are
        too long or ids that the model lacks, or holds Python objects, which could execute code.
      OSError: the file cannot be read.
    """
    tokens = read_array(path, "token ids", "an integer array [batch, length]")
    if tokens.dtype.kind not in "iu" or tokens.ndim != 2 or not tokens.size:
        raise ValueError(
            f"{path} holds {tokens.dtype} of shape {tokens.shape}; token ids are integers of shape "
            "[batch, length], neither of them 0"
        )
    if tokens.shape[1] > max_length:
        raise ValueError(
            f"{path}: rows of {tokens.shape[1]} tokens exceed the model's context of {max_length} "
            "(model.max_seq_len); cut them into shorter rows"
        )
    outside = (tokens < 0) | (tokens >= vocab_size)
    if outside.any():
        row, column = (int(i) for i in np.argwhere(outside)[0])
        raise ValueError(
            f"{path}: token [{row}, {column}] is {tokens[row, column]}, one of "
            f"{int(outside.sum())} ids outside the model's 0 to {vocab_size - 1}; encode the text "
            "with the checkpoint's own tokenizer"
        )
    return tokens.astype(np.int32)


def read_array(path: Path, what: str, form: str) -> np.ndarray:
    """Reads a .npy file.

    Args:
      what, form: what it should hold, and as what array, for messages.

    Raises:
      ValueError: it is no .npy file, or holds Python objects.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            # NumPy asks a file where it is, which a pipe cannot tell.
            source = file if file.seekable() else io.BytesIO(file.read())
            # Read whole rather than memory-mapped: a truncated file must fail now.
            return np.lib.format.read_array(source, allow_pickle=False)
        except Exception as error:  # NumPy evaluates the header, which is Python text
            raise ValueError(
                f"{path} is not a .npy file of {what} ({error}); write it with "
                f"numpy.save(path, array), array {form}"
            ) from error


class ArrayWriter:
    """Writes a .npy piece by piece, so that the whole array is never in memory.

    What was at `path` before stays until the block ends without an error (see files.replacing).
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._left = int(np.prod(shape, dtype=np.int64))
        self._open = contextlib.ExitStack()

    def __enter__(self) -> ArrayWriter:
        self._file = self._open.enter_context(files.replacing(self.path))
        self._open.push(self._check_whole)  # runs first, so that it can keep the file from its name
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": self.shape,
        }
        np.lib.format.write_array_header_1_0(self._file, header)
        return self

    def write(self, piece: np.ndarray) -> None:
        """Appends elements, in C order."""
        assert piece.dtype == self.dtype and piece.size <= self._left
        self._left -= piece.size
        self._file.write(np.ascontiguousarray(piece).data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _check_whole(self, kind: type[BaseException] | None, *_: object) -> None:
        assert kind is not None or self._left == 0, f"{self.path} lacks {self._left} elements"


def check_outputs(outputs: Iterable[Path | None], *sources: Path) -> None:
    """Raises ValueError if a file cannot be written (see files.check_writable), or if one name is
    meant for two, of which the sources are read.
    """
    taken = {source.resolve() for source in sources}
    for path in filter(None, outputs):
        files.check_writable(path)
        if path.resolve() in taken:
            raise ValueError(
                f"{path} is named twice, among the files to read and to write; name each once"
            )
        taken.add(path.resolve())
