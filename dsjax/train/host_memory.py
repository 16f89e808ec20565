"""Memory of a CPU's steps: freed pages stay with the process.

A step's temporaries are some large blocks. glibc maps each from the system and gives it back when
the step ends, so every step touches new pages, and the kernel clears them one fault at a time: up
to a quarter of the time of a small model's step.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("nvidiactl", "kfd", "accel*", "vfio/*")  # in /dev: NVIDIA, AMD, TPU


def keep_freed() -> None:
    """Makes the allocator of this process keep what it frees, if steps will run on the CPU.

    To be called before JAX starts its threads, whose allocations it could not steer any more. The
    process then holds the most memory that it ever needed at once. Does nothing without glibc.
    """
    if not _on_cpu() or sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_MAX, 0)  # large blocks come from the heap
        libc.mallopt(_TRIM_THRESHOLD, -1)  # whose end is never given back
        libc.mallopt(_ARENA_MAX, 1)  # and all threads share it


def _on_cpu() -> bool:
    # JAX itself knows only after it has started.
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(any(Path("/dev").glob(pattern)) for pattern in _ACCELERATORS)
