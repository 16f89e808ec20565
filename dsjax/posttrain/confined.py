"""The program in whose process code that a model wrote runs: `python -I -S confined.py ROLE ...`.

It first gives up what it can, then runs the code in one of three roles:

  program FOLDER               answer.py reads standard input and prints
  calls FOLDER                 answer.py is imported; calls come as JSON lines on standard input,
                               their results go as JSON lines to standard output
  asserts FOLDER IN OUT NAMES  tests.py, which is not the model's, runs with the functions NAMES,
                               whose calls go to another process's `calls` by the descriptors

So no test and no expected value is ever in the process of the answer: it can only return values,
as plain data, and what they are worth is decided elsewhere. Given up are, by the kernel where it
can: processor time, address space, file size, open files, core dumps; then capabilities, writing
outside FOLDER (Landlock), and starting processes, signals, tracing and sockets (seccomp). This is a
fence against what a policy learns to try, not a jail for an enemy; docs/rewards.md says what that
leaves. The file uses the standard library alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY = 1 << 30  # bytes of address space
MOST_FILE = 1 << 20  # bytes of a file
MOST_OPEN = 64
_SIZE = 1 << 16

# Numbers of system calls. Threads are allowed, so `clone` is looked at more closely.
_DENIED = {
    "x86_64": {
        "arch": 0xC000003E,
        "clone": 56,
        # fork vfork socket socketpair kill tkill tgkill setsid setpgid ptrace process_vm_readv
        # process_vm_writev unshare mount bpf io_uring_setup execve execveat pidfd_send_signal
        # pidfd_open
        "others": (57, 58, 41, 53, 62, 200, 234, 112, 109, 101, 310, 311, 272, 165, 321, 425, 59,
                   322, 424, 434),
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "clone": 220,
        "others": (198, 199, 129, 130, 131, 157, 154, 117, 270, 271, 97, 40, 280, 425, 221, 281,
                   424, 434),
    },
}  # fmt: skip
_CLONE3, _CLONE_THREAD = 435, 0x10000
_EPERM, _ENOSYS = 1, 38


def confine(folder: str, seconds: int) -> None:
    """Gives up what this process does not need to run an answer in `folder`."""
    import resource

    for what, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, MOST_FILE),
        (resource.RLIMIT_NOFILE, MOST_OPEN),
        (resource.RLIMIT_CORE, 0),
    ):
        _limit(what, limit)
    if sys.platform != "linux" or not _fence(folder):
        _limit(resource.RLIMIT_NPROC, 0)  # no threads either; root has no such limit


def _limit(what: int, limit: int) -> None:
    import resource

    with contextlib.suppress(ValueError, OSError):  # macOS lacks some
        resource.setrlimit(what, (limit, limit))


def _fence(folder: str) -> bool:
    """Gives up what Linux can deny, and tells whether processes are."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: end with the one who started us
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which the filters need
    _restrict_writing(libc, folder)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())
    return _filter_calls(libc)


def _restrict_writing(libc: Any, folder: str) -> None:
    """Denies writing outside `folder` by Landlock, if the kernel has it."""
    import ctypes

    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return
    # Bits 1 and 4 to 12: write, remove and make all kinds of files; bit 14: truncate.
    rights = 1 << 1 | sum(1 << bit for bit in range(4, 13)) | (1 << 14 if version >= 3 else 0)
    ruleset = libc.syscall(create, ctypes.byref(ctypes.c_uint64(rights)), 8, 0)
    if ruleset < 0:
        return
    for path, allowed in ((folder, rights), (os.devnull, 1 << 1)):
        place = os.open(path, os.O_PATH)
        rule = allowed.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        libc.syscall(add, ruleset, 1, rule, 0)
        os.close(place)
    libc.syscall(restrict, ruleset, 0)
    os.close(ruleset)


