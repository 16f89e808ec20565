"""Verdicts, sums of them, and the advantage of each token."""

import types

import numpy as np
import pytest

from dsjax.config.reinforcement import RewardConfig
from dsjax.posttrain.rewards.worth import Worth
from dsjax.posttrain.rollout import Answer
from dsjax.posttrain.verdicts import Judged, last_tokens
from tests.posttrain.shapes import QWEN2, config_of

NAN = float("nan")


class Graders:
    """Judges by a table: completions are its keys."""

    def __init__(self, names, table):
        self.names, self._table = names, table
        self.counts = types.SimpleNamespace(limits={"countdown": 2}, failures={})
        self.closed = False

    def judge(self, texts, facts):
        assert len(texts) == len(facts)
        return [
            {
                name: worth if isinstance(worth, Worth) else Worth(worth)
                for name, worth in zip(self.names, self._table[text], strict=True)
            }
            for text in texts
        ]

    def close(self):
        self.closed = True


def judged(table, *, group=2, rewards=("countdown", "format"), weights=()):
    names = ("countdown", "format", "language")
    texts = [str(index) for index in range(len(table))]
    grader = Graders(names, dict(zip(texts, table, strict=True)))
    config = config_of(QWEN2, rewards=rewards, reward=RewardConfig(weights=weights))
    return Judged(config, grader, texts, [{}] * len(texts), group=group)


def outcome_of(found):
    """Advantages of answers of one token each, [questions, group]."""
    answers = [Answer((5,), np.zeros(1, np.float32), None, False)] * found.total_QG.size
    one = found.advantages(answers, lambda ids: "x" * len(ids))
    return np.concatenate(one).reshape(found.total_QG.shape)


def test_reward_is_the_weighted_sum_of_those_that_are_asked_for():
    table = [(1, 1, 9), (0.1, 0, 9), (0, 1, 9), (0, 1, 9)]
    np.testing.assert_allclose(judged(table).total_QG, [[2, 0.1], [1, 1]])
    weighted = judged(table, weights=(1.0, 0.5))
    np.testing.assert_allclose(weighted.total_QG, [[1.5, 0.1], [0.5, 0.5]])
    np.testing.assert_allclose(outcome_of(weighted), [[1, -1], [0, 0]])
    np.testing.assert_array_equal(weighted.right_QG, [[True, False], [False, False]])
    np.testing.assert_array_equal(weighted.flat_Q, [False, True])


def test_rule_that_cannot_judge_adds_nothing_and_none_at_all_leaves_out():
    table = [(1, None, 0), (None, None, 0), (0, 1, 0), (0, 0, 0)]
    found = judged(table)
    np.testing.assert_allclose(found.total_QG, [[1, NAN], [1, 0]])
    np.testing.assert_allclose(outcome_of(found), [[0, 0], [1, -1]])
    metrics = found.metrics()
    assert metrics["not_judged"] == 0.25 and np.isfinite(list(metrics.values())).all()


def test_metrics_tell_flat_groups_apart():
    table = [(1, 1, 0), (1, 1, 0), (0, 0, 0), (0, 0, 0), (1, 1, 0), (0, 1, 0)]
    metrics = judged(table).metrics()
    assert metrics["flat_right"] == metrics["flat_wrong"] == pytest.approx(1 / 3)
    assert metrics["right"] == 0.5 and metrics["solved"] == pytest.approx(2 / 3)
    assert metrics["format"] == pytest.approx(4 / 6)
    assert metrics["reward_countdown"] == 0.5 and metrics["reward"] == pytest.approx(7 / 6)
    assert metrics["reward_std"] == pytest.approx(0.5 / 3)


def test_right_is_told_by_the_first_reward_that_knows():
    table = [(1, 0, 1), (0, 1, 1)]
    found = judged(table, rewards=("language", "format", "countdown"))
    np.testing.assert_array_equal(found.right_QG, [[True, False]])
    only = judged(table, rewards=("format",))
    np.testing.assert_array_equal(only.right_QG, [[False, True]])


