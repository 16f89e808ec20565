"""The format rule: R1's tags, in order, once each."""

import pytest

from dsjax.posttrain.rewards import format as rule

THOUGHT = {"opened": True}
NONE = {"opened": False}


@pytest.mark.parametrize(
    ("completion", "problem", "worth"),
    [
        ("<think>a</think><answer>b</answer>", NONE, 1),
        (" <think>\na\n</think>\n<answer>\nb\n</answer>\n", NONE, 1),
        ("a</think><answer>b</answer>", THOUGHT, 1),
        ("a</think><answer>b</answer>", {"prompt": "Q <think>\n"}, 1),
        # Neither prompt nor flag is known, so either beginning may be right.
        ("a</think><answer>b</answer>", {}, 1),
        ("<think>a</think><answer>b</answer>", {}, 1),
        ("a</think><answer>b</answer>", {"prompt": "Q"}, 0),
        ("a</think><answer>b</answer>", NONE, 0),
        ("<think>a</think><answer>b</answer>", THOUGHT, 0),
        ("<think>a</think>", NONE, 0),
        ("<answer>b</answer>", NONE, 0),
        ("no tags", {}, 0),
        ("", {}, 0),
        ("<think>a</think><answer>b", NONE, 0),
        ("<think>a</answer><answer>b</think>", NONE, 0),
        ("<answer>b</answer><think>a</think>", NONE, 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", NONE, 0),
        ("<think>a</think>x<answer>b</answer>", NONE, 0),
        ("x<think>a</think><answer>b</answer>", NONE, 0),
        ("<think>a</think><answer>b</answer>x", NONE, 0),
        ("<think></think><answer>b</answer>", NONE, 0),
        ("<think>a</think><answer> </answer>", NONE, 0),
        ("<THINK>a</THINK><answer>b</answer>", NONE, 0),
        ("<think><think>a</think><answer>b</answer>", NONE, 0),
    ],
)
def test_format_is_worth_one_or_nothing(completion, problem, worth):
    assert rule.score(completion, problem) == worth


def test_format_takes_long_replies_at_once():
    assert rule.score("<think>" * 200_000, {}) == 0
    assert rule.score("<think>" + "a" * 10**6 + "</think><answer>b</answer>", {}) == 1
