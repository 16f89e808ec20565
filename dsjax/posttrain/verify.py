"""A pool of limited processes that judge what a model wrote, away from the trainer.

An answer can make its judge run out of time or memory (`9^9^9^9` in a box), or end its process. So
each call of a rule runs in a child process (this file as a program) with kernel limits on its
address space and on the processor time of each call; its parent enforces a limit on wall-clock time
too, kills a child that exceeds it, with everything that the child started, and starts another. The
wall-clock limit is generous, so that a busy machine does not change verdicts.

A child takes calls as JSON lines on its standard input and answers them in turn. It ends when the
parent is gone, and if asked so, after some seconds without a call; the next call starts a new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MEMORY = 4 << 30  # bytes of address space
STARTING = 60.0  # wall-clock seconds that starting a child and its imports may add to a call
MOST_WORKERS = 16
QUICK, MOST_TOGETHER = 30.0, 16  # calls of at most so many seconds are sent so many at a time
# Bytes of calls that are sent together: a pipe holds them all, so that whoever sends them can watch
# the child instead of waiting until it reads on. A call that is longer is sent alone.
MOST_SENT = 1 << 14
MOST_ANSWER = 1 << 20  # bytes of a child's answer
_ROOT = str(Path(__file__).parents[2])


@dataclasses.dataclass(frozen=True)
class Call:
    """A function to call in a child.

    Attributes:
      target: "module:function".
      arguments: JSON values.
      seconds: of processor time, within the child itself.
      wall_seconds: of wall-clock time.
    """

    target: str
    arguments: tuple[Any, ...]
    seconds: float
    wall_seconds: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
      value: what the function returned, a JSON value; None if it failed.
      error: why it failed; None if it returned.
      limit: whether it failed by reaching a limit or ending its process.
    """

    value: Any = None
    error: str | None = None
    limit: bool = False


class Pool:
    """Children that serve calls; a context that ends them.

    Args:
      workers: how many children at most; None is one per processor, and at most MOST_WORKERS.
      idle_seconds: after which a child without a call ends; None keeps it until `close`.
    """

    def __init__(self, workers: int | None = None, *, idle_seconds: float | None = None) -> None:
        self.workers = workers or min(os.cpu_count() or 1, MOST_WORKERS)
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        children = [_Child(idle_seconds) for _ in range(self.workers)]
        for child in children:
            self._idle.put(child)
        # Also at exit, and when the pool is forgotten.
        self._finalizer = weakref.finalize(self, _end_all, children)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the children. A later call fails."""
        self._finalizer()

    def run(
        self, calls: Sequence[Call], progress: Callable[[int, int], None] | None = None
    ) -> list[Outcome]:
        """Makes all calls, several at a time, and returns their outcomes in order."""
        done, lock = 0, threading.Lock()

        def make(share: Sequence[Call]) -> list[Outcome]:
            nonlocal done
            child = self._idle.get()
            try:
                return child.call(share)
            finally:
                self._idle.put(child)
                if progress is not None:
                    with lock:
                        done += len(share)
                        progress(done, len(calls))

        with ThreadPoolExecutor(self.workers) as threads:
            try:
                shares = threads.map(make, self._shares(calls))
                return [outcome for share in shares for outcome in share]
            except BaseException:  # Ctrl-C must not wait for the calls that are running
                threads.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise

    def _shares(self, calls: Sequence[Call]) -> list[Sequence[Call]]:
        """Cuts calls into those that a child is sent at once: several only of quick ones, whose
        time would go into waking processes.
        """
        most = min(MOST_TOGETHER, max(len(calls) // (4 * self.workers), 1))
        shares: list[Sequence[Call]] = []
        for quick, group in itertools.groupby(calls, lambda call: call.wall_seconds <= QUICK):
            each, size = list(group), most if quick else 1
            shares += [each[start : start + size] for start in range(0, len(each), size)]
        return shares


class _Child:
    """A child process, started when it is needed. Used by one thread at a time."""

    def __init__(self, idle_seconds: float | None) -> None:
        self._idle_seconds = idle_seconds
        self._ahead = b""  # what is read but not yet taken
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False

    def call(self, calls: Sequence[Call]) -> list[Outcome]:
        """Makes some calls, one after the other."""
        outcomes: list[Outcome] = []
        idle = 0
        while left := calls[len(outcomes) :]:
            found = self._send(left)
            outcomes += found
            # An idle child ends by itself, perhaps just as the calls come.
            idle = 0 if found else idle + 1
            if idle == 2:
                outcomes.append(Outcome(error="its process ended", limit=True))
        return outcomes

    def _send(self, calls: Sequence[Call]) -> list[Outcome]:
        """Makes the first calls, at most MOST_SENT bytes of them, until one ends the child; the
        outcomes so far, with that of this one. None at all if the child ended in peace before the
        first.
        """
        if self.closed:
            return [Outcome(error="the pool is closed", limit=True)] * len(calls)
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        lines: list[bytes] = []
        for call in calls:
            line = json.dumps([call.target, call.arguments, call.seconds]).encode() + b"\n"
            if lines and sum(map(len, lines)) + len(line) > MOST_SENT:
                break
            lines.append(line)
        try:
            self.process.stdin.write(b"".join(lines))
            self.process.stdin.flush()
        except BrokenPipeError:
            self.end()
            return []
        outcomes: list[Outcome] = []
        for call in calls[: len(lines)]:
            answer = self._read(call.wall_seconds + STARTING)
            if answer is None:
                self.end()
                why = f"no answer within {call.wall_seconds:g} seconds"
                return [*outcomes, Outcome(error=why, limit=True)]
            try:
                outcomes.append(Outcome(**json.loads(answer)))
            except (ValueError, TypeError):
                code = self.end()
                if code == 0 and not outcomes:
                    return []
                over = code in (-signal.SIGXCPU, -signal.SIGKILL)
                why = f"more than {call.seconds:g} processor seconds" if over else f"exit {code}"
                return [*outcomes, Outcome(error=f"its process ended: {why}", limit=True)]
        return outcomes

    def end(self) -> int | None:
        """Kills the process and everything that it started, and returns its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        kill_tree(process.pid, and_root=process.poll() is None)
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        return code

    def _start(self) -> None:
        self.end()
        # -P keeps the folder of this file off the module search path.
        command = [sys.executable, "-P", __file__, _ROOT, json.dumps(self._idle_seconds)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._ahead = b""
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the trainer alone, which ends its children
        )

    def _read(self, seconds: float) -> bytes | None:
        """Returns the next line of the child, less if it ended; None when the time is up."""
        assert self.process is not None and self.process.stdout is not None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._ahead and len(self._ahead) < MOST_ANSWER:
            left = deadline - time.monotonic()
            if left <= 0 or self.closed:
                return None
            if select.select([descriptor], [], [], min(left, 0.5))[0]:
                part = os.read(descriptor, 1 << 16)
                if not part:
                    break
                self._ahead += part
        line, _, self._ahead = self._ahead.partition(b"\n")
        return line


