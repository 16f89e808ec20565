"""Signals ask first and kill second."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsjax.signals import StopRequest


def wait_for(request: StopRequest) -> int:
    for _ in range(500):
        if request.exit_code is not None:
            return request.exit_code
        time.sleep(0.01)
    raise AssertionError("the signal was not seen in 5 seconds")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_asks_for_a_stop(number, code):
    with StopRequest() as request:
        request.defer()
        assert request.exit_code is None
        os.kill(os.getpid(), number)
        assert wait_for(request) == code


def test_signal_before_there_is_anything_to_save_leaves():
    with pytest.raises(SystemExit) as leaving, StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert leaving.value.code == 143


def test_work_that_reads_signals_itself_is_not_interrupted():
    with StopRequest() as request:
        with pytest.raises(LookupError), request.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert wait_for(request) == 143
            raise LookupError  # what it raises in answer
        with pytest.raises(SystemExit) as leaving, request.deferred():
            raise AssertionError("a signal came before")
    assert leaving.value.code == 143


def test_signal_that_deferring_work_did_not_read_leaves():
    with StopRequest() as request, pytest.raises(SystemExit) as leaving, request.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(request)
    assert leaving.value.code == 130


def test_deferred_work_leaves_signals_as_they_were():
    with StopRequest() as request:
        with request.deferred():
            pass
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    threads = threading.active_count()
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert threading.active_count() == threads


NATIVE_WAIT = """if True:
    import hashlib, os, signal, sys, threading, time
    from dsjax import signals
    from dsjax.signals import StopRequest

    def kill():
        for _ in range(int(sys.argv[1])):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGTERM)

    signals._GRACE_SECONDS = 0.2
    with StopRequest() as request:
        if sys.argv[1] == "2":
            request.defer()
        threading.Thread(target=kill).start()
        hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 100_000_000)
"""


@pytest.mark.parametrize(
    ("count", "said"),
    [("2", "finishing this step, then saving; once more"), ("1", "stopping; once more")],
)
def test_signals_end_a_native_call_that_python_cannot_interrupt(count, said):
    """As in a long compilation: the second signal at once, the first where there is nothing to
    save.
    """
    start = time.monotonic()
    command = [sys.executable, "-c", NATIVE_WAIT, count]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 143 and time.monotonic() - start < 10
    assert f"SIGTERM received: {said}" in result.stderr and "Traceback" not in result.stderr
