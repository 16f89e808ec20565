"""Kills conversions at chosen points, as a power cut might, and leaves what is then on the disk.

A conversion's acts on the disk are counted, and it is killed before the act of the point's number;
a point below zero counts from the last act. `kill_at` starts this file as a program: one process
pays for the imports and forks for each point, which pytest's, with jax's threads, must not do.
"""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ACTS = ("fsync", "rename", "replace", "rmdir")


def kill_at(convert: Callable[..., Any], source: Path, target: Path, points: list[int]) -> None:
    """Converts once undisturbed, to `target` + "0", and once for each of the points, to `target` +
    the point, killed there.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tests.checkpoint.kill_points"]
    what = [convert.__module__, convert.__name__, str(source), str(target), *map(str, points)]
    subprocess.run([*command, *what], check=True, cwd=ROOT)


class Counter:
    """Counts calls of functions, and kills the process before the call of number `limit`."""

    def __init__(self) -> None:
        self.count, self.limit, self._lock = 0, 0, threading.Lock()

    def counted(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                self.count += 1
                if self.count == self.limit:
                    os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **keywords)

        return wrapper


def main(module: str, function: str, source: str, target: str, *points: str) -> None:
    from rich.console import Console

    from dsjax.display import Transfer

    convert = getattr(importlib.import_module(module), function)
    progress = Transfer(Console(file=io.StringIO()))
    acts = Counter()
    for name in ACTS:
        setattr(os, name, acts.counted(getattr(os, name)))
    read, write = os.pipe()

    def run(point: str) -> int:
        """Converts in a child; returns how that ended."""
        if not (child := os.fork()):
            convert(Path(source), Path(target + point), dtype="keep", progress=progress)
            os.write(write, str(acts.count).encode())
            os._exit(0)
        return os.waitpid(child, 0)[1]

    assert run("0") == 0
    total = int(os.read(read, 20))
    for point in points:
        acts.limit = int(point) if int(point) > 0 else total + 1 + int(point)
        status = run(point)
        assert os.WIFSIGNALED(status), f"not killed at {point} of {total}: {status}"


if __name__ == "__main__":
    main(*sys.argv[1:])
