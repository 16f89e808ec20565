"""What a completion is worth: one number, or one for each step of its reasoning.

A rule returns a number, None for "cannot judge", or a list of pairs (end, reward), one for each
step: `end` counts the completion's characters up to and including the step's last, so steps cover
completion[:end] one after the other; their rewards are numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Worth(NamedTuple):
    """A verdict.

    Attributes:
      value: the number, or the mean of the steps' rewards; None if it cannot be judged.
      steps: (end, reward) of each; empty where the verdict is one number.
    """

    value: float | None
    steps: tuple[tuple[int, float], ...] = ()


def read(returned: Any, length: int) -> Worth:
    """Reads what a rule returned for a completion of so many characters.

    Raises:
      ValueError: it is neither a number, nor None, nor steps in order.
    """
    if returned is None:
        return Worth(None)
    if _is_number(returned):
        return Worth(float(returned))
    if not isinstance(returned, list) or not all(map(_is_step, returned)):
        raise ValueError(
            f"it returned {returned!r:.100}, not a number, None, or a list of steps, (end, reward)"
        )
    ends = [end for end, _ in returned]
    if ends != sorted(set(ends)) or (ends and not 0 < ends[0] <= ends[-1] <= length):
        raise ValueError(
            f"it returned steps that end at {_short(ends)} in a completion of {length} characters; "
            f"ends must increase, from 1 to {length} at most"
        )
    if not returned:
        return Worth(None)
    steps = tuple((end, float(reward)) for end, reward in returned)
    return Worth(sum(reward for _, reward in steps) / len(steps), steps)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float, bool)


def _is_step(step: Any) -> bool:
    return (
        isinstance(step, list) and len(step) == 2 and type(step[0]) is int and _is_number(step[1])
    )


def _short(ends: Sequence[int]) -> str:
    return f"{list(ends)!r:.80}"
