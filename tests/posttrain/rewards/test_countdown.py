"""The countdown rule against the game, exhaustively and with answers that cheat."""

import itertools
import operator
from fractions import Fraction

import pytest

from dsjax.posttrain.rewards import countdown as rule

GAME = {"numbers": [5, 6, 9], "target": 20}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def worth(expression, game=GAME):
    return rule.score(f"<think>t</think><answer>{expression}</answer>", game)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("5+6+9", 1),
        (" ( 9 - -5 ) + 6 ", 1),
        ("9+6+5 = 20", 1),
        (r"\boxed{9 + 6 + 5}", 1),
        ("$9+6+5$", 1),
        ("9+6+5=21", 0.1),
        ("9+6+5=10+10", 1),
        ("5+6", 0.1),  # not all numbers
        ("5+6+9+9-9", 0.1),  # one more than once
        ("4*5", 0.1),  # other numbers
        ("20", 0.1),
        ("5*6-9", 0.1),
        ("9+6/(5-5)", 0.1),
        ("5/0", 0.1),
        ("", 0),
        ("5 6+9", 0),
        ("5+6+9=x", 0),
        ("5+6+9 =", 0),
        ("5.0+6+9", 0),
        ("5_+6+9", 0),
        ("5**1+6+9", 0),
        ("5//1+6+9", 0),
        ("9^9^9^9", 0),
        ("9**9**9**9", 0),
        ("\uff15+6+9", 0),  # a digit, but not a decimal one of ASCII
        ("\u0665+6+9", 0),
        ("__import__('os')._exit(0)", 0),
        ("5+6+9 or exit()", 0),
        ("(5+6+9", 0),
        ("5+6+9)", 0),
        ("5+6+", 0),
        ("1" * 900, 0),
        ("(" * 400 + "5" + ")" * 400, 0),
        ("-" * 400 + "5", 0),
        ("5+6+9" + " " * 2000, 0),
    ],
)
def test_answer_is_worth(expression, expected):
    assert worth(expression) == expected


def test_every_number_counts_though_the_target_is_reached():
    assert worth("6+9", {"numbers": [5, 6, 9], "target": 15}) == 0.1
    assert worth("6+9", {"numbers": [6, 9], "target": 15}) == 1
    assert worth("6+6", {"numbers": [6, 9], "target": 12}) == 0.1


def test_division_and_signs_are_exact():
    assert worth("8/(3-8/3)", {"numbers": [8, 8, 3, 3], "target": 24}) == 1
    assert worth("1/3*3", {"numbers": [1, 3, 3], "target": 1}) == 1
    assert worth(r"6\times 3\div 2 - 1", {"numbers": [6, 3, 2, 1], "target": 8}) == 1
    assert worth("10\u00d72\u22125", {"numbers": [10, 2, 5], "target": 15.0}) == 1
    big = 10**14
    assert worth(f"{big}+1-1", {"numbers": [big, 1, 1], "target": big}) == 1
    assert worth(f"{big}+1-1", {"numbers": [big, 1, 1], "target": big + 1}) == 0.1


@pytest.mark.parametrize(
    ("completion", "problem", "expected"),
    [
        ("5+6+9", {}, 0),  # no answer was given
        ("<think><answer>5+6+9</answer></think>", {}, 0),
        ("<think><answer>5+6+9</answer></think><answer>5</answer>", {}, 0.1),
        ("<answer>5</answer> no: <answer>5+6+9</answer>", {}, 1),
        ("<answer>5+6+9", {}, 0),
        (r"<think>t</think>It is \boxed{5+6+9}.", {}, 1),
        ("<answer>5+6+9</answer>", {"opened": True}, 0),  # the thought never ends
        ("t</think><answer>5+6+9</answer>", {"opened": True}, 1),
    ],
)
def test_answer_is_taken_from_its_place(completion, problem, expected):
    assert rule.score(completion, GAME | problem) == expected


def test_all_expressions_of_three_numbers_agree_with_fractions():
    for a, b, c in itertools.permutations((3, 4, 8)):
        for one, two in itertools.product("+-*/", repeat=2):
            inner = OPERATORS[two](Fraction(b), Fraction(c))
            value = OPERATORS[one](Fraction(a), inner)
            for target in (int(value), int(value) + 1):
                game = {"numbers": [8, 4, 3], "target": target}
                expected = 1 if value == target else 0.1
                assert worth(f"{a}{one}({b}{two}{c})", game) == expected
    assert worth("8-4-3", {"numbers": [3, 4, 8], "target": 1}) == 1  # from left to right
    assert worth("8/4/2", {"numbers": [2, 4, 8], "target": 1}) == 1
    assert worth("8-4*2", {"numbers": [2, 4, 8], "target": 0}) == 1


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        ({"numbers": [1, 2], "target": 3}, None),
        ({"numbers": [1.0], "target": 3.0}, None),
        ({"target": 3}, "'numbers' is None, not a list"),
        ({"numbers": [], "target": 3}, "'numbers' is"),
        ({"numbers": [True], "target": 3}, "'numbers' is"),
        ({"numbers": ["1"], "target": 3}, "'numbers' is"),
        ({"numbers": [1]}, "'target' is None, not a whole number"),
        ({"numbers": [1], "target": 0.5}, "'target' is 0.5"),
        ({"numbers": [1], "target": float("inf")}, "'target' is inf"),
    ],
)
def test_problem_that_is_no_game_is_told(problem, complaint):
    told = rule.complaint(problem)
    assert told == complaint if complaint is None else told.startswith(complaint)
