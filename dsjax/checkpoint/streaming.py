"""Processes many tensors in threads while bounding the bytes held at any time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Enough to keep a disk busy while the largest expert matrices are converted.
BYTES_HELD = 1 << 30


def stream(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    n_bytes: Callable[[Item], int],
    *,
    limit: int = BYTES_HELD,
) -> Generator[Result, None, None]:
    """Yields `work(item)` for each item, in order, while threads work on later items.

    Items being processed, results waiting to be yielded, and the result that the consumer holds use
    at most `limit` bytes together; an item that is larger is processed alone. If the work of an
    item raises, or the consumer stops, no further item is started, and running ones finish first.

    Args:
      n_bytes: returns the bytes that the work of an item holds, including its result.
    """
    pool = ThreadPoolExecutor(max(4, os.cpu_count() or 1), thread_name_prefix="stream")
    waiting: deque[tuple[Future[Result], int]] = deque()
    held = 0
    try:
        for item in items:
            need = n_bytes(item)
            while waiting and held + need > limit:
                held -= waiting[0][1]
                # By asking for the next result the consumer has released the previous one.
                yield waiting.popleft()[0].result()
            waiting.append((pool.submit(work, item), need))
            held += need
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)
