"""Judges completions by rules, in limited processes: one by `score`, many by `Grader`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsjax.files import listed
from dsjax.posttrain.problems import Problem
from dsjax.posttrain.rewards.held import Held
from dsjax.posttrain.rewards.registry import Rule, find
from dsjax.posttrain.rewards.worth import Worth, read
from dsjax.posttrain.verify import Call, Outcome, Pool

if TYPE_CHECKING:
    from jax.sharding import Mesh

_logger = logging.getLogger(__name__)
_IDLE_SECONDS = 2.0  # of the process of `score`
_MOST_WARNINGS = 5  # of one reward; all are counted


@dataclasses.dataclass
class Counts:
    """What grading has met so far, by reward.

    Attributes:
      limits: completions judged 0 because judging them reached a limit.
      failures: completions not judged because the rule failed.
    """

    limits: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: Counter[str] = dataclasses.field(default_factory=Counter)


class Grader:
    """Judges completions by some rewards; a context that ends its processes.

    Attributes:
      names: of the rewards.
      counts: what it has met so far.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        workers: int | None = None,
        idle_seconds: float | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """
        Args:
          names: of rewards, see `registry`.
          workers: processes that judge at once; None: see `verify.Pool`, as for `idle_seconds`.
          mesh: devices of models that judge; None: the default device.

        Raises:
          ValueError: there is no such reward, or it is named twice, or what it needs is missing.
        """
        self.names = tuple(names)
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"the reward {twice[0]!r} is named twice; name each once")
        self._rules = [find(name) for name in self.names]
        for rule in self._rules:
            if require := getattr(_module(rule), "require", None):
                require(*rule.arguments)
        self._mesh = mesh
        self._held: dict[str, Held] = {}
        self._pool = Pool(workers, idle_seconds=idle_seconds)
        self.counts = Counts()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def check(self, problems: Sequence[Problem]) -> None:
        """Refuses problems that a reward cannot judge answers to, before any is answered.

        Raises:
          ValueError: a problem lacks what a reward reads, or has a truth that it cannot read; names
            its file and line.
        """
        found, calls, asked = [], [], []
        for problem in problems:
            facts = problem.facts(opened=False)
            for rule in self._rules:
                if rule.is_held:
                    why = _module(rule).complaint(facts, *rule.arguments)
                    found += [f"{problem.place}: reward {rule.name!r}: {why}"] if why else []
                    continue
                try:
                    calls.append(_call(rule.of(facts), "complaint", facts))
                    asked.append((problem, rule))
                except ValueError as error:
                    found.append(f"{problem.place}: {error}")
        for (problem, rule), outcome in zip(asked, self._pool.run(calls), strict=True):
            if why := outcome.value or outcome.error:
                found.append(f"{problem.place}: reward {rule.name!r}: {why}")
        if found:
            raise ValueError(listed(found))

    def grade(
        self,
        completions: Sequence[str],
        problems: Sequence[Mapping[str, Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, float | None]]:
        """Judges each completion by each reward; of steps' rewards the mean is taken.

        The arguments are those of `judge`.

        Returns:
          the worth of each completion by the name of the reward; None where it cannot be judged.
        """
        judged = self.judge(completions, problems, progress)
        return [{name: worth.value for name, worth in each.items()} for each in judged]

    def judge(
        self,
        completions: Sequence[str],
        problems: Sequence[Mapping[str, Any]],
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Worth]]:
        """Judges each completion by each reward, its steps where the reward names them.

        Args:
          completions: all that followed each prompt, without the end token.
          problems: the facts of each completion's problem, see `Problem.facts`.
          progress: is called with how many judgements are made, and of how many.

        Returns:
          the verdicts on each completion by the name of the reward. Judging that reaches a limit is
          worth 0.
        """
        calls: list[Call] = []
        asked: list[tuple[int, str]] = []
        rewards = [dict.fromkeys(self.names, Worth(None)) for _ in completions]
        for index, (completion, problem) in enumerate(zip(completions, problems, strict=True)):
            for rule in (each for each in self._rules if not each.is_held):
                try:
                    calls.append(_call(rule.of(problem), "score", completion, problem))
                    asked.append((index, rule.name))
                except ValueError as error:
                    self._failed(rule.name, completion, str(error))
        outcomes = self._pool.run(calls, progress)
        for (index, name), outcome in zip(asked, outcomes, strict=True):
            rewards[index][name] = self._worth(name, outcome, completions[index])
        for rule in (each for each in self._rules if each.is_held):
            judged = self._hold(rule).grade(completions, problems)
            for reward, outcome, text in zip(rewards, judged, completions, strict=True):
                reward[rule.name] = self._worth(rule.name, outcome, text)
        return rewards

    def _hold(self, rule: Rule) -> Held:
        """Returns what judges by a held rule, opened at its first use."""
        if rule.name not in self._held:
            self._held[rule.name] = _module(rule).hold(*rule.arguments, self._mesh)
        return self._held[rule.name]

    def _worth(self, name: str, outcome: Outcome, completion: str) -> Worth:
        """Reads the verdict on a completion."""
        if outcome.limit:
            self.counts.limits[name] += 1
            return Worth(0.0)
        error = outcome.error
        if error is None:
            try:
                return read(outcome.value, len(completion))
            except ValueError as wrong:
                error = str(wrong)
        self._failed(name, completion, error)
        return Worth(None)

    def _failed(self, name: str, completion: str, why: str) -> None:
        self.counts.failures[name] += 1
        if self.counts.failures[name] <= _MOST_WARNINGS:
            _logger.warning(
                "reward %s could not judge a completion: %s; it begins %.80r", name, why, completion
            )


def score(name: str, completion: str, problem: Mapping[str, Any]) -> float | None:
    """Judges one completion by one reward, in a limited process that ends when it is idle.

    Args:
      name: "math", "countdown", "format", "language", "code", or another of `registry`.
      completion: all that follows the prompt, its <think> included where the prompt did not open
        it.
      problem: facts of the problem, such as {"answer": "5"}; what a reward reads is written in its
        file.

    Returns:
      its worth; None where it cannot be judged. Judging that reaches a limit is worth 0.

    Raises:
      ValueError: there is no such reward.
    """
    return _grader(name).grade([completion], [problem])[0][name]


@functools.cache
def _grader(name: str) -> Grader:
    return Grader([name], workers=1, idle_seconds=_IDLE_SECONDS)


def _module(rule: Rule) -> Any:
    return importlib.import_module(rule.module) if rule.name != "rule" else None


def _call(rule: Rule, function: str, *given: Any) -> Call:
    module = _module(rule)
    target, arguments = f"{rule.module}:{function}", (*given, *rule.arguments)
    return Call(target, arguments, module.SECONDS, module.WALL_SECONDS)
