"""Implements tools/evaluate.py: how many problems a checkpoint solves, by rules.

  pass@1   mean over problems of the share of right samples
  pass@k   chance that one of k samples is right: 1 - C(n-c, k) / C(n, k) for c right of n
  maj@k    whether the commonest answer of the first k samples is right; of equally common ones the
           first given. Answers are compared as text; samples without one have no vote.
  greedy   whether the answer of most likely tokens is right

A sample is right if its reward is at least 1. One that cannot be judged is left out and counted.
All come with a 95 % interval over problems: Wilson's where each problem is right or wrong, else the
percentiles of a bootstrap.

Sources: pass@k, Codex (arXiv:2107.03374), equation 1; maj@k, Wang et al. (arXiv:2203.11171);
Wilson, J. Am. Stat. Assoc. 22 (1927).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from dsjax import display, tables
from dsjax.posttrain.answer import final
from dsjax.posttrain.problems import Problem, read_problems
from dsjax.posttrain.responses import Answering, Respondent, Response
from dsjax.posttrain.rewards import Grader

RIGHT = 1.0
_RESAMPLES, _CHUNK = 2000, 100
_NORMAL = 1.959963984540054  # 97.5 % of the normal distribution lie below


@dataclasses.dataclass(frozen=True)
class Sample:
    """One judged answer.

    Attributes:
      worth: its reward; None if it could not be judged.
      answer: what it gives as its answer, see `answer.final`.
      tokens: its length, the end token included.
      ended: whether the model ended it.
    """

    worth: float | None
    answer: str | None
    tokens: int
    ended: bool
    text: str = ""

    @property
    def right(self) -> bool:
        return self.worth is not None and self.worth >= RIGHT


@dataclasses.dataclass(frozen=True)
class Measured:
    """A share of problems, with its interval and the kind of the interval."""

    value: float
    low: float
    high: float
    interval: str  # "wilson" or "bootstrap"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the chance that k of n samples, c of them right, hold a right one.

    Raises:
      ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, and there are {n}")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(samples: Sequence[Sample]) -> bool | None:
    """Tells whether the commonest answer is right, ties by the first; None without an answer."""
    votes = [sample for sample in samples if sample.answer is not None]
    if not votes:
        return None
    # Counter keeps the order of first occurrence among equals.
    commonest = Counter(sample.answer for sample in votes).most_common(1)[0][0]
    return next(sample.right for sample in votes if sample.answer == commonest)


def measure(values: Sequence[float], seed: int = 0) -> Measured:
    """Returns the mean of a value per problem in [0, 1], with its interval over problems."""
    values_P = np.asarray(values, np.float64)
    count, mean = len(values_P), float(values_P.mean())
    if set(values_P.tolist()) <= {0.0, 1.0}:
        square = _NORMAL**2
        center = (mean + square / (2 * count)) / (1 + square / count)
        half = math.sqrt(mean * (1 - mean) / count + square / (4 * count**2))
        half *= _NORMAL / (1 + square / count)
        # Where none or all are right, an end is exact, and only rounding moves it.
        low = 0.0 if mean == 0 else center - half
        high = 1.0 if mean == 1 else center + half
        return Measured(mean, low, high, "wilson")
    generator = np.random.default_rng(seed)
    means = [
        generator.multinomial(count, np.full(count, 1 / count), _CHUNK) @ values_P / count
        for _ in range(_RESAMPLES // _CHUNK)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Measured(mean, float(low), float(high), "bootstrap")


def summarise(
    samples: Sequence[Sequence[Sample]], ks: Sequence[int], greedy: Sequence[Sample] = ()
) -> dict[str, Measured]:
    """Returns the measures above by name.

    Args:
      samples: of each problem, in the order in which they were asked for. Problems without a judged
        sample are left out.
      ks: for pass@k and maj@k besides pass@1, where all problems have as many judged samples.
    """
    judged = [[each for each in one if each.worth is not None] for one in samples]
    counts = [(len(one), sum(each.right for each in one)) for one in judged if one]
    found = {}
    enough = [k for k in sorted({1, *ks}) if counts and all(n >= k for n, _ in counts)]
    for k in enough:
        found[f"pass@{k}"] = measure([pass_at_k(n, c, k) for n, c in counts])
    for k in enough[1:]:
        votes = [majority(one[:k]) for one in judged if one]
        if any(vote is not None for vote in votes):
            found[f"maj@{k}"] = measure([float(vote or False) for vote in votes])
    if greedy:
        found["greedy"] = measure([float(each.right) for each in greedy])
    return found


def judge(
    grader: Grader,
    respondent: Respondent,
    responses: Sequence[Response],
    progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Judges answers by the grader's first reward."""
    facts = [respondent.facts[response.key[0]] for response in responses]
    rewards = grader.grade([response.text for response in responses], facts, progress)
    return [
        Sample(
            next(iter(reward.values())), final(response.text, fact), response.tokens,
            response.ended, response.text,
        )
        for response, fact, reward in zip(responses, facts, rewards, strict=True)
    ]  # fmt: skip


