"""The countdown game: reach a target with given numbers and + - * / and parentheses.

  1    the answer's expression uses each of `numbers` exactly once and is worth exactly `target`
  0.1  it is an expression of the game, but of other numbers or another worth, or divides by zero
  0    there is no answer, or it is no such expression

The answer is what the last <answer>...</answer> after the thought holds, or the last box in it or,
without the tags, after the thought. What follows an `=` must be the target itself. An expression
has whole numbers of decimal digits, the four operators (also as \\times, \\cdot, \\div and their
characters), a minus before a number or a parenthesis, and parentheses; its worth is an exact
fraction. It is parsed here, never evaluated as a program, and bounded in length and depth.

Game and reward: TinyZero, whose own rule is looser (it takes the last line, decimals and anything
that Python's `eval` makes a number within 1e-5 of the target).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from dsjax.posttrain.answer import last_box, split, tagged

SECONDS, WALL_SECONDS = 5.0, 30.0
WELL_FORMED = 0.1
MOST_CHARACTERS, MOST_DEPTH, MOST_DIGITS = 1000, 50, 15
_SPELLED = {
    "\\times": "*",
    "\\cdot": "*",
    "\\div": "/",
    "\\left": "",
    "\\right": "",
    "\u00d7": "*",
    "\u00f7": "/",
    "\u2212": "-",
    "\u22c5": "*",
    "$": "",
}
_TOKENS = re.compile(r"[0-9]+|[-+*/()]")


def score(completion: str, problem: Mapping[str, Any]) -> float:
    text = _answer(completion, problem)
    if text is None or len(text) > MOST_CHARACTERS:
        return 0.0
    for spelled, written in _SPELLED.items():
        text = text.replace(spelled, written)
    left, equals, right = text.partition("=")
    try:
        worth, numbers = _Parser(left).whole()
        claimed = _Parser(right).whole()[0] if equals else worth
    except SyntaxError:
        return 0.0
    target = problem["target"]
    used_once = Counter(numbers) == Counter(map(int, problem["numbers"]))
    return 1.0 if used_once and worth == claimed == int(target) else WELL_FORMED


def complaint(problem: Mapping[str, Any]) -> str | None:
    """Says why the rule cannot judge answers to a problem; None if it can."""
    numbers, target = problem.get("numbers"), problem.get("target")
    if not isinstance(numbers, list) or not numbers or not all(map(_whole, numbers)):
        return f"'numbers' is {numbers!r:.80}, not a list of whole numbers such as [3, 5, 7]"
    if not _whole(target):
        return f"'target' is {target!r:.80}, not a whole number"
    return None


def _whole(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or (
        isinstance(value, float) and value.is_integer()
    )


def _answer(completion: str, problem: Mapping[str, Any]) -> str | None:
    answer = split(completion, problem)[1]
    if answer is None:
        return None
    inside = tagged(answer)
    box = last_box(answer if inside is None else inside)
    return inside if box is None else box


class _Parser:
    """A recursive descent over the tokens of an expression."""

    def __init__(self, text: str) -> None:
        self._tokens = _TOKENS.findall(text)
        self._next, self._depth, self._numbers = 0, 0, list[int]()
        self._defined = True  # nothing was divided by zero
        if _TOKENS.sub("", text).strip():
            raise SyntaxError

    def whole(self) -> tuple[Fraction | None, list[int]]:
        """Returns the worth of the whole text, None where it divides by zero, and its numbers.

        Raises:
          SyntaxError: it is no expression.
        """
        worth = self._sum()
        if self._next < len(self._tokens):
            raise SyntaxError
        return (worth if self._defined else None), self._numbers

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""

    def _take(self) -> str:
        self._next += 1
        return self._tokens[self._next - 1]

    def _sum(self) -> Fraction:
        worth = self._product()
        while self._peek() in ("+", "-"):
            plus = self._take() == "+"
            right = self._product()
            worth = worth + right if plus else worth - right
        return worth

    def _product(self) -> Fraction:
        worth = self._factor()
        while self._peek() in ("*", "/"):
            times = self._take() == "*"
            right = self._factor()
            if times:
                worth *= right
            elif right:
                worth /= right
            else:
                self._defined = False
        return worth

    def _factor(self) -> Fraction:
        token = self._peek()
        self._depth += 1
        if not token or self._depth > MOST_DEPTH:
            raise SyntaxError
        self._take()
        if token == "-":
            worth = -self._factor()
        elif token == "(":
            worth = self._sum()
            if self._peek() != ")":
                raise SyntaxError
            self._take()
        elif token.isdecimal() and len(token) <= MOST_DIGITS:
            self._numbers.append(int(token))
            worth = Fraction(int(token))
        else:
            raise SyntaxError
        self._depth -= 1
        return worth
