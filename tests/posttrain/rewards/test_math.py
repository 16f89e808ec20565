"""The mathematics rule: values, places, and answers made to break the judge."""

import sys
import time

import pytest

from dsjax.posttrain.problems import Problem
from dsjax.posttrain.rewards import Grader, score


@pytest.fixture(scope="module")
def judge():
    with Grader(["math"], workers=1) as grader:
        yield lambda completion, answer, **facts: grader.grade(
            [completion], [{"answer": answer, **facts}]
        )[0]["math"]


# Facts that the public tests of Math-Verify and open-r1 state, in words of our own.
EQUAL = [
    ("63/400", r"\frac{63}{400}"),
    ("-10/9", r"-\frac{10}{9}"),
    ("7425000", "7,425,000"),
    ("1000", "1000.0"),
    ("0.4", ".4"),
    ("0,111", "0.111"),
    ("1/3", r"\frac13"),
    ("1", r"\frac3{3}"),
    (r"\sqrt{3}", r"\sqrt3"),
    ("1/3", r"\dfrac{1}{3}"),
    ("1/3", r"\left( \frac{1}{3} \right)"),
    ("1/3", r"\frac{1}{3} \text{ meters}"),
    ("1/3", r"k = \frac{1}{3}"),
    (r"28\%", "28"),
    (r"28\%", r"28\%"),
    ("14916", r"14{,}916"),
    ("[0,1)", "[0,1)"),
    ("2-2p", "-2p+2"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"(3, \frac{\pi}{2})", r"\left( 3, \frac{\pi}{2} \right)"),
    (r"\{1,2,3\}", "3,2,1"),
    (r"\pm 2021", r"\{-2021, 2021\}"),
    ("x > 5", r"x \gt 5"),
    (r"x \leq 5", r"5 \geq x"),
    ("11", "x=11"),
    ("-12;-11;-10", r"\{-12, -11, -10\}"),
    ("(p,q)=(3,2)", "(3,2)"),
    ("AB=4,CD=5", "4,5"),
    (r"\text{Even}", "Even"),
    (r"\text{(C)}", "C"),
    ("C", r"\textbf{(C)}"),
    ("12:00", "12:00"),
    (r"\begin{pmatrix} 0 & 3 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix}0&3\\0&-1\end{pmatrix}"),
    ("5", "5.0"),
    ("1/3", "0.333333"),
    ("0<f(x)<1", "(0,1)"),
    (5, "5"),
]
DIFFERENT = [
    ("63/400", r"\frac{64}{400}"),
    ("6", "3"),
    ("[0,9)", "[0,1)"),
    ("(0,9)", "[0,9)"),
    ("x > 5", "x < 5"),
    (r"x \geq 5", r"x \leq 5"),
    ("n=2, 3, 4", "n=1, 2, 3"),
    (r"\pm 2021", "2021"),
    ("12:00", "1:00"),
    # The truth comes first: the other way round these are equal.
    ("2x + z = 1", "1"),
    ("(3,1)", r"\{1,3\}"),
    ("d", r"\text{E}"),
    ("A", "B"),
    # What math-verify calls equal, since it rounds to six decimals.
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("0", "0.0000001"),
    ("0.000123456", "0.000123"),
    ("10^{30}", "10^{30}+1"),
    (r"\sqrt{2}", "1.4142"),
]


@pytest.mark.parametrize(("truth", "answer"), EQUAL)
def test_equal_value_is_right(judge, truth, answer):
    assert judge(rf"So it is \boxed{{{answer}}}.", truth) == 1


@pytest.mark.parametrize(("truth", "answer"), DIFFERENT)
def test_other_value_is_wrong(judge, truth, answer):
    assert judge(rf"So it is \boxed{{{answer}}}.", truth) == 0


