"""The pool: what a call may do to its process, and what is left of it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from dsjax.posttrain import verify
from dsjax.posttrain.verify import Call, Outcome, Pool

BAD = """
import os, signal, subprocess, sys, time

def add(a, b): return a + b
def own_id(): return os.getpid()
def leave(code): os._exit(code)
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def fail(): raise KeyError("x")
def spin():
    while True: pass
def sleep(): time.sleep(600)
def hoard(): return len(bytearray(64 << 30))
def deep(n=0): return deep(n + 1)
def shout():
    print("{}"); os.write(1, b'{"value": 1}\\n'); return 2
def listen(): return sys.stdin.read()
def weird(): return {1, 2}
def infinite(): return float("inf")
def fork(marker):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", marker])
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", marker],
                     start_new_session=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calls")
    (folder / "bad_calls.py").write_text(BAD)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder)
    yield lambda function, *given: Call(f"bad_calls:{function}", given, 1.0, 2.0)
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


@pytest.fixture(scope="module")
def pool(bad):
    with Pool(2) as pool:
        yield pool


def test_calls_return_in_order(pool, bad):
    seen = []
    outcomes = pool.run([bad("add", n, 1) for n in range(20)], lambda *counts: seen.append(counts))
    assert outcomes == [Outcome(n + 1) for n in range(20)]
    assert seen[-1] == (20, 20) and seen == sorted(seen)


def test_calls_that_are_sent_together_fail_alone(pool):
    """Quick calls share a message; one that ends the child takes no other with it."""
    names = ["add", "kill", "add", "spin", "leave", "add", "fail", "add"] * 2
    given = {"add": (1, 2), "leave": (0,)}
    calls = [Call(f"bad_calls:{name}", given.get(name, ()), 1.0, 2.0) for name in names]
    outcomes = pool.run(calls)
    for name, outcome in zip(names, outcomes, strict=True):
        if name == "add":
            assert outcome == Outcome(3)
        else:
            assert outcome.value is None and outcome.limit == (name != "fail"), (name, outcome)


def test_call_after_a_long_one_ends_its_process_alone(bad):
    """Calls that fill the pipe: nobody is still writing to a child when a call ends it."""
    long = Call("bad_calls:add", ("a" * 200_000, "b"), 1.0, 2.0)
    with Pool(1) as pool:
        outcomes = pool.run([long, Call("bad_calls:kill", (), 1.0, 2.0), *[long] * 6])
    assert [len(outcome.value or "") for outcome in outcomes] == [200_001, 0, *[200_001] * 6]
    assert [outcome.limit for outcome in outcomes] == [False, True, *[False] * 6]


def test_calls_run_elsewhere(pool, bad):
    ids = {outcome.value for outcome in pool.run([bad("own_id")] * 8)}
    assert 1 <= len(ids) <= 2 and os.getpid() not in ids


@pytest.mark.parametrize(
    ("call", "limit", "error"),
    [
        ("spin", True, "1 processor seconds"),
        ("hoard", True, "out of memory"),
        ("deep", True, "nested too deeply"),
        ("kill", True, "its process ended"),
        ("fail", False, "KeyError: 'x'"),
        ("weird", False, "TypeError"),
        ("infinite", False, "ValueError"),
    ],
)
def test_failing_call_is_told_and_the_next_one_served(pool, bad, call, limit, error):
    failed, fine = pool.run([bad(call), bad("add", 1, 2)])
    assert failed.value is None and failed.limit == limit and error in failed.error
    assert fine == Outcome(3)


@pytest.mark.parametrize("code", [0, 7])
def test_call_that_ends_its_process_reaches_a_limit(pool, bad, code):
    assert pool.run([bad("leave", code)])[0].limit
    assert pool.run([bad("add", 1, 2)]) == [Outcome(3)]


def test_what_a_call_prints_or_reads_is_no_answer(pool, bad):
    assert pool.run([bad("shout"), bad("listen")]) == [Outcome(2), Outcome("")]


def test_call_that_sleeps_is_ended_with_what_it_started(bad, monkeypatch):
    monkeypatch.setattr(verify, "STARTING", 0.5)
    marker = f"marker-{os.getpid()}-{time.time_ns()}"
    with Pool(1) as pool:
        pool.run([bad("add", 1, 1)])
        began = time.monotonic()
        assert pool.run([bad("fork", marker)])[0].limit
        assert time.monotonic() - began < 10
    assert running(marker) == []


def running(marker):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path)
        except OSError:
            continue
    return found


def test_idle_child_ends_and_the_next_call_starts_another(bad):
    with Pool(1, idle_seconds=0.2) as pool:
        (first,) = pool.run([bad("own_id")])
        deadline = time.monotonic() + 20
        stat = Path("/proc", str(first.value), "stat")
        while ") Z " not in stat.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        (second,) = pool.run([bad("own_id")])
        assert second.error is None and second.value != first.value


def test_calls_that_meet_an_ending_child_are_served(bad):
    with Pool(1, idle_seconds=0.02) as pool:
        for wait in (0.0, 0.01, 0.018, 0.02, 0.022, 0.025, 0.03) * 3:
            time.sleep(wait)
            assert pool.run([bad("add", 1, 2)]) == [Outcome(3)]


def test_closed_pool_leaves_no_process(bad):
    pool = Pool(2)
    ids = {outcome.value for outcome in pool.run([bad("own_id")] * 8)}
    pool.close()
    assert not any(Path("/proc", str(id)).exists() for id in ids)
    assert pool.run([bad("add", 1, 2)])[0].error == "the pool is closed"


def test_interrupt_ends_the_calls_at_once(bad):
    pool = Pool(1)
    # A shell starts what it runs in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.main_thread().ident
    timer = threading.Timer(1.0, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pool.run([Call("bad_calls:sleep", (), 100.0, 100.0)] * 3)
    signal.signal(signal.SIGINT, before)
    timer.join()
    assert time.monotonic() - began < 10


def test_child_ends_with_its_parent(bad):
    import subprocess

    code = (
        "import os; from dsjax.posttrain.verify import Call, Pool\n"
        "print(Pool(1).run([Call('bad_calls:own_id', (), 1.0, 1.0)])[0].value, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    path = os.pathsep.join([str(Path(verify.__file__).parents[2]), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    child = Path("/proc", done.stdout.decode().strip())
    for _ in range(100):
        if not child.exists():
            return
        time.sleep(0.1)
    raise AssertionError("the child outlived its parent")