def _end_all(children: Sequence[_Child]) -> None:
    for child in children:
        child.closed = True
        child.end()


def descendants(pid: int) -> list[int]:
    """Returns what a process started, directly or not; nothing where there is no /proc."""
    below: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if name.isdecimal():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    status = Path("/proc", name, "stat").read_text(errors="replace")
                    # The command's name stands in parentheses and may hold any characters.
                    parent = int(status.rpartition(")")[2].split()[1])
                    below.setdefault(parent, []).append(int(name))
    found, new = [], below.get(pid, [])
    while new:
        found += new
        new = [child for each in new for child in below.get(each, [])]
    return found


def kill_tree(pid: int, *, and_root: bool = True) -> None:
    """Kills the descendants of a process until none is left that is not dead, and its group.

    Args:
      and_root: also the process itself.
    """
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped ones start no more
        for _ in range(20):
            alive = [each for each in descendants(pid) if not _dead(each)]
            for each in alive:
                with contextlib.suppress(OSError):
                    os.kill(each, number)
            if not alive or number == signal.SIGSTOP:
                break
            time.sleep(0.005)
    if and_root:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


def _dead(pid: int) -> bool:
    try:
        status = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def _serve(idle_seconds: float | None) -> None:
    """Answers calls until standard input ends or is silent for so long."""
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS has no limit of address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a rule prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    calls = os.fdopen(os.dup(0), "rb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    ahead = b""
    while True:
        while b"\n" not in ahead:
            # Never idle in the middle of a line.
            if not ahead and not select.select([calls], [], [], idle_seconds)[0]:
                return
            part = calls.read(1 << 20)
            if not part:
                return
            ahead += part
        line, _, ahead = ahead.partition(b"\n")
        target, arguments, seconds = json.loads(line)
        _limit_processor(seconds)
        answers.write(_answer(target, arguments) + b"\n")
        answers.flush()


def _limit_processor(seconds: float) -> None:
    import resource

    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, hard))


def _answer(target: str, arguments: Sequence[Any]) -> bytes:
    module, _, function = target.partition(":")
    try:
        value = getattr(importlib.import_module(module), function)(*arguments)
        return json.dumps({"value": value}, allow_nan=False).encode()
    except MemoryError:
        return json.dumps({"error": "out of memory", "limit": True}).encode()
    except RecursionError:
        return json.dumps({"error": "nested too deeply", "limit": True}).encode()
    except Exception as error:  # a rule may meet anything; the trainer goes on
        return json.dumps({"error": f"{type(error).__name__}: {error}"[:1000]}).encode()


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    _serve(json.loads(sys.argv[2]))
