"""Signals ask first and kill second."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dsjax.train.signals import StopRequest


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


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    threads = threading.active_count()
    with StopRequest():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert threading.active_count() == threads


def test_second_signal_leaves_at_once_from_code_that_python_cannot_interrupt():
    """The main thread waits in a native call that restarts after a signal, as a long compilation does."""
    program = """if True:
        import hashlib, os, signal, threading, time
        from dsjax.train.signals import StopRequest

        def kill_twice():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)

        with StopRequest() as request:
            request.defer()
            threading.Thread(target=kill_twice).start()
            hashlib.pbkdf2_hmac("sha256", b"password", b"salt", 50_000_000)
    """
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 143 and time.monotonic() - start < 10
    assert (
        "SIGTERM received: finishing this step, then saving; once more to leave at once"
        in result.stderr
    )
