"""Verdicts on a step's answers, and the advantages that follow from them.

A reward is a number per answer (an outcome), or one per step of its reasoning (a process). Outcomes
are weighted, summed and compared within their group (DeepSeekMath, arXiv:2402.03300, section
4.1.2); so is every process by itself, over all steps of the group together (section 4.1.3). An
answer's tokens get the sum of both. Where a reward names steps for some answers of a group and a
number for others, that number is one step which ends with the answer: with numbers alone that would
be an outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dsjax.config.reinforcement import Reinforcement
from dsjax.parallel import processes
from dsjax.posttrain.advantages import Scale, outcome_advantages, process_advantages
from dsjax.posttrain.rewards import Grader
from dsjax.posttrain.rewards.worth import Worth
from dsjax.posttrain.rollout import Answer

FORMAT = "format"  # a reward that is always measured, and counts only if it is asked for
_NOT_RIGHT = (FORMAT, "language")  # rewards that do not tell whether an answer is right


class Judged:
    """Verdicts on answers, arrays [questions, group].

    Attributes:
      rewards: of each reward by itself, NaN where it could not judge; of steps, their mean.
      total_QG: weighted sums, NaN where none could judge; what one cannot judge adds nothing.
      worth_QG: of the first reward that tells right from wrong.
      right_QG: whether that is 1 or more.
    """

    def __init__(
        self,
        config: Reinforcement,
        grader: Grader,
        texts: Sequence[str],
        facts: Sequence[Mapping[str, Any]],
        *,
        group: int,
    ) -> None:
        """Judges answers, `group` of which in a row are to one question. The first process does,
        and the others take over its verdicts.

        Args:
          grader: of the config's rewards and the format.
          facts: of each answer's question.
        """
        rl, self._texts, self._group = config.rl, texts, group
        self._scale: Scale = rl.scale
        weights = config.reward.weights or (1.0,) * len(rl.rewards)
        self._weights = dict(zip(rl.rewards, weights, strict=True))
        given = grader.judge(texts, facts) if processes.is_first() else None
        self._verdicts = [
            {name: _worth(*verdict) for name, verdict in each.items()}
            for each in processes.json_from_first(given)
        ]
        self.rewards = {name: self._values(name) for name in grader.names}
        self.total_QG = self._total({name: self.rewards[name] for name in rl.rewards})
        telling = [name for name in rl.rewards if name not in _NOT_RIGHT]
        self.worth_QG = self.rewards[(telling or rl.rewards)[0]]
        self.right_QG = self.worth_QG >= 1
        self._stepped_Q = {name: self._has_steps(name) for name in rl.rewards}
        outcomes = {
            name: np.where(self._stepped_Q[name][:, None], np.nan, self.rewards[name])
            for name in rl.rewards
        }
        self._outcome_QG = outcome_advantages(self._total(outcomes), rl.scale)

    def _values(self, name: str) -> np.ndarray:
        values = [verdict[name].value for verdict in self._verdicts]
        return np.array([np.nan if v is None else v for v in values]).reshape(-1, self._group)

    def _total(self, given: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns weighted sums of what could be judged, NaN where nothing could."""
        stacked = np.stack([self._weights[name] * values for name, values in given.items()])
        total_QG = np.nan_to_num(stacked).sum(axis=0)
        return np.where(np.isnan(stacked).all(axis=0), np.nan, total_QG)

    def _has_steps(self, name: str) -> np.ndarray:
        """Marks the groups of which a reward judges steps, bool [questions]."""
        stepped = np.array([bool(verdict[name].steps) for verdict in self._verdicts])
        return np.any(stepped.reshape(-1, self._group), axis=1)

    def steps(self, index: int) -> dict[str, tuple[tuple[int, float], ...]]:
        """Returns the steps of an answer by the rewards that name some, as (end, reward)."""
        verdict = self._verdicts[index]
        return {name: verdict[name].steps for name in self._weights if verdict[name].steps}

    def _group_steps(self, name: str, question: int) -> list[tuple[tuple[int, float], ...]]:
        """Returns the steps of each answer of a group of which a reward judges steps."""
        found = []
        for index in range(question * self._group, (question + 1) * self._group):
            worth, length = self._verdicts[index][name], len(self._texts[index])
            whole = () if worth.value is None else ((length, worth.value),)
            found.append(worth.steps or whole)
        return found

    @property
    def flat_Q(self) -> np.ndarray:
        """Marks groups from which nothing is learned, bool [questions]."""
        flat_Q = np.all(self._outcome_QG == 0, axis=1)
        for name, stepped_Q in self._stepped_Q.items():
            for question in np.flatnonzero(stepped_Q).tolist():
                group = self._group_steps(name, question)
                flat_Q[question] &= len({reward for steps in group for _, reward in steps}) < 2
        return flat_Q

    def advantages(
        self, answers: Sequence[Answer], decode: Callable[[Sequence[int]], str]
    ) -> list[np.ndarray]:
        """Returns the advantage of each token of each answer, float64 [tokens].

        Args:
          answers: whose texts were judged.
          decode: of token ids, as for these texts.
        """
        found = [
            np.full(len(answer.tokens), advantage)
            for answer, advantage in zip(answers, self._outcome_QG.ravel(), strict=True)
        ]
        for name, stepped_Q in self._stepped_Q.items():
            for question in np.flatnonzero(stepped_Q).tolist():
                own = slice(question * self._group, (question + 1) * self._group)
                steps, given = self._group_steps(name, question), answers[own]
                places = [
                    last_tokens([end for end, _ in each], text, answer, decode)
                    for each, text, answer in zip(steps, self._texts[own], given, strict=True)
                ]
                rewards = [[reward for _, reward in each] for each in steps]
                lengths = [len(answer.tokens) for answer in given]
                process = process_advantages(rewards, places, lengths, self._scale)
                for total, more in zip(found[own], process, strict=True):
                    total += self._weights[name] * more
        return found

    def metrics(self) -> dict[str, float]:
        """Returns means over all answers, of what could be judged."""
        found = {f"reward_{_plain(name)}": _mean(values) for name, values in self.rewards.items()}
        share_Q, flat_Q = self.right_QG.mean(axis=1), self.flat_Q
        deviation_Q = [np.std(group[~np.isnan(group)]) for group in self.total_QG]
        return {
            "reward": _mean(self.total_QG),
            "reward_std": float(np.mean(np.nan_to_num(deviation_Q))),
            "format": found.pop(f"reward_{FORMAT}"),
            **found,
            "right": float(share_Q.mean()),
            "solved": float((share_Q > 0).mean()),  # questions with at least one right answer
            "flat_right": float((flat_Q & (share_Q == 1)).mean()),
            "flat_wrong": float((flat_Q & (share_Q == 0)).mean()),
            "not_judged": float(np.isnan(self.total_QG).mean()),
        }