def _filter_calls(libc: Any) -> bool:
    """Denies the system calls above by seccomp; False where machine or kernel does not have it."""
    import ctypes

    numbers: Any = _DENIED.get(platform.machine())
    if numbers is None:
        return False

    def step(code: int, yes: int, no: int, value: int) -> bytes:
        order: Any = sys.byteorder
        return code.to_bytes(2, order) + bytes([yes, no]) + value.to_bytes(4, order)

    load, equal, at_least, has, give = 0x20, 0x15, 0x35, 0x45, 0x06
    fail = 0x00050000
    program = step(load, 0, 0, 4) + step(equal, 1, 0, numbers["arch"])
    program += step(give, 0, 0, fail | _EPERM) + step(load, 0, 0, 0)
    program += step(at_least, 0, 1, 0x40000000) + step(give, 0, 0, fail | _EPERM)
    # The C library takes `clone` where it is told that there is no `clone3`.
    program += step(equal, 0, 1, _CLONE3) + step(give, 0, 0, fail | _ENOSYS)
    for number in numbers["others"]:
        program += step(equal, 0, 1, number) + step(give, 0, 0, fail | _EPERM)
    program += step(equal, 0, 3, numbers["clone"]) + step(load, 0, 0, 16)
    program += step(has, 1, 0, _CLONE_THREAD) + step(give, 0, 0, fail | _EPERM)
    program += step(give, 0, 0, 0x7FFF0000)

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]

    return libc.prctl(22, 2, ctypes.byref(Program(len(program) // 8, program)), 0, 0) == 0


def encode(value: Any) -> Any:
    """Returns plain data as JSON values, in which an object says what JSON has not: {"tuple": []}.

    Raises:
      TypeError: a value is no plain data.
    """
    if value is None or isinstance(value, bool | str):
        return value if not isinstance(value, str) else str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        finite = value - value == 0
        return float(value) if finite else {"float": str(float(value))}
    if isinstance(value, list):
        return [encode(each) for each in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(each) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in value.items()]}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(value: Any) -> Any:
    """Returns the plain data that `encode` turned into JSON values.

    Raises:
      ValueError, TypeError, KeyError: it is nothing that `encode` makes.
    """
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "dict":
        return {decode(key): decode(each) for key, each in held}
    if kind == "complex":
        return complex(*map(decode, held))
    plain: dict[str, Callable[[Any], Any]] = {
        "tuple": tuple, "set": set, "frozenset": frozenset, "float": float, "bytes": bytes.fromhex,
    }  # fmt: skip
    return plain[kind](decode(held) if isinstance(held, list) else held)


def _serve_calls() -> None:
    """Imports answer.py and calls its functions as standard input asks."""
    calls, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    spec = importlib.util.spec_from_file_location("answer", "answer.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["answer"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for line in calls:
        call = json.loads(line)
        try:
            function = _find(module, call["entry"])
            value = function(*map(decode, call["arguments"]), **decode(call["named"]))
            answer = json.dumps({"value": encode(value)}, allow_nan=False)
        except BaseException as error:  # SystemExit too: the tests decide what that is worth
            answer = json.dumps({"error": type(error).__name__})
        results.write(answer.encode() + b"\n")
        results.flush()


def _find(module: Any, entry: str) -> Callable[..., Any]:
    """Returns a function of the answer; LeetCode's are methods of a class Solution."""
    if not hasattr(module, entry) and hasattr(module, "Solution"):
        return getattr(module.Solution(), entry)
    return getattr(module, entry)


def _run_asserts(to_answer: int, from_answer: int, names: list[str]) -> None:
    """Runs tests.py, whose functions `names` are called in the answer's process."""
    calls, results = os.fdopen(to_answer, "wb"), os.fdopen(from_answer, "rb")

    def proxy(entry: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            given = {"entry": entry, "arguments": [*map(encode, arguments)], "named": encode(named)}
            calls.write(json.dumps(given).encode() + b"\n")
            calls.flush()
            answer = json.loads(results.readline())
            if "error" in answer:
                raise RuntimeError(str(answer["error"]))
            return decode(answer["value"])

        return call

    runpy.run_path("tests.py", {name: proxy(name) for name in names}, "tests")
    os.write(1, b"passed\n")


def main(role: str, folder: str, seconds: str, *more: str) -> None:
    os.chdir(folder)
    confine(folder, int(seconds))
    if role == "program":
        runpy.run_path("answer.py", run_name="__main__")
    elif role == "calls":
        _serve_calls()
    else:
        _run_asserts(int(more[0]), int(more[1]), json.loads(more[2]))


if __name__ == "__main__":
    main(*sys.argv[1:])
