"""Code: a program against tests, each run in a process of its own (`dsjax.posttrain.execution`).

1 if every test passes, else 0; the first that fails ends the judging, and so does the time for all.
The program is the last fenced block after the thought that is Python or of no named language, or,
without a fence, all that follows the thought. `tests` of the problem are one of

  [[arguments, result], ...]   with `entry`, a function's name (or a method of a class Solution):
                               `entry(*arguments)` returns `result`
  [{"input", "output"}, ...]   the program reads standard input and prints
  {"asserts": text}            Python that asserts things of functions of the program

Whether a test passed is decided here, outside the program's process, from the value that came back:
as JSON values, in which a tuple is a list, 1 is not true, and decimal fractions agree to 1e-9; or
as printed words, line by line, in which numbers agree by value. What the program prints of its
success, how it exits, and what it does to its own Python is worth nothing.

`begun`, as of HumanEval, is the code that the prompt began: a program without `entry` continues it,
up to the next line at the margin that begins something else, and one with `entry` gets its imports.
"""

from __future__ import annotations

import ast
import builtins
import decimal
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from dsjax.posttrain import execution
from dsjax.posttrain.answer import last_block, split

SECONDS = 30.0  # of the judge itself; the programs have limits of their own
TOTAL_SECONDS = 120.0  # wall-clock, all tests together
WALL_SECONDS = TOTAL_SECONDS + 60.0
MOST_CHARACTERS = 100_000
_PYTHON = {"", "py", "python", "python3"}
# What ends a function that continues the prompt: OpenAI Codex (arXiv:2107.03374), section 2.1.
_ENDS = re.compile(r"\n(?:class |def |#|if |print|```)")


def score(completion: str, problem: Mapping[str, Any]) -> float:
    program = _program(completion, problem)
    if program is None or len(program) > MOST_CHARACTERS:
        return 0.0
    deadline = time.monotonic() + TOTAL_SECONDS
    limits, tests = execution.Limits(), problem["tests"]
    if isinstance(tests, Mapping):
        names = _functions(tests["asserts"])
        return float(execution.passes(program, tests["asserts"], names, limits))
    if not tests:
        raise ValueError("'tests' is empty, so no program can be judged by it")
    for test in tests:
        if time.monotonic() > deadline or not _passes(program, test, problem, limits):
            return 0.0
    return 1.0


def complaint(problem: Mapping[str, Any]) -> str | None:
    """Says why the rule cannot judge answers to a problem; None if it can."""
    tests, entry = problem.get("tests"), problem.get("entry")
    if isinstance(tests, Mapping) and isinstance(tests.get("asserts"), str):
        try:
            names = _functions(tests["asserts"])
        except (SyntaxError, ValueError, RecursionError) as error:
            return f"the assertions in 'tests' are no Python: {error}"
        return None if names else "the assertions in 'tests' call no function of a program"
    if not isinstance(tests, list) or not tests:
        return f"'tests' is {tests!r:.80}, not a list such as [[[1, 2], 3]] with 'entry'"
    for number, test in enumerate(tests):
        if isinstance(test, Mapping):
            if not all(isinstance(test.get(key), str) for key in ("input", "output")):
                return f"test {number} has no texts 'input' and 'output'"
        elif not isinstance(test, list) or len(test) != 2 or not isinstance(test[0], list):
            return f"test {number} is {test!r:.80}, not [[arguments], result]"
        elif not isinstance(entry, str) or not entry.isidentifier():
            return f"'entry' is {entry!r:.80}, not the name of the function to test"
    return None


def _program(completion: str, problem: Mapping[str, Any]) -> str | None:
    answer = split(completion, problem)[1]
    if answer is None:
        return None
    block, begun = last_block(answer, _PYTHON), problem.get("begun")
    code = answer if block is None else block
    if not isinstance(begun, str) or not begun:
        return code
    if re.search(rf"^(?:async )?def {re.escape(str(problem.get('entry')))}\b", code, re.MULTILINE):
        imports = [line for line in begun.splitlines() if line.startswith(("import ", "from "))]
        # Helpers of the prompt come first, so that the answer's own functions replace them.
        return "\n".join([*imports, _helpers(begun, str(problem.get("entry"))), code])
    if block is None and (end := _ENDS.search(code)):
        code = code[: end.start()]
    return f"{begun}{code}\n"


def _helpers(begun: str, entry: str) -> str:
    """Returns the functions that the prompt gives whole, before the one to write."""
    return re.split(rf"^(?:async )?def {re.escape(entry)}\b", begun, flags=re.MULTILINE)[0]


def _passes(program: str, test: Any, problem: Mapping[str, Any], limits: execution.Limits) -> bool:
    if isinstance(test, Mapping):
        output = execution.printed(program, test["input"], limits)
        return output is not None and _same_print(output, test["output"])
    arguments, wanted = test
    result = execution.returned(program, problem["entry"], arguments, limits)
    return result is not None and _same_value(result[0], wanted)


def _same_value(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, int | float) and isinstance(wanted, int | float):
        exact = isinstance(value, int) and isinstance(wanted, int)
        return value == wanted if exact else _near(value, wanted)
    if isinstance(value, list | tuple) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_same_value, value, wanted))
    if isinstance(value, dict) and isinstance(wanted, dict):
        named = {_key(key): each for key, each in value.items()}
        return named.keys() == wanted.keys() and all(
            _same_value(named[key], wanted[key]) for key in wanted
        )
    return type(value) is type(wanted) and value == wanted


def _near(value: float, wanted: float) -> bool:
    try:
        return math.isclose(value, wanted, rel_tol=1e-9, abs_tol=1e-9)
    except OverflowError:  # an integer beyond all floats
        return False


def _key(key: Any) -> Any:
    """Spells a key as JSON does."""
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return str(key) if isinstance(key, int | float) else key


def _same_print(output: str, wanted: str) -> bool:
    lines, others = (text.rstrip().split("\n") for text in (output, wanted))
    return len(lines) == len(others) and all(map(_same_line, lines, others))


def _same_line(line: str, other: str) -> bool:
    words, others = line.split(), other.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(word: str, other: str) -> bool:
    if word == other:
        return True
    try:
        return decimal.Decimal(word) == decimal.Decimal(other)
    except decimal.InvalidOperation:
        return False


def _functions(tests: str) -> list[str]:
    """Returns the names that assertions use and neither define nor import: the program's functions.

    Raises:
      SyntaxError: they are no Python.
    """
    used, known = dict[str, None](), set(dir(builtins))
    for node in ast.walk(ast.parse(tests)):
        if isinstance(node, ast.Name):
            used.update({node.id: None} if isinstance(node.ctx, ast.Load) else {})
            known |= {node.id} if isinstance(node.ctx, ast.Store) else set()
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.alias):
            known.add((node.asname or node.name).partition(".")[0])
    return [name for name in used if name not in known]
