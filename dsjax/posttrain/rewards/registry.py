"""Names of rewards, and the rules that they stand for.

math, countdown, format, language, code     rules of this folder
rule                    the one of these that the problem names in its field `rule`
PATH.py:FUNCTION        a function of the user's
model:RUN               a reward model, the folder of a run of tools/prefer.py
judge:URL or judge:CKPT a model that is asked whether the answer is right
prover:COMMAND          a program that reads a case on standard input and prints a verdict
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path

RULES = ("math", "countdown", "format", "language", "code")
_WITH_ARGUMENT = {
    "model": "model:runs/helpfulness",
    "judge": "judge:http://127.0.0.1:8000/v1",
    "prover": "prover:lake exe verdict",
}
_IMPLIED = {"tests": "code", "numbers": "countdown", "answer": "math"}
_FOLDER = "dsjax.posttrain.rewards"
_HELD = (f"{_FOLDER}.model", f"{_FOLDER}.judge")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule, called in a limited process unless it is held.

    Attributes:
      name: as the user wrote it.
      module: that has `score(completion, problem, *arguments)`, `complaint(problem, *arguments)`,
        `SECONDS` and `WALL_SECONDS`; for a held rule, see `held.Holder`. If it has `require`, that
        checks the arguments.
      arguments: what the name says beyond the rule.
    """

    name: str
    module: str
    arguments: tuple[str, ...] = ()

    @property
    def is_held(self) -> bool:
        """Tells whether the rule judges in this process, see `held`."""
        return self.module in _HELD

    def of(self, problem: Mapping[str, object]) -> Rule:
        """Returns the rule for a problem, which `rule` leaves to the problem.

        Raises:
          ValueError: the problem neither names nor implies one.
        """
        if self.name != "rule":
            return self
        named = problem.get("rule", problem.get("data_source"))
        if named not in RULES:
            named = next((rule for field, rule in _IMPLIED.items() if field in problem), None)
        if named is None or ("rule" in problem and named != problem["rule"]):
            raise ValueError(
                f"the problem's field 'rule' is {problem.get('rule')!r:.80}; name one of "
                f"{', '.join(RULES)}, or give 'answer', 'numbers' and 'target', or 'tests'"
            )
        return find(str(named))


def find(name: str) -> Rule:
    """Returns the rule of a name.

    Raises:
      ValueError: there is none, or a path in the name does not exist.
    """
    if name == "rule" or name in RULES:
        return Rule(name, f"{_FOLDER}.{name}")
    kind, colon, argument = name.partition(":")
    if colon and kind in _WITH_ARGUMENT:
        if not argument:
            raise ValueError(
                f"reward {name!r} says nothing after the colon; {_WITH_ARGUMENT[kind]}"
            )
        return Rule(name, f"{_FOLDER}.{kind}", (argument,))
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        if not Path(path).is_file():
            raise ValueError(f"reward {name!r}: there is no file {path} (from {Path.cwd()})")
        if not function.isidentifier():
            raise ValueError(f"reward {name!r}: {function!r} is no name of a function")
        return Rule(name, f"{_FOLDER}.user", (str(Path(path).absolute()), function))
    known = [*RULES, "rule", *_WITH_ARGUMENT]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"there is no reward {name!r}; {hint}there are {', '.join([*RULES, 'rule'])}, "
        f"{', '.join(_WITH_ARGUMENT.values())}, and PATH.py:FUNCTION for your own"
    )
