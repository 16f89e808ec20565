"""Runs code that a model wrote in processes of its own (`confined`), and ends them with all that
they started. Called from the limited processes of `verify`, never from the trainer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.posttrain import confined
from dsjax.posttrain.verify import kill_tree

MOST_OUTPUT = 1 << 20  # bytes that a program may print
_PIECE = 1 << 16
_ENDING_SECONDS = 2.0
_LOOK_SECONDS = 0.2
_PATIENCE = 4  # wall-clock seconds per processor second, on a busy machine


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one test may take.

    Attributes:
      seconds: of processor time, whole.
    """

    seconds: int = 5

    @property
    def wall_seconds(self) -> float:
        return self.seconds * _PATIENCE


@contextlib.contextmanager
def folder(files: Mapping[str, str]) -> Iterator[str]:
    """Context that yields an empty folder but for these files, and removes it."""
    # What an answer leaves there may not be removable; that must not fail the test.
    with tempfile.TemporaryDirectory(prefix="dsjax-answer-", ignore_cleanup_errors=True) as place:
        for name, text in files.items():
            Path(place, name).write_bytes(text.encode("utf-8", "surrogatepass"))
        yield place


def printed(answer: str, given: str, limits: Limits) -> str | None:
    """Returns what a program prints after it has read `given`; None if it fails, exceeds a limit or
    prints what is not UTF-8.
    """
    with folder({"answer.py": answer}) as place, _process("program", place, limits) as process:
        output, ended = _converse(process, given.encode(), limits.wall_seconds)
        if not ended or not _succeeds(process):
            return None
    try:
        return output.decode()
    except UnicodeDecodeError:
        return None


def returned(
    answer: str, entry: str, arguments: Sequence[Any], limits: Limits
) -> tuple[Any] | None:
    """Returns what a function of a program returns, as plain data, in a tuple; None if it fails,
    exceeds a limit, or returns anything else.
    """
    given = {"entry": entry, "arguments": [*map(confined.encode, arguments)], "named": {"dict": []}}
    with folder({"answer.py": answer}) as place, _process("calls", place, limits) as process:
        line = json.dumps(given).encode() + b"\n"
        output, _ = _converse(process, line, limits.wall_seconds, lines=1)
    try:
        return (confined.decode(json.loads(output.partition(b"\n")[0])["value"]),)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None  # the program can write to the pipe itself, and anything


def passes(answer: str, tests: str, names: Sequence[str], limits: Limits) -> bool:
    """Tells whether assertions hold of the functions `names` of a program, each called in the
    program's own process, away from the assertions.
    """
    with (
        folder({"answer.py": answer}) as place,
        folder({"tests.py": tests}) as other,
        _process("calls", place, limits) as answering,
    ):
        assert answering.stdin is not None and answering.stdout is not None
        pipes = (answering.stdin.fileno(), answering.stdout.fileno())
        more = [*map(str, pipes), json.dumps(list(names))]
        with _process("asserts", other, limits, more, pipes) as asserting:
            answering.stdin.close()
            answering.stdout.close()
            output, _ = _converse(asserting, b"", limits.wall_seconds)
            return output == b"passed\n" and _succeeds(asserting)


def printed_by(command: Sequence[str], given: str, seconds: float) -> str | None:
    """Returns what a program of the user's prints after it has read `given`; None if it fails or
    takes longer. It runs as it is, with this process's environment.
    """
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with _ended(process):
        output, ended = _converse(process, given.encode("utf-8", "surrogatepass"), seconds)
        return output.decode(errors="replace") if ended and _succeeds(process) else None


@contextlib.contextmanager
def _process(
    role: str, place: str, limits: Limits, more: Sequence[str] = (), pipes: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Context of a confined process, which ends with all that it started."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", confined.__file__, role, place, str(limits.seconds), *more],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=place,
        env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        pass_fds=pipes,
        start_new_session=True,
    )
    # Of two processes the outer one ends what is left.
    with _ended(process, sweep=role != "asserts"):
        yield process


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes], *, sweep: bool = True) -> Iterator[None]:
    """Context of a process, which ends with all that it started.

    Args:
      sweep: whether to end all children of this process; what a process started and left behind
        has become one of them.
    """
    _adopt_orphans()
    try:
        yield
    finally:
        kill_tree(process.pid)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        if sweep:
            kill_tree(os.getpid(), and_root=False)
            _bury()


def _succeeds(process: subprocess.Popen[bytes]) -> bool:
    """Tells whether a process that has closed its output ends well, at once."""
    try:
        return process.wait(_ENDING_SECONDS) == 0
    except subprocess.TimeoutExpired:
        return False


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _bury() -> None:
    """Reaps the dead children that nobody waits for."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _converse(
    process: subprocess.Popen[bytes], given: bytes, seconds: float, *, lines: int | None = None
) -> tuple[bytes, bool]:
    """Writes to a process while reading what it prints.

    Args:
      lines: how many to wait for; None: all until it closes its output.

    Returns:
      what it printed, and whether it came to its end within the time and MOST_OUTPUT.
    """
    assert process.stdin is not None and process.stdout is not None
    deadline, output, left = time.monotonic() + seconds, b"", memoryview(given)
    with selectors.DefaultSelector() as selector:
        for pipe, event in (
            (process.stdin, selectors.EVENT_WRITE),
            (process.stdout, selectors.EVENT_READ),
        ):
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, event)
        while (wait := deadline - time.monotonic()) > 0:
            events = selector.select(min(wait, _LOOK_SECONDS))
            if not events and process.poll() is not None:
                return output, True  # what it started may hold its output open
            for key, _ in events:
                if key.fileobj is process.stdin:
                    try:
                        left = left[os.write(key.fd, left[:_PIECE]) :] if left else left
                    except BrokenPipeError:  # the process reads no more
                        left = left[:0]
                    except BlockingIOError:
                        pass
                    if not left or process.poll() is not None:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                    continue
                part = os.read(key.fd, _PIECE)
                output += part
                if not part or (lines is not None and output.count(b"\n") >= lines):
                    return output, True
                if len(output) > MOST_OUTPUT:
                    return output, False
    return output, False
