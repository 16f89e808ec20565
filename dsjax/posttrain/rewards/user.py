"""A reward of the user's own: a function of the completion and the problem, `path.py:name`.

    def brief(completion: str, problem: dict) -> float | None:
        return 1.0 if len(completion) < problem["most"] else 0.0

The file runs in the limited processes, once in each, and may import what is installed and what
lies beside it. What it returns must be a number, a list with the reward of each step (`worth`), or
None for "cannot judge"; if it raises, the completion counts as not judged, and the error is shown.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SECONDS, WALL_SECONDS = 60.0, 300.0


def score(completion: str, problem: Mapping[str, Any], path: str, name: str) -> Any:
    return _function(path, name)(completion, problem)


def complaint(problem: Mapping[str, Any], path: str, name: str) -> str | None:
    """Says why the function cannot be called at all; None if it can."""
    del problem
    try:
        _function(path, name)
    except Exception as error:  # whatever the user's file may raise
        return f"{path} cannot be used: {type(error).__name__}: {error}"
    return None


@functools.cache
def _function(path: str, name: str) -> Callable[[str, Mapping[str, Any]], Any]:
    """Loads the file and returns its function.

    Raises:
      AttributeError, TypeError: the file has no such function.
    """
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("user_reward", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["user_reward"] = module
    spec.loader.exec_module(module)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is {type(function).__name__}, not a function")
    return function