@pytest.mark.parametrize(
    ("completion", "facts", "worth"),
    [
        (r"<think>\boxed{4}</think>\boxed{5}", {}, 1),
        (r"<think>\boxed{5}</think>\boxed{4}", {}, 0),
        (r"<think>\boxed{5}</think>I do not know.", {}, 0),
        (r"<think>it is \boxed{5}", {}, 0),
        (r"it is \boxed{5}", {"opened": True}, 0),
        (r"it is</think> \boxed{5}", {"opened": True}, 1),
        (r"\boxed{3} \boxed{4} \boxed{5}", {}, 1),
        (r"\boxed{5} \boxed{4}", {}, 0),
        (r"\boxed{4, 5}", {}, 0),
        (r"\boxed{4 \text{ or } 5}", {}, 0),
        (r"\boxed{5", {}, 0),
        (r"\boxed{}", {}, 0),
        ("", {}, 0),
        ("<think>t</think><answer>5</answer>", {}, 1),
        (r"<think>t</think><answer>\boxed{5}</answer>", {}, 1),
        ("<answer>4</answer> 5", {}, 0),
        ("The answer is $5$.", {}, 1),
        ("The answer is 5.", {}, 1),
    ],
)
def test_answer_is_taken_from_its_place(judge, completion, facts, worth):
    assert judge(completion, "5", **facts) == worth


def test_boxes_together_may_be_the_set(judge):
    assert judge(r"\boxed{1} and \boxed{2} and \boxed{3}", r"\{1,2,3\}") == 1
    assert judge(r"\boxed{(1, 2)}, \boxed{(2, 1)}", "(2,1),(1,2)") == 1
    assert judge(r"\boxed{1} and \boxed{2} and \boxed{4}", r"\{1,2,3\}") == 0


MEAN = [
    "9^9^9^9",
    "9" * 4000,
    "1" + "0" * 1000,
    "__import__('os')._exit(0)",
    r"\input{/etc/passwd}",
    "\uff14",
    "\x00\ud7ff\u202e5",
]
MEANER = [
    "{" * 900 + "5" + "}" * 900,
    "9^{9^{9^{9}}}",
    "(((9!)!)!)!",
    "10^{10^{10^{10}}}",
    "(" * 500 + "5" + ")" * 500,
    r"\frac{1}{" * 150 + "1" + "}" * 150,
    r"\sqrt{" * 200 + "25" + "}" * 200,
    "+".join(["1"] * 900),
    r"\int_0^{10} x^{x^{x}} dx",
    r"\sum_{n=1}^{10^{100}} n^n",
]


@pytest.mark.parametrize(
    "answer", [*MEAN, *(pytest.param(answer, marks=pytest.mark.heavy) for answer in MEANER)]
)
def test_answer_made_to_break_the_judge_is_wrong_within_the_limit(judge, answer):
    began = time.monotonic()
    assert judge(rf"\boxed{{{answer}}}", "7") == 0
    assert time.monotonic() - began < 60
    assert judge(r"\boxed{7}", "7") == 1


def test_truth_is_checked_before_the_run():
    good = [{"answer": truth} for truth, _ in EQUAL]
    bad = [{"answer": truth} for truth in (r"\frac{1}{", "???", "", "unparseable_latex", None)]
    problems = [Problem("q", facts, f"f:{n}") for n, facts in enumerate([*good, *bad, {}], 1)]
    with Grader(["math"], workers=1) as grader:
        grader.check(problems[: len(good)])
        with pytest.raises(ValueError) as caught:
            grader.check(problems)
    message = str(caught.value)
    first = len(good) + 1
    assert f"f:{first}: reward 'math': 'answer' '\\\\frac{{1}}{{' cannot be read" in message
    assert "more such" in message or f"f:{first + 5}" in message


def test_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs math-verify, .* pip install -e '\.\[rl\]'"):
        Grader(["math"])


def test_score_needs_no_grader():
    assert score("math", r"\boxed{\frac{63}{400}}", {"answer": r"\frac{63}{400}"}) == 1.0