def evaluate(
    respondent: Respondent,
    grader: Grader,
    *,
    n: int,
    ks: Sequence[int],
    screen: display.Display | None = None,
) -> tuple[dict[str, Measured], list[list[Sample]], list[Sample]]:
    """Draws and judges n samples and one greedy answer of each problem.

    Returns:
      the measures, the samples of each problem, and the greedy answers.
    """
    count = len(respondent.prompts)
    counting = screen.counting if screen else lambda what: lambda done, total: None

    def drawn(keys: list[tuple[int, int]], what: str, greedy: bool) -> list[Response]:
        show, found = counting(what), []
        for response in respondent.answers(keys, greedy=greedy):
            found.append(response)
            show(len(found), len(keys))
        return sorted(found)

    most_likely = drawn([(number, 0) for number in range(count)], "greedy answers", True)
    keys = [(number, sample) for number in range(count) for sample in range(n)]
    responses = drawn(keys, "samples", False)
    judged = judge(grader, respondent, [*most_likely, *responses], counting("judging"))
    greedy, samples = judged[:count], judged[count:]
    grouped = [samples[start : start + n] for start in range(0, len(samples), n)]
    return summarise(grouped, ks, greedy), grouped, greedy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examination(Answering):
    """What tools/evaluate.py is asked for.

    Attributes:
      problems: file or glob.
      k: of pass@k and maj@k; None: n.
      json: file of the figures and all samples; "-" prints them.
    """

    problems: str
    reward: str = "rule"
    n: int = 8
    k: Sequence[int] | None = None
    json: str | None = None


def run(asked: Examination) -> None:
    """Examines a checkpoint and shows the result.

    Raises:
      ValueError: the checkpoint, the problems or the reward cannot be used; all of this is checked
        before the weights are read.
    """
    ks = asked.k or ([asked.n] if asked.n > 1 else [])
    if ks and max(ks) > asked.n:
        raise ValueError(f"--k {max(ks)} needs as many samples: raise --n {asked.n}")
    tables.check(asked.json)
    problems = read_problems(asked.problems)
    screen = display.Display(Console(stderr=True))
    with Grader([asked.reward]) as grader, screen:
        grader.check(problems)
        respondent = asked.respondent(problems)
        measures, samples, greedy = evaluate(respondent, grader, n=asked.n, ks=ks, screen=screen)
        summary = _summary(asked, respondent, measures, samples)
        summary["limits_reached"] = sum(grader.counts.limits.values())
    if asked.json:
        summary["results"] = [
            _result(*each) for each in zip(problems, samples, greedy, strict=True)
        ]
    tables.show(summary, _print, asked.json)


def _summary(
    asked: Examination,
    respondent: Respondent,
    measures: Mapping[str, Measured],
    samples: Sequence[Sequence[Sample]],
) -> dict[str, Any]:
    every = [sample for one in samples for sample in one]
    worths = [sample.worth for sample in every if sample.worth is not None]
    statistics, sampling = respondent.statistics, respondent.sampling
    seconds = statistics.prefill_seconds + statistics.decode_seconds
    return {
        "checkpoint": str(asked.checkpoint),
        "problems": asked.problems,
        "count": len(samples),
        "n": asked.n,
        "reward": asked.reward,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        **{name: measured.value for name, measured in measures.items()},
        "intervals": {
            name: {"low": each.low, "high": each.high, "kind": each.interval}
            for name, each in measures.items()
        },
        "mean_reward": float(np.mean(worths)) if worths else None,
        "mean_tokens": float(np.mean([sample.tokens for sample in every])),
        "ended": float(np.mean([sample.ended for sample in every])),
        "not_judged": len(every) - len(worths),
        "tokens_per_second": statistics.new_tokens / seconds if seconds else None,
    }


def _result(problem: Problem, samples: Sequence[Sample], greedy: Sample) -> dict[str, Any]:
    return {
        "place": problem.place,
        "prompt": problem.prompt,
        "samples": [dataclasses.asdict(sample) for sample in samples],
        "greedy": dataclasses.asdict(greedy),
    }


def _print(summary: dict[str, Any], console: Console) -> None:
    rows = []
    for name, each in summary["intervals"].items():
        low, high = 100 * each["low"], 100 * each["high"]
        rows.append(
            (name, f"{100 * summary[name]:.1f} %", f"{low:.1f} to {high:.1f} %", each["kind"])
        )
    console.print(f"{summary['count']:,} problems of {summary['problems']}", markup=False)
    console.print(tables.table("", ("", ">right", ">95 % interval", "kind"), rows))
    rest = [
        ("reward", summary["reward"]),
        ("samples per problem", summary["n"]),
        ("temperature", f"{summary['temperature']:g}"),
        ("top-p", f"{summary['top_p']:g}"),
        ("mean reward", _rounded(summary["mean_reward"])),
        ("mean tokens", f"{summary['mean_tokens']:.1f}"),
        ("ended by the model", f"{100 * summary['ended']:.1f} %"),
        ("not judged", summary["not_judged"]),
        ("limits reached in judging", summary["limits_reached"]),
        ("tokens per second", _rounded(summary["tokens_per_second"])),
    ]
    console.print(tables.figures("", rest))
    if summary["not_judged"]:
        print("some answers could not be judged; see the warnings above", file=sys.stderr)


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:,.4g}"
