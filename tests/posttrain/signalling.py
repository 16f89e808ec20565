"""A signal to a run at a place of its own work, whatever the machine's speed."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from dsjax.signals import StopRequest
from dsjax.train import session


def signalled(function: Callable[..., Any], call: int, patch: pytest.MonkeyPatch) -> Any:
    """Returns a function during whose given call the run that is under way receives SIGTERM."""
    requests, calls = [], itertools.count(1)

    class Seen(StopRequest):
        def __enter__(self) -> StopRequest:
            requests.append(self)
            return super().__enter__()

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            while requests[-1].exit_code is None:
                time.sleep(0.01)
        return function(*arguments, **keywords)

    patch.setattr(session, "StopRequest", Seen)
    return wrapper
