"""Judging many completions, and what reaches the trainer when a rule fails."""

import logging

import pytest

from dsjax.posttrain.problems import Problem
from dsjax.posttrain.rewards import Grader, score
from dsjax.posttrain.rewards.worth import Worth

GAME = {"numbers": [5, 6, 9], "target": 20}
RIGHT, WRONG = (f"<think>t</think><answer>{e}</answer>" for e in ("5+6+9", "5+6"))
MINE = """
import os, time
def worth(completion, problem):
    if completion == "raise": raise RuntimeError("no idea")
    if completion == "none": return None
    if completion == "text": return "1"
    if completion == "nan": return float("nan")
    if completion == "exit": os._exit(0)
    if completion == "steps": return [(2, 1), (5, 0.5)]
    if completion == "astray": return [[9, 1]]
    return len(completion) + problem.get("bonus", 0)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)
    return f"{path}:worth"


def test_completions_are_judged_by_every_reward():
    with Grader(["countdown", "format"], workers=2) as grader:
        rewards = grader.grade([RIGHT, WRONG, "x"], [GAME] * 3)
    assert rewards == [
        {"countdown": 1.0, "format": 1.0},
        {"countdown": 0.1, "format": 1.0},
        {"countdown": 0.0, "format": 0.0},
    ]


def test_score_judges_one():
    assert score("countdown", RIGHT, GAME) == 1.0
    assert score("format", RIGHT, {}) == 1.0


def test_problem_without_what_the_rule_reads_cannot_be_judged():
    assert score("countdown", RIGHT, {}) is None


def test_rule_that_fails_judges_nothing_and_is_told(mine, caplog):
    texts = ["raise", "none", "text", "nan", "exit", "four"]
    with Grader([mine], workers=1) as grader, caplog.at_level(logging.WARNING):
        rewards = [each[mine] for each in grader.grade(texts, [{"bonus": 0.5}] * 6)]
    assert rewards == [None, None, None, None, 0.0, 4.5]
    assert grader.counts.failures == {mine: 3} and grader.counts.limits == {mine: 1}
    assert "a completion: RuntimeError: no idea; it begins 'raise'" in caplog.text


def test_verdicts_tell_the_rewards_of_steps_and_grades_their_mean(mine, caplog):
    with Grader([mine], workers=1) as grader, caplog.at_level(logging.WARNING):
        verdicts = grader.judge(["steps", "four", "astray"], [{}] * 3)
        rewards = grader.grade(["steps", "four"], [{}] * 2)
    steps = ((2, 1.0), (5, 0.5))
    assert [v[mine] for v in verdicts] == [Worth(0.75, steps), Worth(4.0), Worth(None)]
    assert [each[mine] for each in rewards] == [0.75, 4.0]
    assert "steps that end at [9] in a completion of 6 characters" in caplog.text


def test_rewards_of_a_mixture_follow_the_problems_own_rule():
    problems = [GAME | {"rule": "countdown"}, {"rule": "format"}, {}]
    with Grader(["rule"], workers=1) as grader:
        assert [each["rule"] for each in grader.grade([RIGHT] * 3, problems)] == [1.0, 1.0, None]
        with pytest.raises(ValueError, match="f:1: the problem's field 'rule' is None"):
            grader.check([Problem("q", {}, "f:1")])


def test_problems_that_cannot_be_judged_are_refused_with_their_places():
    problems = [Problem("q", GAME, "f:1"), Problem("q", {"numbers": [1]}, "f:2")]
    with Grader(["countdown", "format"], workers=1) as grader:
        grader.check(problems[:1])
        with pytest.raises(ValueError, match="f:2: reward 'countdown': 'target' is None, not a"):
            grader.check(problems)


def test_reward_named_twice_is_refused():
    with pytest.raises(ValueError, match="'format' is named twice"):
        Grader(["format", "format"])
