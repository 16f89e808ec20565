"""Runs tools/grpo.py, and kills it in the midst of a phase, as a power cut might.

  python -m tests.posttrain.kill_phases PHASE ARGUMENT ...

PHASE is a key of PHASES, or "none". The process ends by SIGKILL in that phase of the second step
that it takes: in the rollout before its second call of a program, in the grading when some verdicts
are there, in the update while it runs, in the save before its third act on the disk.
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

TOOL = Path(__file__).parents[2] / "tools/grpo.py"


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_second(owner: Any, name: str, prepare: Any) -> None:
    """Calls `prepare` before the second call of a method."""
    original, calls = getattr(owner, name), itertools.count(1)

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 2:
            prepare()
        return original(*arguments, **keywords)

    setattr(owner, name, wrapper)


def in_rollout() -> None:
    from dsjax.generate.engine import Engine
    from dsjax.posttrain.rollout import Rollouts

    at_second(Rollouts, "answer", lambda: at_second(Engine, "step", die))


def in_grading() -> None:
    from dsjax.posttrain.rewards import Grader
    from dsjax.posttrain.verify import Pool

    def prepare() -> None:
        run = Pool.run
        Pool.run = lambda pool, calls, progress=None: run(pool, calls, die)

    at_second(Grader, "judge", prepare)


def in_update() -> None:
    from dsjax.posttrain.updates import Timed

    at_second(Timed, "__call__", lambda: threading.Timer(0.005, die).start())


def in_save() -> None:
    from dsjax.train.session import Session

    def prepare() -> None:
        acts = itertools.count(1)
        for name in ("fsync", "mkdir", "rename", "replace"):
            setattr(os, name, counted(getattr(os, name), acts))

    at_second(Session, "save", prepare)


def counted(act: Any, acts: Any) -> Any:
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if next(acts) == 3:
            die()
        return act(*arguments, **keywords)

    return wrapper


PHASES = {"rollout": in_rollout, "grading": in_grading, "update": in_update, "save": in_save}


if __name__ == "__main__":
    phase, *arguments = sys.argv[1:]
    PHASES.get(phase, lambda: None)()
    sys.argv = [str(TOOL), *arguments]
    runpy.run_path(str(TOOL), run_name="__main__")
