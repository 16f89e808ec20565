"""A program's verdict, such as a proof checker's: `prover:COMMAND`.

The command is started once per answer, without a shell, in a process group of its own. It reads one
JSON object on standard input

    {"completion": "...", "answer": "...", "code": "...", "problem": {...}}

where `answer` is what follows the thought (null if it never ends) and `code` the last fenced block
in it (null without one), and prints one JSON line

    {"verdict": 1}

whose verdict is a number, true, false, or null for "cannot judge". What it prints besides, before
that line, is ignored. An exit code other than 0, no such line, and more than 300 seconds of
wall-clock time mean "cannot judge"; the group is killed, with all that it started.

DeepSeek-Prover's reward is of this kind, 1 for a proof that Lean accepts (arXiv:2408.08152, section
2.3). For Lean, the command is a script that writes `code` into a project, runs `lake env lean` on
it and prints {"verdict": true} if there is neither an error nor `sorry`.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from typing import Any

from dsjax.posttrain import execution
from dsjax.posttrain.answer import last_block, split

SECONDS = 60.0  # of this process itself
COMMAND_SECONDS = 300.0
WALL_SECONDS = COMMAND_SECONDS + 60.0


def require(command: str) -> None:
    """Checks that the program is there.

    Raises:
      ValueError: it is not.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"reward 'prover:{command}': {error}; close the quotes") from error
    if not words or shutil.which(words[0]) is None:
        raise ValueError(
            f"reward 'prover:{command}': there is no program {words[0] if words else ''!r}; name "
            "one on the PATH, or its path"
        )


def score(completion: str, problem: Mapping[str, Any], command: str) -> Any:
    """Returns the program's verdict.

    Raises:
      ValueError: it gave none.
    """
    answer = split(completion, problem)[1]
    code = None if answer is None else last_block(answer)
    case = {"completion": completion, "answer": answer, "code": code, "problem": problem}
    output = execution.printed_by(shlex.split(command), json.dumps(case) + "\n", COMMAND_SECONDS)
    if output is None:
        raise ValueError("the program failed, or did not end in time")
    try:
        return json.loads(output.strip().rpartition("\n")[2])["verdict"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"the program printed no verdict: {output[-200:]!r}") from None


def complaint(problem: Mapping[str, Any], command: str) -> str | None:
    """Says why the rule cannot judge answers to a problem; None if it can: the program knows."""
    del problem, command
    return None