def last_tokens(
    ends: Sequence[int], text: str, answer: Answer, decode: Callable[[Sequence[int]], str]
) -> list[int]:
    """Returns the place of each step's last token in an answer: the one that holds the last of the
    step's characters, to its last byte. A step that ends with the text ends with the answer, its
    end token included.

    Args:
      ends: of steps, in characters of the text, in order.
      text: of the answer without its end token.
    """
    places: list[int] = []
    tokens = answer.tokens
    for end in ends:
        if end >= len(text):
            places.append(len(tokens) - 1)
            continue
        # Bisects for the most tokens whose text is no longer than the step.
        low, high = places[-1] if places else 0, len(tokens)
        while low < high:
            middle = (low + high + 1) // 2
            if len(decode(tokens[:middle])) <= end:
                low = middle
            else:
                high = middle - 1
        # If their text is shorter, the next token goes on into the next step.
        places.append(low - 1 if len(decode(tokens[:low])) == end else low)
    return places


def _worth(value: float | None, steps: Sequence[Sequence[Any]]) -> Worth:
    return Worth(value, tuple((end, reward) for end, reward in steps))


def _mean(values: np.ndarray) -> float:
    return 0.0 if np.isnan(values).all() else float(np.nanmean(values))


def _plain(name: str) -> str:
    """Returns a reward's name without what a path or an address would add to a metric's name."""
    kind, _, rest = name.partition(":")
    return rest if kind.endswith(".py") else kind
