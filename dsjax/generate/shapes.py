"""The sizes of batches, caches and chunks: few, because each combination is another program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dsjax.config import ModelConfig

# Of a cache: a server's requests differ in length, and each length is another program.
_MIN_LENGTH, _MIN_LENGTH_ALONE = 256, 128
_FEWEST_ROWS = 32  # fewer take hardly less time, and each number of rows is another program
# Of `few_shapes`: a cache, one that is not divided further, newcomers, a chunk.
_SHORTEST, _SHORT, _NEWCOMERS, _SMALLEST = 512, 1024, 4, 64


def cache_length(
    config: ModelConfig, needed: int, *, chunk: int, n_drafts: int, streaming: bool = True
) -> int:
    """Chooses the length of a cache for texts of up to `needed` tokens.

    It is a power of two, so that few programs are compiled, but no more than the model's longest
    text takes. Either way whole chunks fit, and drafts beyond the end of the text.

    Args:
      streaming: whether requests of any length may come; see `Engine`.
    """
    whole_chunks = -(-(config.max_seq_len + n_drafts) // chunk) * chunk
    least = _MIN_LENGTH if streaming else _MIN_LENGTH_ALONE
    return min(max(power_of_two(needed + n_drafts), least), whole_chunks)


def fewer_rows(n_rows: int, batch_parts: int) -> int:
    """Returns the next number of rows that a closed batch may go on with when no more are left of
    it, three quarters or two thirds of `n_rows`: a power of two or one and a half times one; 0 if
    there is none.
    """
    most = n_rows * 3 // 4
    power = power_of_two(most + 1) // 2
    fewer = power * 3 // 2 if power * 3 // 2 <= most else power
    fewer += -fewer % batch_parts
    return fewer if _FEWEST_ROWS <= fewer < n_rows else 0


class Shapes(NamedTuple):
    """The only sizes that occur in a service, ascending, so that it can compile every program
    before the first request comes.
    """

    rows: tuple[int, ...]  # of a batch
    newcomers: tuple[int, ...]  # of these: of prompts that run together
    lengths: tuple[int, ...]  # of a cache
    chunks: tuple[int, ...]  # of prompts

    def shrunk(self, n_rows: int, n_open: int) -> int:
        """Returns the number of rows with which a batch goes on of which `n_open` are left: fewer
        if half of these are enough, so that a newcomer does not make it grow again at once.
        """
        enough = [size for size in self.rows if n_open <= max(size // 2, 1)]
        return min([n_rows, *enough])

    def sources(self, n_rows: int, length: int) -> Iterator[tuple[int, int]]:
        """Yields the sizes of the caches whose rows may move into one of this size: newcomers', and
        that of a batch that grows or shrinks.
        """
        takes_newcomers = 1 < n_rows <= self.newcomers[-1]  # a single row is full
        for other_length in self.lengths:
            for other in self.rows:
                longer = other_length < length and n_rows > 1
                if longer or (other_length == length and (other != n_rows or takes_newcomers)):
                    yield other, other_length


def few_shapes(
    config: ModelConfig, *, max_batch: int, batch_parts: int, chunk: int, n_drafts: int
) -> Shapes:
    """Chooses powers of four as numbers of rows and as chunks, and lengths of caches that are about
    eight times as long as the one before.

    A few prompts at a time fill the devices; more would keep the running batch waiting.
    """
    rows = {min(4**power, max_batch) for power in range(max_batch.bit_length())}
    rows = sorted({n_rows + -n_rows % batch_parts for n_rows in rows})
    lengths = [-(-(config.max_seq_len + n_drafts) // chunk) * chunk]
    while lengths[0] > max(_SHORT, 2 * chunk):
        shorter = max(lengths[0] // 8, _SHORTEST)
        lengths.insert(0, shorter + -shorter % chunk)
    chunks = {max(chunk >> 2 * power, min(_SMALLEST, chunk)) for power in range(chunk.bit_length())}
    return Shapes(
        rows=tuple(rows),
        newcomers=tuple(n_rows for n_rows in rows if n_rows <= max(_NEWCOMERS, rows[0])),
        lengths=tuple(lengths),
        chunks=tuple(sorted(chunks)),
    )


def fit(needed: int, sizes: Sequence[int]) -> int:
    """Returns the smallest of the ascending sizes that is enough, else the largest."""
    return next((size for size in sizes if size >= needed), sizes[-1])


def power_of_two(at_least: int) -> int:
    return 1 << max(at_least - 1, 0).bit_length()
