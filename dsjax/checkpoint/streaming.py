"""Work on many tensors in threads, with a bound on the bytes that are held at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Enough to keep a disk busy through the conversion of the largest expert matrices.
BYTES_HELD = 1 << 30


def stream(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    n_bytes: Callable[[Item], int],
    *,
    limit: int = BYTES_HELD,
) -> Generator[Result, None, None]:
    """Yields `work(item)` for each item, in order, while threads work on the items after it.

    The items under way, waiting to be yielded, and the one the consumer has in hand take at most
    `limit` bytes together; one that is larger is worked on alone. If the work of an item raises, or
    the consumer stops, no other item is begun, and those under way end first.

    Args:
      n_bytes: bytes that the work of an item holds, its result included.
    """
    pool = ThreadPoolExecutor(max(4, os.cpu_count() or 1), thread_name_prefix="stream")
    waiting: deque[tuple[Future[Result], int]] = deque()
    held = 0
    try:
        for item in items:
            need = n_bytes(item)
            while waiting and held + need > limit:
                held -= waiting[0][1]
                # The consumer is done with it when it asks for the next one.
                yield waiting.popleft()[0].result()
            waiting.append((pool.submit(work, item), need))
            held += need
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)