def process(weights=(), scale="population"):
    """Two answers whose tokens are characters, with an end token or without."""
    texts = ["abcde", "fghijk"]
    steps = [((3, 0.5), (5, 1.0)), ((2, 0.2), (4, 0.6), (6, 0.0))]
    table = {
        text: (Worth(0.5, own), 1.0 - number, 0.0)
        for number, (text, own) in enumerate(zip(texts, steps, strict=True))
    }
    config = config_of(
        QWEN2, rewards=("steps", "format"), reward=RewardConfig(weights=weights), scale=scale
    )
    grader = Graders(("steps", "format", "language"), table)
    found = Judged(config, grader, texts, [{}] * 2, group=2)
    answers = [Answer(tuple(map(ord, text)), np.zeros(1), None, False) for text in texts]
    return found, found.advantages(answers, lambda ids: "".join(map(chr, ids)))


def test_advantages_of_steps_are_the_published_sums_beside_those_of_outcomes():
    found, (first, second) = process(weights=(1.0, 0.0))
    np.testing.assert_allclose(first, [1.685590762] * 3 + [1.569343123] * 2, atol=1e-9)
    wanted = [-1.685590762] * 2 + [-0.92998111] * 2 + [-1.336847846] * 2
    np.testing.assert_allclose(second, wanted, atol=1e-9)
    assert not found.flat_Q.any() and found.steps(0) == {"steps": ((3, 0.5), (5, 1.0))}
    np.testing.assert_allclose(found.total_QG, [[0.5, 0.5]])
    _, (both, _) = process(weights=(2.0, 1.0))  # the outcome's advantages are 1 and -1
    np.testing.assert_allclose(both, 2 * first + 1, atol=1e-9)


def test_number_among_steps_is_a_step_that_ends_with_the_answer():
    steps, number, none = Worth(0.5, ((1, 0.5),)), Worth(1.0), Worth(None)
    table = {text: (worth, 0.0) for text, worth in zip("abc", (steps, number, none), strict=True)}
    config = config_of(QWEN2, rewards=("steps",), scale="none")
    found = Judged(config, Graders(("steps", "format"), table), "abc", [{}] * 3, group=3)
    answers = [Answer((ord(text), 1), np.zeros(2), None, True) for text in "abc"]
    first, second, third = found.advantages(answers, lambda ids: "".join(map(chr, ids)))
    np.testing.assert_allclose(first, [-0.25, -0.25])  # the step ends with the answer
    np.testing.assert_allclose(second, [0.25, 0.25])
    np.testing.assert_allclose(third, [0, 0])


def test_steps_of_equal_worth_teach_nothing():
    steps = [Worth(1.0, ((1, 1.0), (2, 1.0))), Worth(1.0, ((2, 1.0),))]
    table = {text: (worth, 0.0) for text, worth in zip(("ab", "cd"), steps, strict=True)}
    config = config_of(QWEN2, rewards=("steps",))
    found = Judged(config, Graders(("steps", "format"), table), list(table), [{}] * 2, group=2)
    assert found.flat_Q.all() and found.metrics()["flat_right"] == 1


def test_last_token_of_a_step_holds_its_last_byte():
    """Tokens of several characters, of a part of one, and the end token."""
    pieces = [b"ab", b"c", b"\xe2\x82", b"\xac", b"def", b"g", b"<end>"]
    text = "abc\u20acdefg"

    def decode(ids):
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    answer = Answer(tuple(range(7)), np.zeros(7), None, True)
    assert last_tokens([1, 2, 3, 4, 5, 7, 8], text, answer, decode) == [0, 0, 1, 3, 4, 4, 6]
    assert last_tokens([4, 8], text, answer, decode) == [3, 6]
    assert last_tokens([7], text, answer, decode) == [4]
