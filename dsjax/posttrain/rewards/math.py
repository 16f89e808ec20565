"""Mathematics: the answer's value against the truth, by Hugging Face's math-verify (extra `rl`).

1 if the answer equals `answer` of the problem, else 0. The answer is what the last \\\\boxed{...}
after the thought holds; an answer without a box is what <answer>...</answer> holds, or the last
expression that math-verify finds after the thought. A thought that never ends leaves no answer.

Three departures from math-verify alone:
  - Of several boxes it takes none or all, and one inside the thought too; here the last box counts.
    If that is wrong, all boxes after the thought together may still be the set that was asked for.
  - It compares to six decimals, so 1/2004! equals 1/2006!. Numbers that it calls equal must here be
    so exactly or, if either is a decimal fraction, to 1e-5 of their size.
  - Answer and truth of the same spelling are equal.

`verify(truth, answer)` is not symmetric: the truth comes first. The library's own time-outs rest on
signals and are off; the limits of the process hold instead, and reaching them is worth 0.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

from dsjax.posttrain.answer import all_boxes, last_box, split, tagged, undressed

SECONDS, WALL_SECONDS = 5.0, 60.0
MOST_CHARACTERS = 10_000  # of an answer without a box, from its end
_ANCHORS = ("$", "\\boxed", "\\(", "\\[")
_PLAIN = re.compile(r"[-+]?[\d.,\s]*\d[\d.,\s]*%?")


def require() -> None:
    """Checks that math-verify is there.

    Raises:
      ValueError: it is not.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "the reward 'math' needs math-verify, which is not installed; pip install -e '.[rl]' "
            "or pip install math-verify"
        )


def score(completion: str, problem: Mapping[str, Any]) -> float:
    answer = split(completion, problem)[1]
    if answer is None:
        return 0.0
    truth = str(problem["answer"])
    inside = tagged(answer)
    given = answer if inside is None else inside
    box = last_box(given)
    if box is None:
        return float(_equal(truth, given.strip()[-MOST_CHARACTERS:]))
    if _equal(truth, f"\\boxed{{{box}}}", bare=box):
        return 1.0
    boxes = all_boxes(given)
    return float(len(boxes) > 1 and _equal(truth, f"\\boxed{{{','.join(boxes)}}}"))


def complaint(problem: Mapping[str, Any]) -> str | None:
    """Says why the rule cannot judge answers to a problem; None if it can."""
    truth = problem.get("answer")
    if not isinstance(truth, str | int | float) or isinstance(truth, bool):
        return f"'answer' is {truth!r:.80}, not a text with the true answer"
    if all(isinstance(value, str) for value in _truths(str(truth))):
        return (
            f"'answer' {truth!r:.80} cannot be read as mathematics; correct it or remove the line"
        )
    return None


def _equal(truth: str, answer: str, *, bare: str | None = None) -> bool:
    import math_verify

    spelled = undressed(answer if bare is None else bare)
    if spelled and spelled == undressed(truth):
        return True
    values = _parsed(answer, "both")
    return any(
        math_verify.verify(true, value, timeout_seconds=None) and _close(true, value)
        for true in _truths(truth)
        for value in values
    )


@functools.lru_cache(4096)
def _truths(text: str) -> list[Any]:
    """Parses the truth, which is a whole expression, unless marks show that it stands in a text."""
    if any(mark in text for mark in _ANCHORS):
        return _parsed(text, "both")
    if _PLAIN.fullmatch(text.strip()):
        return _parsed(text, "number")
    return _parsed(f"${text}$", "both")


def _parsed(text: str, what: str) -> list[Any]:
    import math_verify

    targets: list[Any] = [math_verify.ExprExtractionConfig()]
    if what == "both":
        targets.insert(0, math_verify.LatexExtractionConfig(boxed_match_priority=0))
    # No limit of its own: it is an alarm, which the process here has for itself.
    return math_verify.parse(text, targets, parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _close(true: Any, value: Any) -> bool:
    """Tells whether two values that math-verify calls equal are so, if both are numbers; it calls a
    percentage equal to its number with and without the sign.
    """
    import sympy

    if not all(isinstance(each, sympy.Expr) and each.is_number for each in (true, value)):
        return True
    rough = true.has(sympy.Float) or value.has(sympy.Float)
    true, value = true.doit(), value.doit()
    for factor in (1, 100, sympy.Rational(1, 100)):
        difference = true - value * factor
        if difference.is_Rational and not rough:
            if difference == 0:
                return True
            continue
        size = max(abs(sympy.N(true, 25)), abs(sympy.N(value * factor, 25)))
        if abs(sympy.N(difference, 25)) <= (1e-5 if rough else 1e-15) * size:
            return True
    return False
