"""Runs stages: the same function over many shards, on any number of processes.

  OUT/<place of the stage>/
    stage.json      the key: a hash of all that determines the stage's files
    00012.json      what the job with this number found; written last, so its files are complete
    ...             whatever files the jobs write

A job that has its JSON file is not run again. If the key differs from the one in stage.json (other
inputs, another recipe, a new version of the stage), the folder is emptied first; so a changed
recipe repeats the stages that it concerns and those after them. Jobs see nothing but their own
input, which is why neither the number of workers nor a kill can change a byte.

Several machines that share a file system can work on one output. Each runs the jobs whose number is
its own modulo the count of processes, and waits at the end of a stage for the files of the others.
They need not start together, and one that was stopped can be started again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TextIO

from dsjax.display import Display
from dsjax.files import read_json, write_json

_held: list[TextIO] = []  # the lock of a worker, until its process ends

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LINES = 60.0

# (job, folder of the stage, number of the job) -> what it found, as JSON
Function = Callable[[Any, Path, int], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its function is run once per job."""

    place: str  # its folder in the output, the last part of which is its name
    function: Function  # importable by name, since other processes run it
    jobs: Sequence[Any]
    key: str  # from `fingerprint`

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished stage."""

    folder: Path
    found: list[dict[str, Any]]  # per job
    key: str
    resumed: int  # jobs that an earlier run had finished


def fingerprint(*parts: Any) -> str:
    """Returns a hash of JSON values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()


class Workers:
    """Processes for one stage after the other, a context; one worker is this process itself."""

    def __init__(
        self, count: int, out: Path, display: Display, *, process: int = 0, processes: int = 1
    ) -> None:
        """
        Args:
          count: processes of this machine.
          out: the folder of the output.
          process: number of this process among those that share the work.
          processes: how many these are.
        """
        self._count = count
        self.out = out
        self._process, self._processes = process, processes
        self._lock = out / f".workers-{process}"
        self._display = display
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        # Workers of a run that was killed end within a second. Until then they may write.
        with self._lock.open("w") as stream, contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=exception[0] is None, cancel_futures=True)

    def run(self, stage: Stage) -> Result:
        """Runs the jobs that have not been finished before.

        Raises:
          ValueError: a job failed on its input; or the folder of the stage holds other files.
          OSError: a file cannot be written, or a worker was killed.
        """
        folder = self.out / stage.place
        if self._process == 0:
            _open(folder, stage.key)
        else:
            self._wait(f"process 0 to begin {stage.name}", lambda: _key(folder) == stage.key)
        numbers = range(len(stage.jobs))
        own = numbers[self._process :: self._processes]
        pending = [number for number in own if not _found(folder, number).is_file()]
        resumed = len(own) - len(pending)
        if pending:
            show = self._display.counting(stage.name)
            done = resumed
            show(done, len(own))
            for _ in self._completed(stage, folder, pending):
                done += 1
                show(done, len(own))
        self._wait(
            f"the other processes to end {stage.name}",
            lambda: all(_found(folder, number).is_file() for number in numbers),
        )
        found = [read_json(_found(folder, number)) for number in numbers]
        return Result(folder, found, stage.key, resumed)

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        """Returns when other processes have done their part; says now and then what is missing."""
        told = time.monotonic()
        while not ready():
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                self._display.say(f"waiting for {what}")
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _completed(self, stage: Stage, folder: Path, pending: Sequence[int]) -> Iterator[None]:
        if self._count == 1 or len(pending) == 1:
            for number in pending:
                yield _perform(stage.function, stage.jobs[number], folder, number)
            return
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._count,
                multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(os.getpid(), self._lock),
            )
        jobs = [
            self._pool.submit(_perform, stage.function, stage.jobs[number], folder, number)
            for number in pending
        ]
        try:
            for job in concurrent.futures.as_completed(jobs):
                yield job.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a worker process was killed in stage {stage.name}, probably for its memory; run "
                "the same command again, which keeps what is finished, with fewer --workers or "
                "--set shard_bytes=16000000"
            ) from error
        finally:
            for job in jobs:
                job.cancel()


@contextlib.contextmanager
def owned(out: Path, process: int) -> Iterator[None]:
    """Context that makes the output folder, for one process of each number.

    Raises:
      ValueError: it holds something else, or another process of this number works on it.
    """
    if out.exists() and (not out.is_dir() or _is_foreign(out)):
        raise ValueError(f"--out {out} holds other files; choose a folder that is new or empty")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f".lock-{process}", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is at work in {out}; wait for it, or choose another --out"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def _is_foreign(out: Path) -> bool:
    names = {entry.name for entry in out.iterdir()}
    return bool(names) and not any(name.startswith(".lock-") for name in names)


def _open(folder: Path, key: str) -> None:
    """Makes the folder of a stage, empty if another key left files there."""
    mark, old = folder / "stage.json", folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if mark.is_file():
        if _key(folder) == key:
            return
        folder.rename(old)  # so that a kill in the middle leaves no folder without its key
        shutil.rmtree(old)
    elif folder.exists() and any(path.suffix != ".partial" for path in folder.iterdir()):
        raise ValueError(f"{folder} holds files of something else; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(mark, {"key": key})


def _key(folder: Path) -> str | None:
    """Returns the key of the stage that a folder is of, if it is of one."""
    with contextlib.suppress(ValueError):
        return read_json(folder / "stage.json").get("key")
    return None


def _found(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _perform(function: Function, job: Any, folder: Path, number: int) -> None:
    found: Mapping[str, Any] = function(job, folder, number)
    write_json(_found(folder, number), found)


def _begin(parent: int, lock: Path) -> None:
    """Prepares a worker: Ctrl-C is for the parent to handle, and without it a worker ends."""
    _held.append(lock.open("w"))
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(_held[0], fcntl.LOCK_SH)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
